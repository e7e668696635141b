"""What a part of the suite is, and how its records come about."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lethe_bench.gpu.results import Results
from lethe_bench.servers import READY_SECONDS, Server, ServerError, explained
from lethe_sglang.processes import ending_on_signals

OUT = Path("out", "gpu")
"""Where results go unless another folder is named, and always what only this machine needs: models, traces."""

PORT = 31000


class Part(ABC):
    """One part: what it would run, what it measures, and its table in the report."""

    name: ClassVar[str]

    @abstractmethod
    def listing(self, model: str | None = None) -> dict[str, str]:
        """Return what would run: key of a record -> the command line, or what is measured; ``model`` picks one."""
        ...

    @abstractmethod
    def measure(self, key: str) -> dict[str, Any]:
        """Measure one record, which says by its ``status`` how it went.

        Raises
        ------
        ServerError
            If a server failed or refused; that becomes a record, too.
        ConfigError
            If nothing more can be measured here.
        """
        ...

    @abstractmethod
    def table(self, records: dict[str, Any]) -> list[str]:
        """Return the lines of the records in Markdown."""
        ...

    def work(self, results: Results, model: str | None = None) -> None:
        """Measure every record that is not there yet; each is on disk before the next is begun."""
        for key, runs in self.listing(model).items():
            if key in results.records:
                continue
            try:
                record = self.measure(key)
            except ServerError as error:
                record = failure(str(error))
            results.add(key, {"runs": runs, **record})


@contextlib.contextmanager
def serving(command: Sequence[str], port: int = PORT, ready_within: float = READY_SECONDS) -> Iterator[Server]:
    """Run a server for the block; whatever goes wrong with it is a :class:`ServerError` that says why."""
    with tempfile.TemporaryDirectory() as folder, ending_on_signals():
        server = Server(command, port, Path(folder) / "server.log")
        server.ready_within = ready_within
        with explained(server), server:
            yield server


def rounds_of(server: Server, evicts: bool) -> int:
    """Return how many rounds a server has run, 0 for stock.

    Raises
    ------
    ServerError
        If it evicts and should not, or should and does not.
    """
    state = server.get("/server_info")["internal_states"][0].get("lethe")
    if (state is not None) != evicts:
        raise ServerError(f"the server {'does not report eviction' if evicts else 'evicts'}")
    return int(state["rounds"]) if evicts else 0


def failure(message: str) -> dict[str, Any]:
    """Return the record of what failed; a refusal by the plugin is told from other failures."""
    for line in message.splitlines():
        for sign in ("lethe: error: ", "ConfigError: "):
            if sign in line:
                return {"status": "refused", "message": line.partition(sign)[2].strip()}
    return {"status": "failed", "message": "\n".join(message.splitlines()[-5:])}


def in_a_cell(record: dict[str, Any]) -> str:
    """Say in a cell of a table what became of a run that was not measured."""
    message = str(record["message"]).replace("\n", " ").replace("|", "/")
    return f"{record['status']}: {message}"
