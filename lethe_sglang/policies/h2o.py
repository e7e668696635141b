"""Heavy-hitter oracle: the undecayed sum of attention."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, ByScore


@dataclass(frozen=True)
class H2OPolicy(ByScore):
    """Keep the tokens with the largest sum of attention over all steps, ``S_t = S_{t-1} + A_t``."""

    source: ClassVar[str] = "arXiv 2306.14048"

    @property
    def accumulation(self) -> Accumulation:
        """Every step, undecayed."""
        return Accumulation(1.0)
