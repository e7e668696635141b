"""Tensor-parallel ranks: what they exchange, always in rank order, so that every rank computes the same."""

from __future__ import annotations

from typing import Any

import torch


class Ranks:
    """The ranks of a server; all of them call a method at the same time.

    Attributes
    ----------
    size, rank, group
        How many they are, which of them this is, and their process group (None for one).
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Return a tensor of every rank."""
        if self.size == 1:
            return [mine]
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(parts, mine.contiguous(), group=self.group)
        return parts

    def mean(self, mine: torch.Tensor) -> torch.Tensor:
        """Average over ranks."""
        total, *others = self.gather(mine)
        for other in others:
            total = total + other
        return total / self.size
