"""What a part of the suite is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from gpu_suite.results import Results


class Scope(NamedTuple):
    """How much of a part is asked for.

    Attributes
    ----------
    models
        Keys of ``models.MODELS``.
    repeats
        Measurements of each server run.
    folder
        Where the files of models without weights are written.
    """

    models: tuple[str, ...]
    repeats: int
    folder: Path


class Job(NamedTuple):
    """One result file of a part.

    Attributes
    ----------
    keys
        Keys of its records, in order.
    work
        Measures what the file lacks, until the deadline (seconds of ``time.monotonic``).
    model
        The model that it is about, if it is about one of the scope.
    """

    keys: list[str]
    work: Callable[[Results, float], None]
    model: str | None = None


class Part(ABC):
    """One part: what it would run, what it runs, and its table in the report."""

    name: ClassVar[str]
    needs_sglang: ClassVar[bool] = False

    @abstractmethod
    def listing(self, scope: Scope) -> Iterator[str]:
        """Yield exactly what would run, one line each."""
        ...

    @abstractmethod
    def jobs(self, scope: Scope) -> Iterator[Job]:
        """Yield its result files."""
        ...

    @abstractmethod
    def table(self, records: dict[str, Any]) -> list[str]:
        """Return the lines of one file's records in Markdown."""
        ...
