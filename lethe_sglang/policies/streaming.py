"""Sinks and the most recent tokens, whatever the attention says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lethe_sglang.policies.base import Candidates, Policy

if TYPE_CHECKING:
    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """StreamingLLM: the later a token, the better."""

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "arXiv 2309.17453"
    uses_position: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: EvictionConfig) -> StreamingPolicy:
        """No option of its own."""
        return cls()

    @property
    def accumulation(self) -> None:
        """Attention is not looked at."""
        return None

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By position."""
        return candidates.need("position").to(torch.float32)
