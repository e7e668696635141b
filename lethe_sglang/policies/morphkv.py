"""MorphKV: the attention of the most recent queries, summed or at its largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lethe_sglang.policies.base import Accumulation, Candidates, Policy

if TYPE_CHECKING:
    import torch

    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class MorphKVPolicy(Policy):
    """Keep the tokens that the last ``window`` queries attend to, fused by ``sum`` or ``max``.

    ``S[j] = sum_i a_{t-i}[j]`` or ``max_i a_{t-i}[j]``. The paper evicts at every step and per KV head; here at every
    round, with one kept set per layer.

    Parameters
    ----------
    window
        Observed decode steps.
    fusion
        ``sum`` or ``max``.
    """

    name: ClassVar[str] = "morphkv"
    source: ClassVar[str] = "arXiv 2503.00979"

    window: int = 32
    fusion: Literal["sum", "max"] = "sum"

    @classmethod
    def from_config(cls, config: EvictionConfig) -> MorphKVPolicy:
        """Read ``morphkv``."""
        return cls(config.morphkv.window, config.morphkv.fusion)

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window, rule=self.fusion)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By score."""
        return candidates.need("score")
