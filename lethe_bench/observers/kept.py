"""Which positions every round kept (``debug.record_kept``), and whether ranks agree (``debug.kept_hash``)."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lethe_sglang.observers.base import Observer

if TYPE_CHECKING:
    from lethe_sglang.cache.layout import RoundPlan
    from lethe_sglang.cache.ledger import RequestState
    from lethe_sglang.cache.rounds import RoundResult

logger = logging.getLogger("lethe_sglang")

LOGGED_ROUNDS = 256


class KeptSets(Observer):
    """Reads back the kept positions of every round, which synchronises.

    Parameters
    ----------
    log
        Whether to keep the positions of the last ``LOGGED_ROUNDS`` rounds.
    compare
        Whether to hash them in the log of the server and to stop it where tensor-parallel ranks differ.
    gather
        Returns a tensor of every rank, in rank order.
    """

    def __init__(self, log: bool, compare: bool, gather: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        self.log, self.compare, self.gather = log, compare, gather
        self.launches = 0
        self.hash = hashlib.sha256()
        self.entries: deque[dict[str, Any]] = deque(maxlen=LOGGED_ROUNDS)

    def on_round(self, states: Sequence[RequestState], plans: Sequence[RoundPlan], result: RoundResult) -> None:
        """Hash and log the positions of a launch.

        Raises
        ------
        RuntimeError
            If ranks have kept different positions; on every rank.
        """
        assert result.kept_position is not None
        self.launches += 1
        positions, start = result.kept_position.tolist(), 0
        for state, plan in zip(states, plans, strict=True):
            layers = []
            for k in plan.kept:
                layers.append(sorted(positions[start : start + k]))
                start += k
            self.hash.update(repr((state.rid, plan.new_tail, layers)).encode())
            self.entries.append(
                {
                    "rid": state.rid,
                    "round": state.rounds,
                    "prefix": plan.prefix,
                    "rest": state.rest,
                    "tail": plan.new_tail,
                    "kept": layers,
                }
            )
        if self.compare:
            digest = self.hash.digest()[:8]
            logger.info("KV eviction: kept-set hash %d %s", self.launches, digest.hex())
            self._compare(digest, result.kept_position.device)

    def _compare(self, digest: bytes, device: torch.device) -> None:
        parts = self.gather(torch.tensor(list(digest), dtype=torch.uint8, device=device))
        digests = [bytes(part.tolist()).hex() for part in parts]
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"KV eviction: tensor-parallel ranks kept different tokens in launch {self.launches}: "
                f"hashes {', '.join(digests)} of ranks 0 to {len(digests) - 1}"
            )

    def report(self) -> dict[str, Any]:
        """Return the log under ``kept`` and the hash under ``kept_hash``, as far as they are asked for."""
        found: dict[str, Any] = {"kept": list(self.entries)} if self.log else {}
        return {**found, "kept_hash": self.hash.hexdigest()} if self.compare else found
