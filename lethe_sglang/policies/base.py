"""The question every eviction policy answers: which steps it listens to, and whom it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict

from lethe_sglang.policies.features import better_place, likeness

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor as Tensor
else:  # policies import torch where they compute: what only reads a configuration starts without it
    Tensor = Any


class Accumulation(NamedTuple):
    """How the attention of decode steps becomes the score of a cell.

    The one score kernel updates, per request, layer and own cell j, at the request's own decode step t and with
    ``a = (1/H) * sum_h A_h,t[j]``, by one of three rules::

        sum         S = decay * S + a
        max         S = max(decay * S, a)
        recurrence  if a > threshold:  M = max(M, t - S);  S = t     (S: last time stamp, M: memory)

    A cell that is written starts with S = M = 0, under recurrence with S = its position.

    Attributes
    ----------
    decay
        gamma, per decode step of the request, in [0, 1]. 1 is a plain sum, 0 keeps the last scored step only.
    every
        Only every n-th step is scored, and then with ``decay ** every`` (1: every step).
    window
        Score the last ``window`` steps before a round only, from zero; None scores every step. After a round that
        came less than a window ago it is the steps since then.
    rule
        See above.
    threshold
        Of rule recurrence: attention above it renews a token.
    """

    decay: float = 1.0
    every: int = 1
    window: int | None = None
    rule: Literal["sum", "max", "recurrence"] = "sum"
    threshold: float = 0.0

    @property
    def step_decay(self) -> float:
        """The factor applied at a scored step."""
        return float(self.decay**self.every)

    @property
    def in_phase(self) -> int:
        """The n of a batch that is scored at each n-th step; a window has steps of its own, which are masked."""
        return self.every if self.window is None else 1


class Candidates(NamedTuple):
    """What a policy sees in one round: all evictable cells of all due requests, padded.

    Attributes
    ----------
    score
        float32 ``[L, B, n]``: the accumulated score S, or None if the policy accumulates nothing. Under tensor
        parallelism the mean over ranks.
    position
        int32 ``[L, B, n]``: logical position of each cell, or None unless the policy declares ``uses_position``.
        Then, and only then, positions ascend along the last axis: cells are stored in another order.
    memory
        float32 ``[L, B, n]``: the second state M, or None unless the policy declares ``uses_memory``.
    feature
        float32 ``[L, B, n]``: what ``key_feature`` made of the keys, or None unless the policy declares ``uses_keys``.
    valid
        bool ``[L, B, n]``: false beyond a layer's candidates.
    length
        int64 ``[B]``: tokens of each sequence so far.
    better_place
        :func:`~lethe_sglang.policies.features.better_place`, for which a GPU takes two launches.
    """

    score: Tensor | None
    position: Tensor | None
    memory: Tensor | None
    feature: Tensor | None
    valid: Tensor
    length: Tensor
    better_place: Callable[[Tensor, Tensor, Tensor, float], Tensor] = better_place

    def need(self, state: Literal["score", "position", "memory", "feature"]) -> Tensor:
        """Return a state that the policy has declared."""
        value: Tensor | None = getattr(self, state)
        assert value is not None, f"the policy does not declare that it uses {state}"
        return value


class Policy(ABC):
    """One eviction policy: a frozen pydantic dataclass in one file, whose fields are its options.

    The registry gives it its name, and the section of that name in a configuration sets the fields, each of them a
    ``pydantic.Field`` with a default, its range, and a description that names unit and range (the documentation
    prints it). Fields are checked strictly and no other keys are taken.

    The engine owns everything else: sinks and the recent window are kept whatever the policy says, the number of
    cells per layer comes from the layer allocator, and states travel with their cell in a round.

    Attributes
    ----------
    source
        The paper, such as ``arXiv 2511.06029``.
    uses_position, uses_memory, uses_keys
        Which of ``Candidates.position``, ``memory`` and ``feature`` the policy looks at. One that compares a candidate
        with its neighbours uses positions, too: it is what puts candidates in order.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    source: ClassVar[str]
    uses_position: ClassVar[bool] = False
    uses_memory: ClassVar[bool] = False
    uses_keys: ClassVar[bool] = False

    @property
    @abstractmethod
    def accumulation(self) -> Accumulation | None:
        """How attention accumulates in the cells' scores; None if the policy never looks at attention."""
        ...

    @abstractmethod
    def rank(self, candidates: Candidates) -> Tensor:
        """Rank the candidates of a round.

        Returns
        -------
        torch.Tensor
            float32 ``[L, B, n]``; larger is kept first. Ties are broken towards the later candidate.
        """
        ...

    def key_feature(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Reduce the candidates' keys of one layer to one number a cell (only if ``uses_keys``).

        Unless a policy says otherwise, this is their likeness to the mean key (KeyDiff), for which a GPU takes one
        launch for all layers. What a policy puts in its place runs a layer at a time, with as many requests as its
        memory allows: a request's numbers may depend on its own keys alone.

        Parameters
        ----------
        keys
            float32 ``[B, n, H, D]``: this rank's KV heads; 0 where a candidate is not valid.
        valid
            bool ``[B, n]``.

        Returns
        -------
        torch.Tensor
            float32 ``[B, n]``: the mean over this rank's heads; the engine averages over ranks.
        """
        return likeness(keys, valid)

    def remember(self, candidates: Candidates) -> Tensor | None:
        """Renew the memory, float32 ``[L, B, n]``, before ``rank`` sees it; None leaves it as it is."""
        return None


class ByScore(Policy):
    """Base of policies that keep what has the largest score."""

    def rank(self, candidates: Candidates) -> Tensor:
        """By score."""
        return candidates.need("score")


class Unscored(Policy):
    """Base of policies that never look at attention."""

    @property
    def accumulation(self) -> None:
        """Nothing."""
        return None
