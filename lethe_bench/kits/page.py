"""What two servers did with SGLang's kits, as a page."""

from __future__ import annotations

import json
from typing import Any

from lethe_bench.kits.run import TOGETHER, Outcome
from lethe_bench.kits.table import ARMS, CONFIG, KITS, NOT_RUN, SHARED, Kit


def verdict(kit: Kit, test: str, stock: Outcome | None, evicting: Outcome | None) -> tuple[str, str]:
    """Return what to call two outcomes of a test, and why."""
    if stock is None or evicting is None:
        return "not compared", ""
    if bool(stock["error"]) == bool(evicting["error"]):
        return ("equal", "") if not stock["error"] else ("fails in both", stock["error"])
    if test in kit.by_design:
        return "by design", kit.by_design[test]
    return ("passes only with eviction", stock["error"]) if stock["error"] else ("FAULT", evicting["error"])


def compared(found: dict[str, Any], name: str) -> dict[str, tuple[Outcome | None, Outcome | None]]:
    """Return the tests of a kit that ran on any arm, with the outcomes of :data:`ARMS` in order."""
    stock, evicting = (found["kits"].get(name, {}).get(arm, {}) for arm in ARMS)
    return {test: (stock.get(test), evicting.get(test)) for test in {**stock, **evicting}}


def page(found: dict[str, Any]) -> str:
    """Return the page of what was found: ``kits`` (each with its ``model`` and arms), ``machine``, ``versions``."""
    rows, counts, adapted, missing = [], dict[str, int](), [], []
    for name, kit in KITS.items():
        tests = compared(found, name)
        if not tests or any(None in pair for pair in tests.values()):
            missing.append(f"`{name}`")
        if kit.adapted and tests:
            adapted.append(f"- `{name}`: {kit.adapted}.")
        for test, (stock, evicting) in tests.items():
            word, why = verdict(kit, test, stock, evicting)
            counts[word] = counts.get(word, 0) + 1
            cells = [_cell(outcome) for outcome in (stock, evicting)]
            rounds, model = (evicting or {}).get("rounds", ""), found["kits"][name]["model"].rpartition("/")[2]
            words = [f"`{name}`", f"`{test.removeprefix('test_')}`", model, *cells, f"{rounds}", word, why]
            rows.append(f"| {' | '.join(words)} |".replace("|  |", "| |"))
    total = ", ".join(f"{number} {word}" for word, number in sorted(counts.items(), key=lambda item: -item[1]))
    cpu, sglang = found.get("machine", {}).get("cpu"), found.get("versions", {}).get("sglang")
    lines = [
        "# SGLang's own test kits",
        "",
        "SGLang ships tests of a running server (`sglang.test.kits`). `python scripts/kits.py` runs each against stock",
        "SGLang and a server that evicts. A small model fails some of them without us: the comparison is the point.",
        "",
    ]
    if rows:
        lines += [
            f"Written by `python scripts/kits.py`, on {cpu} (no GPU), SGLang {sglang}.",
            f"Both servers have `{' '.join(SHARED)}`",
            f"and SGLang's strict memory checks; the evicting one `{json.dumps(CONFIG)}`,",
            "so that rounds come even in short answers. `rounds` is how many the server had while the test ran, of all",
            f"its requests: up to {TOGETHER} tests run at once, none beside one that flushes, pauses or aborts.",
            "",
            f"**{len(rows)} tests: {total}.**",
            "",
            "| kit | test | model | stock | evicting | rounds | verdict | why |",
            "| --- | --- | --- | --- | --- | ---: | --- | --- |",
            *rows,
            "",
        ]
    if missing:
        lines += [f"**Not yet run:** {', '.join(missing)}.", ""]
    if adapted:
        lines += ["Where a kit was made smaller, or its data would have been a download:", "", *adapted, ""]
    lines += ["## Kits that cannot run here", "", "| kit | why |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {why} |" for name, why in NOT_RUN.items()), ""])


def _cell(found: Outcome | None) -> str:
    return "-" if found is None else "fails" if found["error"] else "passes"
