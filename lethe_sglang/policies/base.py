"""The question every eviction policy answers: which steps it listens to, and whom it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from lethe_sglang.config import EvictionConfig


class Accumulation(NamedTuple):
    """How the attention of decode steps becomes the score of a cell.

    The one score kernel implements, per request, layer and own cell j, at the request's own decode step t,

        S_t[j] = decay * S_{t-1}[j] + (1/H) * sum_h A_h,t[j]

    Attributes
    ----------
    decay
        gamma, per decode step of the request, in [0, 1]. 1 is a plain sum, 0 keeps the last scored step only.
    every
        Only every n-th own step is scored, and then with ``decay ** every`` (1: every step).
    """

    decay: float
    every: int = 1

    @property
    def step_decay(self) -> float:
        """The factor applied at a scored step."""
        return float(self.decay**self.every)


class Candidates(NamedTuple):
    """What a policy sees in one round: all evictable cells of all due requests, padded.

    Attributes
    ----------
    score
        float32 ``[L, B, n]``: the accumulated score S, or None if the policy accumulates nothing.
    position
        int32 ``[L, B, n]``: logical position of each cell, or None unless the policy declares ``uses_position``.
        Along the last axis positions ascend.
    """

    score: torch.Tensor | None
    position: torch.Tensor | None


@dataclass(frozen=True)
class Policy(ABC):
    """One eviction policy. Subclasses are one dataclass in one file, registered in ``policies/registry.py``.

    The engine owns everything else: sinks and the recent window are kept whatever the policy says, the number of
    cells per layer comes from the layer allocator, and states travel with their cell in a round.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    uses_position: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, config: EvictionConfig) -> Policy:
        """Build the policy from the resolved configuration."""
        ...

    @property
    @abstractmethod
    def accumulation(self) -> Accumulation | None:
        """How attention accumulates in the cells' scores; None if the policy never looks at attention."""
        ...

    @abstractmethod
    def rank(self, candidates: Candidates) -> torch.Tensor:
        """Rank the candidates of a round.

        Returns
        -------
        torch.Tensor
            float32 ``[L, B, n]``; larger is kept first. Ties are broken towards the later position.
        """
        ...
