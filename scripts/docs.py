"""Write the pages and pictures of the documentation that are made from the code or from committed measurements.

python scripts/docs.py [--check]        --check writes nothing and names those that are not what this writes
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FULL = sorted((DOCS / "results" / "gpu" / "h100-servers").glob("goal-full-*.json"))
FIDELITY = DOCS / "results" / "fidelity" / "quarter.json"
GREY, BLUE = "#8a8f98", "#1f6fb2"

SUPPORT = """# What works with what

The table is generated from the checks that the server makes at its start, and from the tests, which say themselves what
they prove (`@pytest.mark.proves`). `lethe show --support` prints it without the last column.

- *yes*: the tests in the last column hold it. They are named as `pytest` takes them in the folder `tests`.
- *refused*: the server does not start, and says which option to change (`engine/test_refusals.py`).
- *expected*: nothing in the plugin looks at it, but no test covers all of it.
- *CUDA only*: offered on a GPU; [what has run on one](results/gpu/README.md). The tests run without one, on doubles.

"""


def proofs() -> dict[str, list[str]]:
    """Return the tests that say what they prove: feature -> names of tests, as pytest takes them in ``tests/``."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, feature in _claims(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(feature, []).append(f"{path.relative_to(ROOT / 'tests').as_posix()}{name}")
    return found


def _claims(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what ``@pytest.mark.proves(...)`` of a test and ``pytestmark = pytest.mark.proves(...)`` of a file name."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            marks, name = node.decorator_list, f"::{node.name}"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks, name = [node.value], ""
        else:
            continue
        for mark in marks:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.proves":
                yield from ((name, ast.literal_eval(feature)) for feature in mark.args)


def unproven(claims: Mapping[str, Sequence[str]]) -> list[str]:
    """Say which features are called supported though no test proves them, and which tests prove what is no row."""
    from lethe_sglang.engine.support import SUPPORTED

    states = {feature: state for feature, state, _ in SUPPORTED}
    bare = [feature for feature, state in states.items() if state == "yes" and feature not in claims]
    return [
        *(f"{feature}: yes, but no test proves it" for feature in bare),
        *(f"{tests[0]} proves {name!r}, which is no row" for name, tests in claims.items() if name not in states),
    ]


def support() -> str:
    """Return the page of what is supported, with the tests that prove it, and what is refused."""
    from lethe_sglang.engine.support import support_matrix

    named = {feature: ", ".join(f"`{name}`" for name in names) for feature, names in proofs().items()}
    return SUPPORT + support_matrix(named) + "\n"


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


class Chart(NamedTuple):
    """A panel: its title, a bar a row (label, colour, value with interval), pixels a unit, and how numbers look."""

    title: str
    rows: Sequence[tuple[str, str, dict[str, float]]]
    scale: float
    form: str


def throughput() -> str:
    """Draw output throughput and requests running, each as a multiple of stock SGLang's, of runs on a GPU."""
    runs = [{sample["arm"]: sample for sample in json.loads(path.read_text())["samples"]} for path in FULL]

    def rows(key: str) -> list[tuple[str, str, dict[str, float]]]:
        ratios = [run["lethe"][key] / run["stock"][key] for run in runs]
        spread = {"value": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        one = {"value": 1.0, "low": 1.0, "high": 1.0}
        return [("stock SGLang", GREY, one), ("lethe, 1,024 tokens a layer", BLUE, spread)]

    return _drawn(
        "A full KV pool on an H100: multiples of stock SGLang",
        [
            Chart("Output tokens per second", rows("tokens_per_s"), 36.0, "{:.1f}x"),
            Chart("Requests running at once", rows("running"), 36.0, "{:.1f}x"),
        ],
        (
            "Shapes of Llama-3.1-8B with dummy weights, answers of 16,384 tokens, steady state, 15 s.",
            f"Median of {len(runs)} runs, stock at its defaults in each. Data: docs/results/gpu/h100-servers.",
        ),
    )


ARMS = {
    "lethe-fidelity": "lethe, layers by their cost",
    "lethe": "lethe",
    "paper": "lethe as published",
    "h2o": "h2o",
    "tova": "tova",
    "snapkv": "snapkv",
    "morphkv": "morphkv",
    "rkv": "rkv",
    "gkv": "gkv",
    "lazy": "lazy",
    "keydiff": "keydiff",
    "streaming": "streaming",
    "random": "random",
}


def fidelity() -> str:
    """Draw what policies lose of SmolLM2 at a quarter of its own tokens, from the study's ``fidelity.json``."""
    arms = json.loads(FIDELITY.read_text())["arms"]

    def rows(measure: str) -> list[tuple[str, str, dict[str, float]]]:
        return [
            (
                label,
                BLUE if arm.startswith("lethe") else GREY,
                {"value": arms[arm][measure]["mean"], **arms[arm][measure]},
            )
            for arm, label in ARMS.items()
        ]

    largest = {measure: max(row[2]["high"] for row in rows(measure)) for measure in ("kl", "recall")}
    return _drawn(
        "A quarter of its own tokens: what SmolLM2-135M loses",
        [
            Chart("Distance of the next-token distribution, nats", rows("kl"), 340 / largest["kl"], "{:.3f}"),
            Chart("Values stated early, loss in nats a token", rows("recall"), 340 / largest["recall"], "{:.2f}"),
        ],
        (
            "Forced replies of 1,000 tokens, test split; lines: 95 % intervals over documents.",
            "Data: docs/results/fidelity.",
        ),
    )


def _drawn(title: str, charts: Sequence[Chart], notes: Sequence[str]) -> str:
    lines, top, said = [_text(16, 26, title, size=15, weight="bold")], 52, []
    for chart in charts:
        lines.append(_text(16, top, chart.title, size=13, weight="bold"))
        for i, (label, colour, value) in enumerate(chart.rows):
            lines += _bar(top + 12 + 26 * i, label, value, colour, chart)
        top += 34 + 26 * len(chart.rows)
        numbers = (f"{label} {chart.form.format(value['value'])}" for label, _, value in chart.rows)
        said.append(f"{chart.title}: {', '.join(numbers)}")
    for note in notes:
        lines.append(_text(16, top - 6, note, size=11, fill="#555"))
        top += 16
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {top}" width="640" height="{top}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{"; ".join(said)}">\n'
        f'  <rect width="640" height="{top}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _bar(top: int, label: str, value: dict[str, float], colour: str, chart: Chart) -> list[str]:
    left, middle = 200, top + 10
    width, low, high = (round(max(value[name], 0) * chart.scale, 1) for name in ("value", "low", "high"))
    lines = [
        _text(left - 8, top + 14, label, size=12, anchor="end"),
        f'<rect x="{left}" y="{top}" width="{width}" height="20" fill="{colour}"/>',
    ]
    if high > low:
        lines.append(f'<path d="M{left + low} {middle}H{left + high}" stroke="#222" stroke-width="1.5"/>')
    number = chart.form.format(value["value"])
    lines.append(_text(left + max(width, high) + 6, top + 14, number, size=12, weight="bold"))
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
    DOCS / "img" / "fidelity.svg": fidelity,
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
        wrong = [f"{name}: stale; run: python scripts/docs.py" for name in stale()] + unproven(proofs())
        print(*wrong, sep="\n")
        return int(bool(wrong))
    for path, make in GENERATED.items():
        path.write_text(make(), encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
