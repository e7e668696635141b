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
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_suite.results import ROOT

if TYPE_CHECKING:
    from lethe_sglang.evaluation.datasets import Item

MODEL, PORT = ROOT / "models" / "reasoner", 31000
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
    "--log-level",
    "info",
    "--sleep-on-idle",
)
"""Nothing is retracted from such a pool. Chunks under 4,096 tokens, the default on small GPUs, are refused by the
deterministic mode on FlashInfer."""

EVICTION = {
    "budget": {"tokens": 80},
    "rounds": {"interval": 20},
    "rasr": {"half_life": 64},
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

    def key(self, concurrency: int) -> str:
        """Return the key of the record of one pass."""
        return f"{self.name} at {concurrency}"

    def command(self) -> list[str]:
        """Command line of the server."""
        from lethe_sglang.evaluation.servers import HOST

        policy, backend = self.arm.split("-")
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(MODEL), "--host", HOST]
        command += ["--port", str(PORT), *COMMON, "--attention-backend", backend]
        command += [*MODES[self.mode], *VARIANTS[self.variant]]
        return [*command, "--kv-evict", policy, "--kv-evict-config", json.dumps(EVICTION)] if self.evicts else command

    def readable(self) -> str:
        """Return the command line without the paths of this machine."""
        names = {sys.executable: "python", str(MODEL): str(MODEL.relative_to(ROOT))}
        return shlex.join(names.get(word, word) for word in self.command())


def settings() -> list[Setting]:
    """Return the servers, those first that the goals need: stock in deterministic mode is only looked at."""
    order = [("deterministic", arm) for arm in STOCK]
    order += [("ordinary", arm) for both in STOCK.items() for arm in both]
    order += [("deterministic", arm) for arm in STOCK.values()]
    return [Setting(mode, arm, variant) for mode, arm in order for variant in VARIANTS]


def problems() -> list[Item]:
    """Return what is asked: the same problems in the same order on every server."""
    from lethe_sglang.evaluation.datasets import family_items
    from lethe_sglang.evaluation.tasks import TRAINED

    return [item for family in TRAINED for item in family_items(family, "test", EACH, LENGTHS)]


class Pair(NamedTuple):
    """Two passes whose replies should be equal, by their keys; ``kind`` is graphs, overlap or concurrency."""

    kind: str
    label: str
    one: str
    other: str


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
        found += [Pair(kind, f"with and without {kind}, at {n}", default.key(n), other.key(n)) for n in (alone, *more)]
    return found + [Pair("concurrency", f"at {alone} and at {n}", default.key(alone), default.key(n)) for n in more]


def compare(records: dict[str, Any], mode: str, arm: str) -> list[Comparison]:
    """Return the comparisons of an arm of which both passes were measured.

    Raises
    ------
    ValueError
        If two passes have different numbers of replies.
    """
    found = []
    for pair in pairs(mode, arm):
        both = [records.get(key, {}) for key in (pair.one, pair.other)]
        if all(record.get("status") == "measured" for record in both):
            replies = list(zip(*(record["replies"].split() for record in both), strict=True))
            found.append(Comparison(pair, sum(one != other for one, other in replies), len(replies)))
    return found
