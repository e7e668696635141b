"""The page: goals, then every record of every part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_suite.base import Part
from gpu_suite.goals import GOALS, NOT_RUN
from gpu_suite.greedy import Greedy
from gpu_suite.kernels import Kernels
from gpu_suite.micro import Micro
from gpu_suite.server import Server
from gpu_suite.trace import Trace

PARTS: dict[str, Part] = {part.name: part for part in (Kernels(), Micro(), Server(), Trace(), Greedy())}
"""The parts that measure, in the order in which they run and are reported."""


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the parts' JSON files.

    Returns
    -------
    tuple
        Records of each part by name, those of ``micro`` by model; and the files as they are.
    """
    records: dict[str, Any] = {name: {} for name in PARTS}
    files = []
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        files.append(body)
        records[body["part"]] |= {body["model"]: body["records"]} if body["part"] == "micro" else body["records"]
    return records, files


def report(folder: Path) -> str:
    """Return the page from the JSON files of a folder."""
    records, files = load(folder)
    lines = ["# Results on a GPU", "", "Written by `bash scripts/gpu_suite.sh report` from the JSON beside it.", ""]
    lines += ["| goal | state |", "| --- | --- |", *(f"| {goal.text} | {goal.mark(records)} |" for goal in GOALS), ""]
    lines += [
        "A copy of the same bytes, as slow to start as any kernel, is what bandwidths are set against; the share "
        "of a large copy's speed stands beside it. Times are medians, in brackets the deciles.",
        "",
    ]
    for name, part in PARTS.items():
        found = [file for file in files if file["part"] == name]
        lines += [f"## {name}", ""] + ([] if found else [f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}.", ""])
        for file in found:
            lines += [*_about(file), *part.table(file["records"]), ""]
    return "\n".join(lines)


def _about(file: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
    state = "" if file["finished"] else f" **Unfinished**: {len(file['records'])} of {len(file['planned'])} records."
    where = f"{', '.join(file['gpus'])}; {versions}; commit {file['commit']}; {file['date']}.{state}"
    return [where, "", f"    {file['command']}", ""]
