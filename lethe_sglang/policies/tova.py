"""Token omission via attention: only the last step counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    import torch

    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class TovaPolicy(Policy):
    """Keep the tokens that the last query attends to most, ``S_t = A_t``."""

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "arXiv 2401.06104"

    @classmethod
    def from_config(cls, config: EvictionConfig) -> TovaPolicy:
        """No option of its own."""
        return cls()

    @property
    def accumulation(self) -> Accumulation:
        """The last step only (gamma 0)."""
        return Accumulation(0.0)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score."""
        return candidates.need("score")
