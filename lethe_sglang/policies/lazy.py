"""LazyEviction: tokens that come back after a while are kept that long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class LazyPolicy(Policy):
    """Keep tokens whose next use is not overdue.

    A token is used when its attention exceeds ``threshold``. With TS its last use (at first, the step before it was
    written), MRI the longest gap between two uses and t the current step, as in the authors' code::

        I = 2 sigmoid(-1 - (t - TS) / MRI) + 2 sigmoid(1 - MRI)        0 if MRI = 0

    Summaries of the paper give other forms of the second term; this one prefers tokens that come back often.

    Parameters
    ----------
    threshold
        Attention of a use. The paper sets it per task.
    """

    name: ClassVar[str] = "lazy"
    source: ClassVar[str] = "arXiv 2506.15969"
    uses_memory: ClassVar[bool] = True

    threshold: float = 0.001

    @classmethod
    def from_config(cls, config: EvictionConfig) -> LazyPolicy:
        """Read ``lazy``."""
        return cls(config.lazy.threshold)

    @property
    def accumulation(self) -> Accumulation:
        """Time stamps of uses and the longest gap between them."""
        return Accumulation(rule="recurrence", threshold=self.threshold)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By I."""
        longest, stamp = candidates.need("memory"), candidates.need("score")
        idle = candidates.length.view(1, -1, 1) - stamp
        recurs = longest > 0
        overdue = torch.sigmoid(-1 - idle / torch.where(recurs, longest, 1.0))
        return torch.where(recurs, 2 * overdue + 2 * torch.sigmoid(1 - longest), 0.0)
