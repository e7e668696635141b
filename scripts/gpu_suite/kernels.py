"""Part ``kernels``: the kernels' tests on the device, each file in a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gpu_suite.base import Job, Part, Scope
from gpu_suite.results import ROOT, Results, say
from gpu_suite.slots import unfinished


class Kernels(Part):
    """``tests/kernels`` with the kernels compiled for the device."""

    name: ClassVar[str] = "kernels"

    def listing(self, scope: Scope) -> Iterator[str]:
        """See the base class."""
        yield from (shlex.join(test_command(file)) for file in test_files())

    def jobs(self, scope: Scope) -> Iterator[Job]:
        """See the base class."""
        yield Job(test_files(), run)

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = ["| tests | state | run | failed |", "| --- | --- | ---: | --- |"]
        for key, r in records.items():
            failed = ", ".join(r.get("failed", [])) or "-"
            rows.append(f"| {key} | {r['status']} | {r.get('tests', '-')} | {failed} |")
        return rows


def test_files() -> list[str]:
    """Test files of the kernels."""
    return sorted(f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py"))


def test_command(file: str) -> list[str]:
    """Return the command line of one file's tests."""
    return ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]


def run(results: Results, deadline: float) -> None:
    """Run each file of tests that has no record yet."""
    for number, file in enumerate(results.todo()):
        left = deadline - time.monotonic()
        if left < 1:
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "junit.xml"
            command = [sys.executable, *test_command(file)[1:], f"--junitxml={report}"]
            try:
                done = subprocess.run(command, cwd=ROOT, timeout=left, capture_output=True, text=True, check=False)
            except subprocess.TimeoutExpired:
                say(f"{file}: not done in {left:.0f} s")
                if number == 0:  # it had the whole slot; those behind it have theirs in the next call
                    results.add(file, unfinished(left))
                return
            results.add(file, junit_record(report, done.returncode, done.stdout))
        say(f"{file}: {results.records[file]}")


def junit_record(report: Path, status: int, output: str) -> dict[str, Any]:
    """Count the tests of a JUnit file and name those that failed; without the file, quote the output's end."""
    if not report.is_file():
        return {"status": "failed", "message": "\n".join(output.strip().splitlines()[-5:])}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    cases = [case for s in suites for case in s.iter("testcase")]
    bad = [case.get("name") for case in cases if {"failure", "error"} & {outcome.tag for outcome in case}]
    passed = status == 0 and not bad and counts["tests"] > counts["skipped"]
    return {"status": "passed" if passed else "failed", **counts, "failed": bad}
