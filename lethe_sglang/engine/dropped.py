"""How much of the attention that candidates have gathered rounds drop: known without waiting for the device.

Scores stay on the device. A launch of rounds sums them there anyway, of all candidates and of those that it keeps; the
sums are copied to the host behind it, and counted by whoever looks once the copy has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Dropped:
    """The share of the score mass that rounds have dropped, a number for each request's round.

    With the score ``S_l[j]`` of candidate j of layer l (``Accumulation``; of this rank's heads) it is ::

        1 - sum_l sum_{j kept} S_l[j] / sum_l sum_j S_l[j]        in [0, 1]

    Policies that gather no attention have none, and a round none of whose candidates was ever scored has none either.

    Attributes
    ----------
    rounds, total
        Rounds that were counted, and the sum of their shares.
    observe
        Called with each share.
    """

    def __init__(self) -> None:
        self.rounds, self.total = 0, 0.0
        self.observe: Callable[[float], None] = lambda share: None
        self._coming: deque[tuple[torch.Tensor, Any]] = deque()

    def add(self, mass: torch.Tensor | None) -> None:
        """Take the sums of a launch.

        Parameters
        ----------
        mass
            float32 ``[L, B, 2]``: of all candidates, and of those that were kept; None is no sums.
        """
        if mass is None:
            return
        if mass.device.type == "cpu":
            self._coming.append((mass, None))
            return
        host = torch.empty(mass.shape, dtype=mass.dtype, pin_memory=True)
        host.copy_(mass, non_blocking=True)
        arrived = torch.get_device_module(mass.device).Event()
        arrived.record()
        self._coming.append((host, arrived))

    def settle(self) -> None:
        """Count what has arrived."""
        while self._coming and (self._coming[0][1] is None or self._coming[0][1].query()):
            self._count(self._coming.popleft()[0])

    def _count(self, mass: torch.Tensor) -> None:
        for before, after in mass.sum(0).tolist():
            if before > 0:
                share = min(max(1 - after / before, 0.0), 1.0)  # sums of floats may be off by a little
                self.rounds += 1
                self.total += share
                self.observe(share)

    @property
    def mean(self) -> float | None:
        """The mean share of a round so far; None before the first."""
        return self.total / self.rounds if self.rounds else None
