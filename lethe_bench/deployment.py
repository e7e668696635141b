"""What a deployment holds, worked out before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lethe_sglang.cache.layout import first_round
from lethe_sglang.config import ConfigError, EvictionConfig

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model on a memory, and the requests it shall serve.

    Attributes
    ----------
    layers, kv_heads, head_dim
        Attention layers; KV heads of one rank; width of a head.
    element_bytes
        Bytes of one number in the KV cache.
    state_bytes
        Bytes of the policy's states per cell.
    pool_bytes
        Memory of the KV cache, per rank.
    config
        The eviction configuration.
    context, prompt
        Tokens of a request at its end, and those of them that are prompt and never evicted.
    page_size
        Tokens.
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    state_bytes: int
    pool_bytes: int
    config: EvictionConfig
    context: int
    prompt: int = 0
    page_size: int = 1

    @property
    def stock_token_bytes(self) -> int:
        """Bytes of one token's block in stock SGLang, per rank."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one block with the policy's states, per rank."""
        return self.stock_token_bytes + self.layers * self.state_bytes

    @property
    def stock_blocks(self) -> int:
        """Blocks of the pool in stock SGLang."""
        return self.pool_bytes // self.stock_token_bytes

    @property
    def blocks(self) -> int:
        """Blocks of the pool with eviction."""
        return self.pool_bytes // self.token_bytes

    @property
    def overhead(self) -> int:
        """Most own blocks of a request above its budget: the interval, in whole pages, and two pages."""
        return -(-self.config.rounds.interval // self.page_size) * self.page_size + 2 * self.page_size

    @property
    def request_blocks(self) -> int:
        """Most blocks a request holds while it decodes."""
        return self.prompt + min(self.context - self.prompt, self.config.budget.tokens + self.overhead)

    @property
    def first_round(self) -> int:
        """Least length at which something of a request of this prompt may be evicted (tokens)."""
        interval = 1 if self.config.rounds.by_pressure else self.config.rounds.interval
        return first_round((self.config.scored,), self.config.recent, interval, self.page_size, self.prompt)

    @property
    def stock_requests(self) -> int:
        """Requests that fit at full length in stock SGLang."""
        return self.stock_blocks // self.context

    @property
    def requests(self) -> int:
        """Requests that fit with eviction."""
        return self.blocks // self.request_blocks

    @property
    def full_requests(self) -> int:
        """Requests that fit at full length with eviction: as many run under pressure before anything is evicted."""
        return self.blocks // self.context

    def share_for(self, concurrency: int) -> int | None:
        """Return what each of ``concurrency`` requests keeps under pressure right after an event, in tokens.

        An event leaves room for an interval of every request; the share is never below the budget. None means that
        they fit at full length.
        """
        if concurrency <= self.full_requests:
            return None
        interval = self.overhead - 2 * self.page_size
        return max(self.blocks // concurrency - self.prompt - interval, self.config.budget.tokens)

    def budget_for(self, concurrency: int) -> int:
        """Return the largest budget with which ``concurrency`` requests fit, in tokens.

        Raises
        ------
        ConfigError
            If none is legal; the message says how many requests fit with the smallest one.
        """
        smallest = math.ceil(self.config.floor / (1 - Fraction(repr(self.config.retain.recent_ratio))))
        budget = self.blocks // concurrency - self.prompt - self.overhead
        if budget < smallest:
            most = self.blocks // (self.prompt + smallest + self.overhead)
            raise ConfigError(
                f"--concurrency {concurrency}: needs a budget below {smallest} tokens, the smallest one with these "
                f"retain.sinks and recent window; at most {most} requests fit"
            )
        return min(budget, self.context - self.prompt)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises
        ------
        ConfigError
            One line that names the option.
        """
        if self.prompt >= self.context:
            raise ConfigError(f"--prompt {self.prompt}: not below --context {self.context}; give fewer tokens")
        if self.pool_bytes < self.token_bytes * self.request_blocks:
            left, needed = max(self.pool_bytes, 0) / GIB, self.token_bytes * self.request_blocks / GIB
            raise ConfigError(
                f"--gpu-mem: leaves {left:.2f} GiB for the KV cache, one request needs {needed:.2f} GiB; "
                "give more memory, a larger --tp or --mem-fraction"
            )
