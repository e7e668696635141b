"""The results directory of an experiment: what is in it, what may be added, and what a killed run leaves behind.

::

    DIR/config.yaml              the experiment as resolved, and every run of it: command, machine, versions, servers
    DIR/server.yaml              what the evicting server was started with
    DIR/generations/ARM.jsonl    one line per (problem, sample), written whole or not at all
    DIR/traces.jsonl             which tokens survived each round, for a few problems (``trace``)
    DIR/logs/                    the servers' logs of the last run
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lethe_bench.accuracy.datasets import math_verifier
from lethe_bench.accuracy.experiment import Experiment
from lethe_bench.accuracy.loading import differences, parse
from lethe_bench.machine import machine, versions
from lethe_sglang.config import ConfigError
from lethe_sglang.files import Journal, write_atomically


class Store:
    """A results directory.

    Parameters
    ----------
    directory
        Need not exist before :meth:`begin`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.traces = directory / "traces.jsonl"

    def config(self) -> dict[str, Any]:
        """Return what ``config.yaml`` holds: ``experiment`` and ``runs``.

        Raises
        ------
        ConfigError
            If the directory holds no results.
        """
        try:
            data = yaml.safe_load((self.directory / "config.yaml").read_text(encoding="utf-8"))
            return {"experiment": dict(data["experiment"]), "runs": list(data["runs"])}
        except FileNotFoundError:
            raise ConfigError(f"{self.directory}: no results there; give a directory made by lethe eval run") from None
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.directory}/config.yaml: cannot be read: {error!r}") from None

    def experiment(self) -> Experiment:
        """Return the experiment whose results these are."""
        return parse(self.config()["experiment"], f"{self.directory}/config.yaml")

    def begin(self, experiment: Experiment, command: str) -> None:
        """Make the directory, or check that its results can be continued, and note a new run.

        Raises
        ------
        ConfigError
            If it holds results of another experiment; the message says what differs.
        """
        runs = []
        if (self.directory / "config.yaml").exists():
            runs = self.config()["runs"]
            if different := differences(self.experiment(), experiment):
                raise ConfigError(
                    f"--out {self.directory}: holds results of another configuration ({'; '.join(different)}); "
                    "give another directory, or undo the change"
                )
        (self.directory / "generations").mkdir(parents=True, exist_ok=True)
        (self.directory / "logs").mkdir(exist_ok=True)
        facts = {"machine": machine(), "versions": versions(), "verifier": math_verifier(), "servers": {}}
        runs.append({"command": command, "started": time.strftime("%Y-%m-%d %H:%M"), **facts})
        self._write({"experiment": experiment.model_dump(mode="json"), "runs": runs})

    def note_server(self, kind: str, facts: dict[str, Any]) -> None:
        """Note what a server's defaults came to."""
        data = self.config()
        data["runs"][-1]["servers"][kind] = facts
        self._write(data)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the directory inside the block."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"--out {self.directory}: another run writes there; give another one") from None
            yield

    def generations(self, arm: str) -> Path:
        """Return the file of an arm's replies."""
        return self.directory / "generations" / f"{arm}.jsonl"

    def append(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        """Add lines to a file in one write."""
        Journal(path).add(lines)

    def _write(self, data: dict[str, Any]) -> None:
        text = yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)
        write_atomically(self.directory / "config.yaml", text)
