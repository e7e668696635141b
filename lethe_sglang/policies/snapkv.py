"""SnapKV run again at every round: the attention of the last few steps, pooled."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy, Tensor
from lethe_sglang.policies.features import pooled


@dataclass(frozen=True)
class SnapKVPolicy(Policy):
    """Keep the tokens that the last ``window`` queries attend to most, averaged over neighbours.

    ``S[j] = sum_{i < window} a_{t-i}[j]``, ranked by ``avg_pool(S, kernel)``. The paper does this once, after the
    prefill, and per KV head; here it is done at every round (SnapKV-D in later work) with one kept set per layer.
    """

    source: ClassVar[str] = "arXiv 2404.14469"
    uses_position: ClassVar[bool] = True

    window: int = Field(
        default=32,
        ge=1,
        description="Decode steps before a round whose attention is summed. Decode steps, >= 1; never more than have "
        "passed since the round before.",
    )
    kernel: int = Field(
        default=5,
        ge=1,
        description="Neighbouring candidates over which scores are averaged. Tokens, odd, >= 1; 1 does not pool.",
    )

    @field_validator("kernel")
    @classmethod
    def _has_a_middle(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"which has no middle; use an odd number such as {kernel + 1}")
        return kernel

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def rank(self, candidates: Candidates) -> Tensor:
        """By pooled score."""
        return pooled(candidates.need("score"), candidates.valid, self.kernel, "avg")
