"""The protocol of observers: everything they are told. They change nothing that is served.

The engine and the attention backends hold a tuple of observers that is empty in production, so that the path of a
request has one loop over nothing at each of these places, and a CUDA graph none. Observers that look at attention read
tensors back, which a graph cannot: the guard refuses them where steps are replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from lethe_sglang.config import ConfigError

if TYPE_CHECKING:
    import torch

    from lethe_sglang.cache.layout import RoundPlan
    from lethe_sglang.cache.ledger import RequestState
    from lethe_sglang.cache.rounds import RoundResult

GROUP = "lethe_sglang.observers"


def installed(name: str, option: str) -> Callable[..., Observer]:
    """Return the observer that another package registers under ``name``, for a configuration that has ``option``.

    Raises
    ------
    ConfigError
        If no installed package has it.
    """
    for found in entry_points(group=GROUP, name=name):
        observer: Callable[..., Observer] = found.load()
        return observer
    raise ConfigError(f"{option}: the observer {name!r} (entry-point group {GROUP}) is not installed; write false")


class Observer:
    """Watches nothing; subclasses override what they want to see.

    Attributes
    ----------
    sees_attention
        Whether it needs ``on_extend_layer`` and ``on_decode_layer``.
    """

    sees_attention: ClassVar[bool] = False

    def on_prefill(self, row: int, rid: str) -> None:
        """Hear that request ``rid`` is about to be prefilled in ``row`` (of ``req_to_token``)."""

    def on_extend_layer(self, layer: int, forward_batch: Any) -> None:
        """See that a layer of a prefill, or of one chunk of it, has stored its keys and values."""

    def on_decode_layer(
        self, layer: int, forward_batch: Any, cells: torch.Tensor, length: torch.Tensor, attention: torch.Tensor | None
    ) -> None:
        """See a layer of a decode step once its keys, values and lists are stored.

        Parameters
        ----------
        layer
            Number in the pool.
        forward_batch
            SGLang's batch.
        cells, length
            int64 ``[B, n]`` and ``[B]``: the layer's token lists, of flat cells, as its attention reads them, and how
            many of their entries are valid.
        attention
            float32 ``[B, Hq, n]``: the weights of each list, 0 beyond its length. None where a kernel computes it: only
            the portable backend has weights.
        """

    def on_round(self, states: Sequence[RequestState], plans: Sequence[RoundPlan], result: RoundResult) -> None:
        """See what a launch has done to requests; their states are the new ones."""

    def on_close(self, rows: Sequence[int]) -> None:
        """Hear that SGLang frees rows."""

    def report(self) -> dict[str, Any]:
        """Return what ``/server_info`` shows; reading changes nothing."""
        return {}
