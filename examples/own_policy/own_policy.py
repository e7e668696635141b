"""A policy of one's own, in a distribution of its own, registered by an entry point: every n-th position."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lethe_sglang.policies import Candidates, Policy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StridePolicy(Policy):
    """Keep every n-th position, the latest of them first, then the latest of the others."""

    source: ClassVar[str] = "an example"
    uses_position: ClassVar[bool] = True

    every: int = Field(default=2, ge=1, description="Distance of the positions that are kept. Tokens, >= 1.")

    @property
    def accumulation(self) -> None:
        """Attention is not looked at."""
        return None

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By position, multiples of ``every`` before all others."""
        position = candidates.need("position").float()
        return position + 1e6 * (position % self.every == 0)
