"""Part ``greedy``: how many greedy replies differ without CUDA graphs, without overlap, and at other concurrencies.

The bundled reasoner answers. In SGLang's deterministic mode a reply may depend on none of these (on FlashInfer the mode
switches the prefix cache off, so prompts are private then). Outside it stock's replies differ, too, so lethe is set
against stock on the same backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from gpu_suite.base import Job, Part, Scope
from gpu_suite.replies import Asked, ask_all, joined, questions
from gpu_suite.results import Results, say
from gpu_suite.settings import CONCURRENCIES, MODES, PORT, STOCK, Setting, compare, pairs, problems, settings
from gpu_suite.slots import LEAST_SECONDS, OutOfTime, alarm, failure, in_a_cell, unfinished, with_server

if TYPE_CHECKING:
    from lethe_sglang.evaluation.servers import Server

PIECE = 25
"""Replies after which a pass at concurrency 1 is on disk: it is the one that may take longer than is left."""


class Greedy(Part):
    """Every pass of every server."""

    name: ClassVar[str] = "greedy"
    needs_sglang: ClassVar[bool] = True

    def listing(self, scope: Scope) -> Iterator[str]:
        """See the base class."""
        count, passes = len(problems()), ", ".join(map(str, CONCURRENCIES))
        for setting in settings():
            yield f"greedy {setting.name} at {passes}, {count} replies each: {setting.readable()}"

    def jobs(self, scope: Scope) -> Iterator[Job]:
        """See the base class."""
        yield Job([setting.key(n) for setting in settings() for n in CONCURRENCIES], run)

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        arms = (*STOCK, *STOCK.values())
        rows = [f"| replies that differ | {' | '.join(arms)} |", f"| --- |{' ---: |' * len(arms)}"]
        for mode in MODES:
            found = {(arm, c.pair.label): f"{c.differ} of {c.of}" for arm in arms for c in compare(records, mode, arm)}
            for pair in pairs(mode, arms[0]):
                cells = " | ".join(found.get((arm, pair.label), "-") for arm in arms)
                rows.append(f"| {mode}: {pair.label} | {cells} |")
        rows += [
            "",
            "| pass | replies | right | tokens a reply | requests at once, at most | requests retracted | "
            "rounds | seconds |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | | | |")
                continue
            count = len(r["replies"].split())
            numbers = f"{r['tokens'] / count:.0f} | {r['running_peak']} | {r['retracted_requests']} | {r['rounds']}"
            rows.append(f"| {key} | {count} | {r['right']} | {numbers} | {r['seconds']:.1f} |")
        return rows


def run(results: Results, deadline: float) -> None:
    """Start every server of which a pass is not recorded in full, as long as there is time."""
    if not results.todo():
        return
    seconds, asked = deadline - time.monotonic(), questions()
    for setting in settings():
        left = [n for n in CONCURRENCIES if setting.key(n) in results.todo()]
        if not left:
            continue
        if deadline - time.monotonic() < (LEAST_SECONDS if results.added else 1):
            return
        try:
            serve(setting, left, asked, results, deadline)
        except OutOfTime:
            key = results.todo()[0]
            if not results.added:  # it had the whole slot
                results.add(key, unfinished(seconds))
            say(f"{key}: not done in the time that was left")
            return


def serve(
    setting: Setting, concurrencies: Sequence[int], asked: Sequence[Asked], results: Results, deadline: float
) -> None:
    """Start one server and record what is left of its passes at some concurrencies; what fails is recorded, too.

    Raises
    ------
    OutOfTime
        At the deadline (seconds of ``time.monotonic``); what came before it is recorded.
    """
    about = {"command": setting.readable()}

    def answer(server: Server) -> None:
        for n in concurrencies:
            key, piece = setting.key(n), PIECE if n == 1 else len(asked)
            while key in results.todo():
                old = results.records.get(key, {})
                done = len(old.get("replies", "").split())
                with alarm(deadline - time.monotonic()):
                    found = ask_all(server, setting.evicts, n, asked[done : done + piece])
                results.add(key, about | joined(old, found, len(asked)))
                say(f"{key}: {found['right']} of the next {len(asked[done : done + piece])} replies are right")

    if (reason := with_server(setting.command(), PORT, deadline, answer)) is None:
        return
    for key in map(setting.key, concurrencies):
        if key in results.todo():
            results.add(key, about | failure(reason))
            say(f"{key}: {results.records[key]['message']}")
