"""Lethe's recency-aware selective retention (RASR)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor
from lethe_sglang.policies.features import likeness, over_maximum


@dataclass(frozen=True)
class LethePolicy(Policy):
    """Keep the tokens with the largest decayed sum of attention (RASR).

    Equation 5 of arXiv 2511.06029, read per token (the paper prints no free index; the mean over query heads instead
    of the sum changes no ranking and keeps scores comparable between models)::

        S_t[j] = gamma * S_{t-1}[j] + (1/H) * sum_h A_h,t[j]        gamma = 0.5 ** (1 / half_life)

    The paper gives no gamma; 346 steps are 0.998 per step. With a ``diversity`` d, which is not of the paper, tokens
    are ranked by ``S_t[j] / max_i S_t[i] - d * cos(k_j, mean key)``, the cosine as in KeyDiff. What many keys resemble,
    such as a delimiter or a counter, is read at every step and repeated soon; a value that nothing has read yet has a
    key of its own. A very large d is ``keydiff``.
    """

    source: ClassVar[str] = "arXiv 2511.06029"

    half_life: float = Field(
        default=346.0,
        gt=0,
        description="Attention this many decode steps old counts half: gamma = 0.5 ** (1 / half_life) per step. "
        "Decode steps, > 0.",
    )
    score_every: int = Field(
        default=1,
        ge=1,
        description="Score every n-th decode step, all requests of the batch at once, with gamma ** n; the other steps "
        "cost what stock's do. Decode steps, >= 1, at most the recent window; 1 is the paper.",
    )
    diversity: float = Field(
        default=0.0,
        ge=0,
        description="What a key unlike the others counts against the score: rank = score / largest score - diversity * "
        "cosine to the mean key of the layer's candidates. >= 0; 0 is the paper, a very large one is keydiff.",
    )

    @property
    def uses_keys(self) -> bool:  # type: ignore[override]
        """Keys are looked at for the diversity only."""
        return self.diversity > 0

    @property
    def accumulation(self) -> Accumulation:
        """Every (n-th) step, decayed."""
        return Accumulation(float(0.5 ** (1.0 / self.half_life)), self.score_every)

    def key_feature(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Cosine to the mean normalised key."""
        return likeness(keys, valid)

    def rank(self, candidates: Candidates) -> Tensor:
        """By score, and by difference from the mean key where diversity counts."""
        score = candidates.need("score")
        if not self.diversity:
            return score
        return over_maximum(score, candidates.valid) - self.diversity * candidates.need("feature")
