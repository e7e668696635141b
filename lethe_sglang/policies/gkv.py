"""G-KV: window attention remembered from round to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.features import masked_softmax, over_maximum, redundancy

if TYPE_CHECKING:
    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class GKVPolicy(Policy):
    """Keep tokens by an importance that decays from round to round, less the redundancy of their keys.

    With f the mean attention of the last ``window`` queries over its largest value and R the redundancy of R-KV::

        F = max(alpha * F_old, f)    (or mean: alpha F_old + (1 - alpha) f; sum: alpha F_old + f)
        Z = lambda * F - (1 - lambda) * R / max R

    A token at its first round has F = f.

    The official code works per KV head; here heads are averaged, with one kept set per layer.

    Parameters
    ----------
    window, alpha, smoothing
        See above.
    mix_lambda
        lambda.
    """

    name: ClassVar[str] = "gkv"
    source: ClassVar[str] = "arXiv 2512.00504"
    uses_memory: ClassVar[bool] = True
    uses_keys: ClassVar[bool] = True

    window: int = 16
    alpha: float = 0.8
    smoothing: Literal["max", "mean", "sum"] = "max"
    mix_lambda: float = 0.5

    @classmethod
    def from_config(cls, config: EvictionConfig) -> GKVPolicy:
        """Read ``gkv``."""
        own = config.gkv
        return cls(own.window, own.alpha, own.smoothing, own.mix_lambda)

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def key_feature(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Mean cosine of the other keys."""
        return redundancy(keys, valid)

    def remember(self, candidates: Candidates) -> torch.Tensor:
        """F after this round."""
        f = over_maximum(candidates.need("score"), candidates.valid)
        old = candidates.need("memory")
        if self.smoothing == "max":
            return torch.maximum(self.alpha * old, f)
        if self.smoothing == "sum":
            return self.alpha * old + f
        return self.alpha * torch.where(old > 0, old, f) + (1 - self.alpha) * f

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By Z."""
        valid = candidates.valid
        duplicates = over_maximum(masked_softmax(candidates.need("feature"), valid), valid)
        return self.mix_lambda * candidates.need("memory") - (1 - self.mix_lambda) * duplicates
