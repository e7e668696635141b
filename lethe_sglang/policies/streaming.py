"""Sinks and the most recent tokens, whatever the attention says."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Candidates, Policy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """StreamingLLM: the later a token, the better."""

    source: ClassVar[str] = "arXiv 2309.17453"
    uses_position: ClassVar[bool] = True

    @property
    def accumulation(self) -> None:
        """Attention is not looked at."""
        return None

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By position."""
        return candidates.need("position").float()
