"""Token omission via attention: only the last step counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TovaPolicy(Policy):
    """Keep the tokens that the last query attends to most, ``S_t = A_t``."""

    source: ClassVar[str] = "arXiv 2401.06104"

    @property
    def accumulation(self) -> Accumulation:
        """The last step only (gamma 0)."""
        return Accumulation(0.0)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score."""
        return candidates.need("score")
