"""SnapKV run again at every round: the attention of the last few steps, pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.features import pooled

if TYPE_CHECKING:
    import torch

    from lethe_sglang.config import EvictionConfig


@dataclass(frozen=True)
class SnapKVPolicy(Policy):
    """Keep the tokens that the last ``window`` queries attend to most, averaged over neighbours.

    ``S[j] = sum_{i < window} a_{t-i}[j]``, ranked by ``avg_pool(S, kernel)``. The paper does this once, after the
    prefill, and per KV head; here it is done at every round (SnapKV-D in later work) with one kept set per layer.

    Parameters
    ----------
    window
        Observed decode steps.
    kernel
        Pooling width over candidates in ascending position.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "arXiv 2404.14469"

    window: int = 32
    kernel: int = 5

    @classmethod
    def from_config(cls, config: EvictionConfig) -> SnapKVPolicy:
        """Read ``snapkv``."""
        return cls(config.snapkv.window, config.snapkv.kernel)

    @property
    def accumulation(self) -> Accumulation:
        """The last ``window`` steps before a round."""
        return Accumulation(window=self.window)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By pooled score."""
        return pooled(candidates.need("score"), candidates.valid, self.kernel, "avg")
