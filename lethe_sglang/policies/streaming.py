"""Sinks and the most recent tokens, whatever the attention says."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Candidates, Tensor, Unscored


@dataclass(frozen=True)
class StreamingPolicy(Unscored):
    """StreamingLLM: the later a token, the better."""

    source: ClassVar[str] = "arXiv 2309.17453"
    uses_position: ClassVar[bool] = True

    def rank(self, candidates: Candidates) -> Tensor:
        """By position."""
        return candidates.need("position").float()
