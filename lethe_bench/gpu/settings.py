"""What part ``greedy`` runs, and which of its passes are compared.

Each server answers the same problems once at each concurrency. Pairs of these passes are compared, reply by reply::

    default      at 1 ---- at 40 ---- at 100      concurrency: 1 against the others
                  |          |          |         graphs, overlap: default against the server without, at each
    no-graphs    at 1      at 40      at 100
    no-overlap   at 1      at 40      at 100      likewise
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from lethe_bench.accuracy.datasets import Item, family_items
from lethe_bench.gpu.base import PORT
from lethe_bench.machine import readable
from lethe_bench.servers import launch_command
from lethe_bench.tasks import TRAINED

MODEL = Path("models", "reasoner")
"""The bundled model, in a checkout."""

EACH, LENGTHS, LONGEST = 20, (200, 400), 440
"""Problems of each trained family, tokens of their reference chains of thought, tokens of the longest reply."""

MODES = {"deterministic": ("--enable-deterministic-inference",), "ordinary": ()}
VARIANTS = {"default": (), "no-graphs": ("--disable-cuda-graph",), "no-overlap": ("--disable-overlap-schedule",)}
CONCURRENCIES = (100, 40, 1)
STOCK = {"lethe-flashinfer": "stock-flashinfer", "lethe-triton": "stock-triton"}
"""Lethe's arms, and stock on the same backend: those of the mode's backends that lethe offers."""

COMMON = (
    "--dtype",
    "bfloat16",
    "--max-total-tokens",
    "65536",
    "--max-running-requests",
    "128",
    "--chunked-prefill-size",
    "8192",
    "--decode-log-interval",
    "10",
)
"""Nothing is retracted from such a pool. Chunks under 4,096 tokens, the default on small GPUs, are refused by the
deterministic mode on FlashInfer."""

EVICTION = {
    "budget": {"tokens": 80},
    "rounds": {"interval": 20},
    "lethe": {"half_life": 64},
    "retain": {"sinks": 4, "own_sinks": 4, "recent_ratio": 0.5},
}
"""As in ``configs/eval/reasoner.yaml``; the first round comes after some 80 tokens, then one every 20."""


class Setting(NamedTuple):
    """What a server runs: a key of ``MODES``, policy and backend, a key of ``VARIANTS``."""

    mode: str
    arm: str
    variant: str = "default"

    @property
    def evicts(self) -> bool:
        """Whether it is one of lethe's."""
        return self.arm in STOCK

    @property
    def name(self) -> str:
        """All three."""
        return f"{self.mode} {self.arm} {self.variant}"

    def command(self) -> list[str]:
        """Command line of the server."""
        policy, backend = self.arm.split("-")
        own = [*COMMON, "--attention-backend", backend, *MODES[self.mode], *VARIANTS[self.variant]]
        if self.evicts:
            own += ["--kv-evict", policy, "--kv-evict-config", json.dumps(EVICTION)]
        return launch_command(str(MODEL), PORT, *own)

    def readable(self) -> str:
        """Return the command line without the paths of this machine."""
        return shlex.join(readable(self.command(), str(MODEL)))


def settings() -> list[Setting]:
    """Return the servers: lethe on both backends in deterministic mode, then outside it beside stock, then stock."""
    order = [("deterministic", arm) for arm in STOCK]
    order += [("ordinary", arm) for both in STOCK.items() for arm in both]
    order += [("deterministic", arm) for arm in STOCK.values()]
    return [Setting(mode, arm, variant) for mode, arm in order for variant in VARIANTS]


def problems() -> list[Item]:
    """Return what is asked: the same problems in the same order on every server."""
    return [item for family in TRAINED for item in family_items(family, "test", EACH, LENGTHS)]


class Pair(NamedTuple):
    """Two passes whose replies should be equal, each by its server and concurrency."""

    label: str
    one: tuple[Setting, int]
    other: tuple[Setting, int]


class Comparison(NamedTuple):
    """How many replies of a pair differ, of how many."""

    pair: Pair
    differ: int
    of: int


def pairs(mode: str, arm: str) -> list[Pair]:
    """Return the pairs of an arm's passes that are compared; if all of them are equal, all passes are."""
    default, (alone, *more) = Setting(mode, arm), sorted(CONCURRENCIES)
    found = []
    for kind, variant in (("graphs", "no-graphs"), ("overlap", "no-overlap")):
        other = Setting(mode, arm, variant)
        found += [Pair(f"with and without {kind}, at {n}", (default, n), (other, n)) for n in (alone, *more)]
    return found + [Pair(f"at {alone} and at {n}", (default, alone), (default, n)) for n in more]


def compare(records: dict[str, Any], mode: str, arm: str) -> list[Comparison]:
    """Return the comparisons of an arm of which both servers were measured.

    Raises
    ------
    ValueError
        If two passes have different numbers of replies.
    """
    found = []
    for pair in pairs(mode, arm):
        both = [(records.get(setting.name, {}), n) for setting, n in (pair.one, pair.other)]
        if all(record.get("status") == "measured" for record, _ in both):
            replies = list(zip(*(record["passes"][str(n)]["replies"] for record, n in both), strict=True))
            found.append(Comparison(pair, sum(one != other for one, other in replies), len(replies)))
    return found
