"""Uniformly random retention: the baseline that every policy has to beat."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Candidates, Tensor, Unscored

_MASK = (1 << 31) - 1


@dataclass(frozen=True)
class RandomPolicy(Unscored):
    """Keep tokens by a hash of layer and position.

    A token's rank never changes, so the kept set is a uniform sample however many rounds there were, and equal on
    every tensor-parallel rank and for every batch composition.
    """

    source: ClassVar[str] = "arXiv 2609.03430"
    uses_position: ClassVar[bool] = True

    def rank(self, candidates: Candidates) -> Tensor:
        """By hash, in [0, 1)."""
        import torch

        position = candidates.need("position").to(torch.int64)
        layer = torch.arange(position.shape[0], device=position.device).view(-1, 1, 1)
        h = (position * 2654435761 + layer * 40503 + 12345) & _MASK
        for _ in range(3):
            h = ((h ^ (h >> 15)) * 739982445 + 1) & _MASK
        return h.to(torch.float32) / float(_MASK)
