"""Lethe's recency-aware selective retention (RASR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class LethePolicy(Policy):
    """RASR: keep the tokens with the largest decayed sum of attention.

    Equation 5 of arXiv 2511.06029, read per token (the paper prints no free index; the mean over query heads instead
    of the sum changes no ranking and keeps scores comparable between models):

        S_t[j] = gamma * S_{t-1}[j] + (1/H) * sum_h A_h,t[j]

    Parameters
    ----------
    decay
        gamma per decode step, in [0, 1]. The paper gives no value; ``rasr.decay`` or ``rasr.half_life`` set it.
    score_every
        Score every n-th step of a request (1 is the paper).
    credit
        c >= 0, not of the paper (0): tokens are ranked by ``S_t[j] + c * gamma ** age``, their age in decode steps, as
        if each had received attention c when it was written. A token that is read a while after it was written, for
        the first time, has no score to live on until then.
    """

    name: ClassVar[str] = "lethe"
    source: ClassVar[str] = "arXiv 2511.06029"

    decay: float = 0.998
    score_every: int = 1
    credit: float = 0.0

    @classmethod
    def from_config(cls, config: EvictionConfig) -> LethePolicy:
        """Read ``rasr``."""
        return cls(decay=config.rasr.gamma, score_every=config.rasr.score_every, credit=config.rasr.credit)

    @property
    def uses_position(self) -> bool:  # type: ignore[override]
        """Ages are needed for the credit only."""
        return self.credit > 0

    @property
    def accumulation(self) -> Accumulation:
        """Every (n-th) step, decayed."""
        return Accumulation(self.decay, self.score_every)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score, and by age where there is a credit."""
        score = candidates.need("score")
        if not self.credit:
            return score
        age = candidates.length.view(1, -1, 1) - 1 - candidates.need("position")
        return score + self.credit * torch.pow(self.decay, age.to(score.dtype))
