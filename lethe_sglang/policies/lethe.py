"""Lethe's recency-aware selective retention (RASR)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor


@dataclass(frozen=True)
class LethePolicy(Policy):
    """Keep the tokens with the largest decayed sum of attention (RASR).

    Equation 5 of arXiv 2511.06029, read per token (the paper prints no free index; the mean over query heads instead
    of the sum changes no ranking and keeps scores comparable between models)::

        S_t[j] = gamma * S_{t-1}[j] + (1/H) * sum_h A_h,t[j]        gamma = 0.5 ** (1 / half_life)

    The paper gives no gamma. What attention sums lose is a value that nothing has read yet; its key, though, is unlike
    the others. With a ``key_share`` x, which is not of the paper, of the tokens that are kept about 1 - x come from the
    top of the list by score and x from the top of the list by unlikeness of the key. With the places ``p_s`` and
    ``p_k`` in these lists, from 0, tokens are ranked by ``-min(p_s / (1 - x), (p_k + 0.41) / x)``. Unlikeness is
    KeyDiff's, ``-cos(k_j, mean key)``.
    """

    source: ClassVar[str] = "arXiv 2511.06029"

    half_life: float = Field(
        default=128.0,
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
    key_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Part of the kept tokens that are chosen for keys unlike the mean key of the layer's candidates, "
        "the rest for their score. 0 <= key_share < 1; 0 is the paper.",
    )

    @property
    def uses_keys(self) -> bool:  # type: ignore[override]
        """Keys are looked at for their share only."""
        return self.key_share > 0

    @property
    def accumulation(self) -> Accumulation:
        """Every (n-th) step, decayed."""
        return Accumulation(float(0.5 ** (1.0 / self.half_life)), self.score_every)

    def rank(self, candidates: Candidates) -> Tensor:
        """By the better of two places: that by score, and that by difference from the mean key."""
        score = candidates.need("score")
        if not self.key_share:
            return score
        return candidates.better_place(score, candidates.need("feature"), candidates.valid, self.key_share)
