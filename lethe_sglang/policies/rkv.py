"""R-KV: attention against redundancy of the keys."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor
from lethe_sglang.policies.features import masked_softmax, pooled, redundancy

POOLING = 7
"""Neighbouring candidates over which the largest attention is taken, as in the official code."""


@dataclass(frozen=True)
class RKVPolicy(Policy):
    """Keep tokens that are attended to and unlike the others.

    ``Z[j] = lambda * I[j] - (1 - lambda) * R[j]``: I is the mean attention of the last ``window`` queries, max-pooled;
    R is the softmax over tokens of the mean cosine of the others to a key, in which each other's latest near-duplicate
    does not count. Where a round came sooner than a window, the steps it lacks count as 0.

    The official code works per KV head and takes logits at their largest over the query group; here both are means
    over heads, with one kept set per layer. Comparing all keys with all costs O(n^2) per layer and round.
    """

    source: ClassVar[str] = "arXiv 2505.24133"
    uses_position: ClassVar[bool] = True
    uses_keys: ClassVar[bool] = True

    window: int = Field(
        default=8, ge=1, description="Decode steps before a round whose attention is averaged. Decode steps, >= 1."
    )
    mix_lambda: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Weight of attention against redundancy. 0 <= mix_lambda <= 1; 0.1 is the paper's, 0.5 did better "
        "in later work.",
    )

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def key_feature(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Mean cosine of the other keys."""
        return redundancy(keys, valid)

    def rank(self, candidates: Candidates) -> Tensor:
        """By Z."""
        importance = pooled(candidates.need("score") / self.window, candidates.valid, POOLING, "max")
        duplicates = masked_softmax(candidates.need("feature"), candidates.valid)
        return self.mix_lambda * importance - (1 - self.mix_lambda) * duplicates
