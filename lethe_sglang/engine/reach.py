"""Whether eviction can ever act: the length at which a request is first evicted from, and how long requests get."""

from __future__ import annotations

import logging
from typing import NamedTuple

from lethe_sglang.cache.layout import first_round, page_ceil
from lethe_sglang.engine.runtime import Runtime

logger = logging.getLogger("lethe_sglang")


class Reach(NamedTuple):
    """How far a server's configuration and its requests reach, under the server's own budget.

    Attributes
    ----------
    first_round
        Least length at which something of a request may be evicted (tokens).
    longest
        Most tokens that SGLang lets a request have: its context and the pool limit it.
    """

    first_round: int
    longest: int

    @property
    def acts(self) -> bool:
        """Whether a request can get so long; its last token is never written."""
        return self.first_round < self.longest


def reach(runtime: Runtime) -> Reach:
    """Return how far a server reaches now."""
    config = runtime.config
    interval = 1 if config.rounds.by_pressure else config.rounds.interval
    prompt = 1 if config.retain.prompt == "keep" else 0
    first = first_round(runtime.budgets, config.recent, interval, runtime.page_size, prompt)
    return Reach(first, min(runtime.context_length or runtime.pool.size, runtime.pool.size) - 2)


def warn(runtime: Runtime) -> None:
    """Say so, on one rank, if nothing will ever be evicted though it was asked for."""
    found, config = reach(runtime), runtime.config
    if found.acts or runtime.measures or runtime.ranks.rank:
        return
    by_interval = not config.rounds.by_pressure and page_ceil(config.rounds.interval, runtime.page_size) > min(
        runtime.budgets
    )
    option, value = (
        ("rounds.interval", config.rounds.interval) if by_interval else ("budget.tokens", config.budget.tokens)
    )
    logger.warning(
        "KV eviction: nothing will be evicted under the server's own budget: with %s %d a request is first evicted "
        "from at %d tokens, and none gets longer than %d (context %s, pool %d tokens); make %s smaller",
        option,
        value,
        found.first_round,
        found.longest,
        runtime.context_length,
        runtime.pool.size,
        option,
    )
