"""The page over every record of every part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe_bench.gpu.base import Part
from lethe_bench.gpu.bench import Bench
from lethe_bench.gpu.greedy import Greedy
from lethe_bench.gpu.kernels import Kernels
from lethe_bench.gpu.trace import Trace
from lethe_sglang.files import read_lines

PARTS: dict[str, Part] = {part.name: part for part in (Kernels(), Bench(), Trace(), Greedy())}
"""The parts that measure, in the order in which they run and are reported."""

NOT_RUN = "Not yet run on a GPU."


def report(folder: Path) -> str:
    """Return the page from the records in a folder."""
    lines = ["# Results on a GPU", "", "Written by `lethe gpu report` from the records beside it.", ""]
    for name, part in PARTS.items():
        lines += [f"## {name}", ""]
        found = read_lines(folder / f"{name}.jsonl")
        if not found:
            lines += [NOT_RUN, ""]
            continue
        records = {record["key"]: record for record in found[1:]}
        lines += [*_about(found[0], len(records)), *part.table(records), ""]
    return "\n".join(lines)


def _about(header: dict[str, Any], count: int) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    planned = len(header["planned"])
    state = f" **Unfinished**: {count} of {planned} records." if count < planned else ""
    where = f"{', '.join(header['gpus'])}; {versions}; commit {header['commit']}; {header['date']}.{state}"
    return [where, "", f"    {header['command']}", ""]
