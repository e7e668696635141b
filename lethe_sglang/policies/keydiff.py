"""KeyDiff: keys unlike the mean key, whatever the attention says."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from lethe_sglang.policies.base import Candidates, Tensor, Unscored


@dataclass(frozen=True)
class KeyDiffPolicy(Unscored):
    """Evict the keys most similar to the mean normalised key: rank by ``-cos(k_j, mean_i k_i / |k_i|)``.

    The anchor is the mean over a layer's candidates. The paper works per KV head; here the cosine is averaged over
    heads, with one kept set per layer.
    """

    source: ClassVar[str] = "arXiv 2504.15364"
    uses_keys: ClassVar[bool] = True

    def rank(self, candidates: Candidates) -> Tensor:
        """By difference from the mean key."""
        return -candidates.need("feature")
