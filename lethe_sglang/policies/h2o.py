"""Heavy-hitter oracle: the undecayed sum of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class H2OPolicy(Policy):
    """Keep the tokens with the largest sum of attention over all steps, ``S_t = S_{t-1} + A_t``."""

    source: ClassVar[str] = "arXiv 2306.14048"

    @property
    def accumulation(self) -> Accumulation:
        """Every step, undecayed."""
        return Accumulation(1.0)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score."""
        return candidates.need("score")
