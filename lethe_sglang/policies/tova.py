"""Token omission via attention: only the last step counts."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, ByScore


@dataclass(frozen=True)
class TovaPolicy(ByScore):
    """Keep the tokens that the last query attends to most, ``S_t = A_t``."""

    source: ClassVar[str] = "arXiv 2401.06104"

    @property
    def accumulation(self) -> Accumulation:
        """The last step only (gamma 0)."""
        return Accumulation(0.0)
