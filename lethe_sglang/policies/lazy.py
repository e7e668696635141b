"""LazyEviction: tokens that come back after a while are kept that long."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor


@dataclass(frozen=True)
class LazyPolicy(Policy):
    """Keep tokens whose next use is not overdue.

    A token is used when its attention exceeds ``threshold``. With TS its last use (at first, the step before it was
    written), MRI the longest gap between two uses and t the current step, as in the authors' code::

        I = 2 sigmoid(-1 - (t - TS) / MRI) + 2 sigmoid(1 - MRI)        0 if MRI = 0

    Summaries of the paper give other forms of the second term; this one prefers tokens that come back often.
    """

    source: ClassVar[str] = "arXiv 2506.15969"
    uses_position: ClassVar[bool] = True  # tokens that were never used again tie: the later one stays
    uses_memory: ClassVar[bool] = True

    threshold: float = Field(
        default=0.001,
        gt=0,
        lt=1,
        description="Attention (mean over query heads) above which a token counts as used; the paper sets it per task. "
        "0 < threshold < 1.",
    )

    @property
    def accumulation(self) -> Accumulation:
        """Time stamps of uses and the longest gap between them."""
        return Accumulation(rule="recurrence", threshold=self.threshold)

    def rank(self, candidates: Candidates) -> Tensor:
        """By I."""
        longest, stamp = candidates.need("memory"), candidates.need("score")
        idle = candidates.length.view(1, -1, 1) - stamp
        never = longest <= 0
        overdue = (-1 - idle / longest.masked_fill(never, 1.0)).sigmoid()
        return (2 * overdue + 2 * (1 - longest).sigmoid()).masked_fill(never, 0.0)
