"""Write the pages and pictures of the documentation that are made from the code or from committed measurements.

python scripts/docs.py [--check]        --check writes nothing and names those that are not what this writes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BENCH = DOCS / "results" / "cpu-pool-4096" / "bench.json"

SUPPORT = """# What works with what

The table is generated from the checks that the server makes at its start; `lethe show --support` prints it.

- *refused*: the server does not start, and says which option to change.
- *expected*: nothing in the plugin looks at it, but no test covers it.
- *CUDA only*: offered on a GPU; no server has run on one yet, [kernels have](results/gpu/README.md).

"""


def support() -> str:
    """Return the page of what is supported and what is refused."""
    from lethe_sglang.engine.guard import support_matrix

    return SUPPORT + support_matrix() + "\n"


def configuration() -> str:
    """Return the page of options, of the schema and of the policies in this repository."""
    from lethe_sglang.config.reference import configuration_page
    from lethe_sglang.policies.registry import IN_TREE

    return configuration_page(IN_TREE) + "\n"


UPSTREAM = """# What this plugin needs of SGLang

One SGLang version is supported at a time: at start, its number and the source of every function named here are
checked. To move to another version, install it, let `python -m lethe_sglang.engine.compat --against-installed` list
what changed, read those functions with the reason given here, pin it in both `pyproject.toml` and as `SUPPORTED` in
`engine/compat.py`, and record the new sources with `--write`.

"""


def upstream() -> str:
    """Return the page of what the plugin needs of SGLang, for whoever moves it to another version."""
    from lethe_sglang.engine.hooks import HOOKS, RELIANCES

    lines = [
        "## Wrapped",
        "",
        "| function of SGLang | how | our function | why |",
        "| --- | --- | --- | --- |",
    ]
    for hook in HOOKS:
        name = f"{hook.function.__module__.rpartition('.')[2]}.{hook.function.__qualname__}"
        lines.append(f"| `{hook.target}` | {hook.kind.name.lower()} | `{name}` | {hook.why} |")
    lines += ["", "## Relied on", "", "| function or class of SGLang | why |", "| --- | --- |"]
    lines += [f"| `{reliance.target}` | {reliance.why} |" for reliance in RELIANCES]
    return UPSTREAM + "\n".join(lines) + "\n"


def throughput() -> str:
    """Draw output throughput and requests running, each as a multiple of stock SGLang's, from ``bench.json``."""
    ratios = json.loads(BENCH.read_text())["ratios"]
    rows = [
        ("stock SGLang", None, "#8a8f98"),
        ("plugin, evicting nothing", "idle / stock", "#8fb3d9"),
        ("plugin, 192 tokens a layer", "lethe / stock", "#1f6fb2"),
    ]
    panels = [("Output tokens per second", "output throughput"), ("Requests running at once", "requests running, mean")]
    lines = [_text(16, 26, "A full KV pool of 4,096 tokens: multiples of stock SGLang", size=15, weight="bold")]
    top = 52
    for title, key in panels:
        lines.append(_text(16, top, title, size=13, weight="bold"))
        for i, (label, pair, colour) in enumerate(rows):
            value = {"median": 1.0, "smallest": 1.0, "largest": 1.0} if pair is None else ratios[pair][key]
            lines += _bar(top + 12 + 26 * i, label, value, colour)
        top += 112
    notes = (
        "32 requests of 64 + 1,024 tokens, a toy model of 0.6M parameters, 2 CPU cores, no GPU.",
        "Bars: median of 3 interleaved runs; lines: smallest to largest. Data: docs/results/cpu-pool-4096.",
    )
    for note in notes:
        lines.append(_text(16, top - 6, note, size=11, fill="#555"))
        top += 16
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {top}" width="640" height="{top}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{_described(ratios)}">\n'
        f'  <rect width="640" height="{top}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _described(ratios: dict[str, Any]) -> str:
    pairs = [
        (name, ratios[f"{arm} / stock"]["output throughput"])
        for name, arm in (("plugin", "idle"), ("evicting", "lethe"))
    ]
    return "Output throughput over stock: " + ", ".join(f"{name} {value['median']:.2f}" for name, value in pairs)


def _bar(top: int, label: str, value: dict[str, float], colour: str) -> list[str]:
    left, scale = 200, 100.0
    width, low, high = (round(value[name] * scale, 1) for name in ("median", "smallest", "largest"))
    middle = top + 10
    lines = [
        _text(left - 8, top + 14, label, size=12, anchor="end"),
        f'<rect x="{left}" y="{top}" width="{width}" height="20" fill="{colour}"/>',
    ]
    if high > low:
        lines.append(f'<path d="M{left + low} {middle}H{left + high}" stroke="#222" stroke-width="1.5"/>')
    lines.append(_text(left + max(width, high) + 6, top + 14, f"{value['median']:.2f}x", size=12, weight="bold"))
    return lines


def _text(
    x: float, y: float, text: str, *, size: int, anchor: str = "start", weight: str = "normal", fill: str = "#111"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{text}</text>'
    )


GENERATED: dict[Path, Callable[[], str]] = {
    DOCS / "configuration.md": configuration,
    DOCS / "support.md": support,
    DOCS / "upstream.md": upstream,
    DOCS / "img" / "throughput.svg": throughput,
}
"""What is written, and by which function."""


def stale() -> list[str]:
    """Name the generated files that are not what this writes."""
    return [
        str(path.relative_to(ROOT))
        for path, make in GENERATED.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    """Write everything that is generated, or with ``--check`` fail if something would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; name what is stale, with exit status 1")
    if parser.parse_args().check:
        names = stale()
        print(*(f"{name}: stale; run: python scripts/docs.py" for name in names), sep="\n")
        return int(bool(names))
    for path, make in GENERATED.items():
        path.write_text(make(), encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
