"""MorphKV: the attention of the most recent queries, summed or at its largest."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, ByScore


@dataclass(frozen=True)
class MorphKVPolicy(ByScore):
    """Keep the tokens that the last ``window`` queries attend to, fused by ``sum`` or ``max``.

    ``S[j] = sum_i a_{t-i}[j]`` or ``max_i a_{t-i}[j]``. The paper evicts at every step and per KV head; here at every
    round, with one kept set per layer.
    """

    source: ClassVar[str] = "arXiv 2503.00979"

    window: int = Field(
        default=32, ge=1, description="Decode steps before a round whose attention counts. Decode steps, >= 1."
    )
    fusion: Literal["sum", "max"] = Field(
        default="sum", description="How the steps of the window are combined. sum, or max (one strong use is enough)."
    )

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window, rule=self.fusion)
