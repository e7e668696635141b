"""R-KV: attention against redundancy of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.features import masked_softmax, pooled, redundancy

if TYPE_CHECKING:
    import torch

    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class RKVPolicy(Policy):
    """Keep tokens that are attended to and unlike the others.

    ``Z[j] = lambda * I[j] - (1 - lambda) * R[j]``: I is the mean attention of the last ``window`` queries, max-pooled;
    R is the softmax over tokens of the mean cosine of the others to a key, in which each other's latest near-duplicate
    does not count. Where a round came sooner than a window, the steps it lacks count as 0.

    The official code works per KV head and takes logits at their largest over the query group; here both are means
    over heads, with one kept set per layer. Comparing all keys with all costs O(n^2) per layer and round.

    Parameters
    ----------
    window
        Observed decode steps.
    mix_lambda
        lambda.
    kernel
        Pooling width.
    threshold
        Cosine of near-duplicates.
    """

    name: ClassVar[str] = "rkv"
    source: ClassVar[str] = "arXiv 2505.24133"
    uses_keys: ClassVar[bool] = True

    window: int = 8
    mix_lambda: float = 0.1
    kernel: int = 7
    threshold: float = 0.5

    @classmethod
    def from_config(cls, config: EvictionConfig) -> RKVPolicy:
        """Read ``rkv``."""
        own = config.rkv
        return cls(own.window, own.mix_lambda, own.kernel, own.threshold)

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def key_feature(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Mean cosine of the other keys."""
        return redundancy(keys, valid, self.threshold)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By Z."""
        importance = pooled(candidates.need("score") / self.window, candidates.valid, self.kernel, "max")
        duplicates = masked_softmax(candidates.need("feature"), candidates.valid)
        return self.mix_lambda * importance - (1 - self.mix_lambda) * duplicates
