"""Lethe's recency-aware selective retention (RASR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.features import likeness, over_maximum

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
    diversity
        d >= 0, not of the paper (0): tokens are ranked by ``S_t[j] / max_i S_t[i] - d * cos(k_j, mean key)``, the
        cosine as in KeyDiff. What many keys resemble, such as a delimiter or a counter, is read at every step and
        repeated soon; a value that nothing has read yet has a key of its own. A very large d is ``keydiff``.
    """

    name: ClassVar[str] = "lethe"
    source: ClassVar[str] = "arXiv 2511.06029"

    decay: float = 0.998
    score_every: int = 1
    credit: float = 0.0
    diversity: float = 0.0

    @classmethod
    def from_config(cls, config: EvictionConfig) -> LethePolicy:
        """Read ``rasr``."""
        own = config.rasr
        return cls(own.gamma, own.score_every, own.credit, own.diversity)

    @property
    def uses_position(self) -> bool:  # type: ignore[override]
        """Ages are needed for the credit only."""
        return self.credit > 0

    @property
    def uses_keys(self) -> bool:  # type: ignore[override]
        """Keys are looked at for the diversity only."""
        return self.diversity > 0

    @property
    def accumulation(self) -> Accumulation:
        """Every (n-th) step, decayed."""
        return Accumulation(self.decay, self.score_every)

    def key_feature(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Cosine to the mean normalised key."""
        return likeness(keys, valid)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score, by age where there is a credit, and by difference from the mean key where diversity counts."""
        score = candidates.need("score")
        if self.credit:
            age = candidates.length.view(1, -1, 1) - 1 - candidates.need("position")
            score = score + self.credit * torch.pow(self.decay, age.to(score.dtype))
        if not self.diversity:
            return score
        return over_maximum(score, candidates.valid) - self.diversity * candidates.need("feature")
