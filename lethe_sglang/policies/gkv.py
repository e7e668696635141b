"""G-KV: window attention remembered from round to round."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor
from lethe_sglang.policies.features import masked_softmax, over_maximum, redundancy


@dataclass(frozen=True)
class GKVPolicy(Policy):
    """Keep tokens by an importance that decays from round to round, less the redundancy of their keys.

    With f the mean attention of the last ``window`` queries over its largest value and R the redundancy of R-KV::

        F = max(alpha * F_old, f)
        Z = lambda * F - (1 - lambda) * R / max R

    A token at its first round has F = f. Of the ways to let f join F this is the default of the official code.

    The official code works per KV head; here heads are averaged, with one kept set per layer.
    """

    source: ClassVar[str] = "arXiv 2512.00504"
    uses_position: ClassVar[bool] = True
    uses_memory: ClassVar[bool] = True
    uses_keys: ClassVar[bool] = True

    window: int = Field(
        default=16, ge=1, description="Decode steps before a round whose attention is averaged. Decode steps, >= 1."
    )
    alpha: float = Field(
        default=0.8, ge=0, le=1, description="Factor on the remembered importance per round. 0 <= alpha <= 1."
    )
    mix_lambda: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of importance against redundancy. 0 <= mix_lambda <= 1; 1 ignores redundancy.",
    )

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def key_feature(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Mean cosine of the other keys."""
        return redundancy(keys, valid)

    def remember(self, candidates: Candidates) -> Tensor:
        """F after this round."""
        f = over_maximum(candidates.need("score"), candidates.valid)
        return (self.alpha * candidates.need("memory")).maximum(f)

    def rank(self, candidates: Candidates) -> Tensor:
        """By Z."""
        valid = candidates.valid
        duplicates = over_maximum(masked_softmax(candidates.need("feature"), valid), valid)
        return self.mix_lambda * candidates.need("memory") - (1 - self.mix_lambda) * duplicates
