"""The fenced blocks of the documentation, and what each says about itself.

Every block of shell or Python in README.md, CONTRIBUTING.md, ``examples/`` and ``docs/`` has a marker, an HTML comment
in the line above it:

    run                 the unit tests run it as it stands, from the root of the checkout, and it must succeed
    server              the engine tests run it against a server that the block marked ``serve`` has started
    serve               installs the built wheels into a fresh environment and starts that server
    gpu, model          needs a GPU, or a model that we do not have: the options it gives are checked, it is not run
    part of FILE        its lines stand in FILE in this order, and a test runs FILE
    tested by FILE      FILE, a test or what CI runs, runs the same command

Blocks without a language are drawings, output and formulas. Pages that ``lethe bench`` and ``lethe eval report`` wrote
record what was run, with the machine and the time it took; they are not looked at.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_BY_PROGRAMS = ("report.md", "bench.md")
MARKERS = ("run", "server", "serve", "gpu", "model", "part of", "tested by")
FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<marker>[^\n]*?) -->[ ]*\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>[\w+-]+)[ ]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = ("bash", "sh", "shell", "console", "python", "py")


class Block(NamedTuple):
    """One fenced block of shell or Python."""

    page: str
    line: int
    marker: str | None
    language: str
    text: str

    @property
    def kind(self) -> str | None:
        """The marker without the file that it names."""
        return next((kind for kind in MARKERS if re.fullmatch(rf"{kind}( [\w./-]+)?", self.marker or "")), None)

    @property
    def file(self) -> Path:
        """The file that the marker names."""
        return ROOT / str(self.marker).rpartition(" ")[2]

    @property
    def name(self) -> str:
        """What a test is called by."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The pages that people write."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.md"))]
    return [*found, *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in WRITTEN_BY_PROGRAMS)]


def blocks(*kinds: str) -> list[Block]:
    """All blocks, or those of some kinds of marker."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"] in LANGUAGES:
                line = text.count("\n", 0, match.start("indent")) + 1
                name = page.relative_to(ROOT).as_posix()
                found.append(Block(name, line, match["marker"], match["language"], textwrap.dedent(match["text"])))
    return [block for block in found if not kinds or block.kind in kinds]


def commands(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.partition(" #")[0].strip()) and not command.startswith("#")]
