"""KeyDiff: keys unlike the mean key, whatever the attention says."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Candidates, Policy
from lethe_sglang.policies.features import likeness

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KeyDiffPolicy(Policy):
    """Evict the keys most similar to the mean normalised key: rank by ``-cos(k_j, mean_i k_i / |k_i|)``.

    The anchor is the mean over a layer's candidates. The paper works per KV head; here the cosine is averaged over
    heads, with one kept set per layer.
    """

    source: ClassVar[str] = "arXiv 2504.15364"
    uses_keys: ClassVar[bool] = True

    @property
    def accumulation(self) -> None:
        """Attention is not looked at."""
        return None

    def key_feature(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Cosine to the mean normalised key."""
        return likeness(keys, valid)

    def rank(self, candidates: Candidates) -> torch.Tensor:
        """By difference from the mean key."""
        return -candidates.need("feature")
