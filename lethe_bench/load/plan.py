"""What a benchmark of load runs: how many requests come at once, and what the pool holds when they come."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from lethe_bench.throughput.plan import Arms
from lethe_sglang.config import ConfigError

LOADS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Sweep(Arms):
    """All knobs of ``lethe load``: so many requests come at once, all alike, to a server with nothing to do.

    Attributes
    ----------
    loads
        How many, one measurement after the other on the same server.
    one_server
        Whether one server takes the configurations of all arms in turn, each repeat the other way round. No start lies
        between two measurements then, so a machine that changes meanwhile disturbs their ratio less.
    """

    legal_arms: ClassVar[tuple[str, ...]] = ("stock", "idle", "always", "pressure")

    arms: tuple[str, ...] = ("stock", "always", "pressure")
    loads: tuple[int, ...] = LOADS
    one_server: bool = False

    @property
    def title(self) -> str:
        """What a page of this plan is headed."""
        return f"{self.config.policy} under load, the same KV pool"

    @property
    def workload(self) -> str:
        """What is asked of each server, in words."""
        where = "a server of its own for each arm and repeat"
        if self.one_server:
            where = "one server, which takes the arms' configurations in turn"
        return (
            f"{', '.join(map(str, self.loads))} requests of {self.input_len} + {self.output_len} tokens at once, one "
            f"load after the other on {where}"
        )

    def check(self) -> None:
        """Refuse a plan whose arms could not serve the workload or would not differ.

        Raises
        ------
        ConfigError
            With one line that names the option and a legal value.
        """
        super().check()
        if self.one_server and "stock" in self.arms:
            legal = ",".join(arm for arm in self.legal_arms if arm != "stock")
            raise ConfigError(f"--one-server: a server of stock takes no configuration; give --arms {legal} or fewer")

    def change(self, arm: str) -> dict[str, Any]:
        """Return what a server of the first arm is told (``POST /kv_evict``) to become another's."""
        known = {name: config.model_dump(mode="json") for name in self.arms if (config := self.arm_config(name))}
        first = known[self.arms[0]]
        varied = [section for section in first if any(config[section] != first[section] for config in known.values())]
        return {section: known[arm][section] for section in varied}

    @property
    def long(self) -> int:
        """Requests that are there when the others come."""
        return 0

    @property
    def arriving(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answer of each request that comes."""
        return self.input_len, self.output_len

    @property
    def moment(self) -> int:
        """Output tokens of the long requests, all together, when the others come."""
        return 0

    def server_command(self, arm: str) -> list[str]:
        """Command line of an arm's server; events of a stream have what is new, not all that came before."""
        return [*super().server_command(arm), "--incremental-streaming-output"]

    def prompts(self, load: int, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return the prompts of the long requests and of those that come (token ids), the same for every arm."""
        draw, long = random.Random(self.seed), [self.input_len] * self.long
        found = [[draw.randrange(2, vocabulary) for _ in range(n)] for n in long + [self.arriving[0]] * load]
        return found[: self.long], found[self.long :]


@dataclass(frozen=True, kw_only=True)
class Burst(Sweep):
    """All knobs of ``lethe burst``: long requests, of ``input_len`` and ``output_len``, and then many short ones.

    Attributes
    ----------
    long_requests, short_requests
        How many run when the short ones come, and how many come, all at once; ``loads`` is not asked for.
    short_input_len, short_output_len
        Tokens of the prompt and of the answer of a short one.
    after
        Output tokens of the long ones, all together, when the short ones come, all at once; None takes what fills the
        pool together with their prompts where nothing is evicted, at most half of the long ones' output.
    """

    long_requests: int = 8
    short_requests: int = 32
    short_input_len: int = 64
    short_output_len: int = 32
    after: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loads", (self.short_requests,))

    @property
    def title(self) -> str:
        """What a page of this plan is headed."""
        return f"A burst of short requests, {self.config.policy} and the same KV pool"

    @property
    def workload(self) -> str:
        """What is asked of each server, in words."""
        return (
            f"{self.long} requests of {self.input_len} + {self.output_len} tokens and, once they have {self.moment} "
            f"output tokens, {self.short_requests} of {self.short_input_len} + {self.short_output_len}, all at once; a "
            "fresh server per measurement"
        )

    @property
    def long(self) -> int:
        """Requests that are there when the others come."""
        return self.long_requests

    @property
    def arriving(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answer of each request that comes."""
        return self.short_input_len, self.short_output_len

    @property
    def moment(self) -> int:
        """Output tokens of the long requests, all together, when the others come."""
        if self.after is not None:
            return self.after
        return max(1, min(self.max_total_tokens - self.long * self.input_len, self.long * self.output_len // 2))

    def check(self) -> None:
        """Refuse a plan whose arms could not serve the workload or would not differ.

        Raises
        ------
        ConfigError
            With one line that names the option and a legal value.
        """
        super().check()
        if self.moment >= (most := self.long * self.output_len):
            raise ConfigError(
                f"--after {self.after}: the {self.long} long requests have {most} output tokens in all; "
                f"give at most {most - 1}"
            )
        if sum(self.arriving) > self.input_len + self.output_len:
            raise ConfigError(
                f"--short-output-len {self.short_output_len}: a short request would be longer than a long one; "
                f"give at most {self.input_len + self.output_len - self.short_input_len}, or a shorter prompt"
            )
