"""Draw the panels of the Grafana dashboard on one page, from what a Prometheus answers: where no Grafana is at hand.

python scripts/dashboard.py http://127.0.0.1:9090 --minutes 5 --out out/dashboard.html
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "configs" / "grafana" / "lethe.json"
COLOURS = ("#1f6fb2", "#d9822b", "#3b8f4f", "#a23b72", "#6b6f76", "#b8a13a")
COLUMN, ROW, GAP = 58, 34, 10
"""Pixels of one of the dashboard's 24 columns and of one of its rows, and between two panels."""

Series = tuple[str, list[tuple[float, float]]]
"""A line: its legend, and its points (seconds of the epoch, value)."""
Asked = Callable[[str], Sequence[Mapping[str, Any]]]
"""Answers an expression with Prometheus' list of ``metric`` and ``values``."""


def asker(url: str, seconds: float, step: float) -> Asked:
    """Return what asks a Prometheus for a range that ends now.

    Parameters
    ----------
    url
        Its address.
    seconds, step
        Length of the range, and of its steps.
    """
    end = time.time()

    def ask(expression: str) -> Sequence[Mapping[str, Any]]:
        query = urllib.parse.urlencode({"query": expression, "start": end - seconds, "end": end, "step": step})
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/query_range?{query}", timeout=30) as reply:
            result: list[Mapping[str, Any]] = json.load(reply)["data"]["result"]
        return result

    return ask


def lines_of(target: Mapping[str, str], ask: Asked, interval: str) -> list[Series]:
    """Return the lines of one expression of a panel; the dashboard's variables stand for everything."""
    expression = target["expr"].replace("$model", ".*").replace("$instance", ".*")
    lines = []
    for found in ask(expression.replace("$__rate_interval", interval)):
        legend = target["legendFormat"]
        for name, value in found["metric"].items():
            legend = legend.replace(f"{{{{{name}}}}}", value)
        points = [(float(at), float(value)) for at, value in found["values"]]
        lines.append((legend, [(at, value) for at, value in points if math.isfinite(value)]))
    return lines


def shown(value: float, unit: str) -> str:
    """Write a number with its unit."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def panel(content: Mapping[str, Any], lines: Sequence[Series], start: float, end: float) -> str:
    """Draw one panel: its title, its lines or areas over each other, and a legend with the last values."""
    place, defaults = content["gridPos"], content["fieldConfig"]["defaults"]
    width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
    left, top, right, bottom = 62, 34, width - 12, height - 24 - 17 * ((len(lines) + 1) // 2)
    stacked, drawn = defaults["custom"]["stacking"]["mode"] == "normal", []
    below: dict[float, float] = {}
    for _, points in lines:
        if stacked:
            points = [(at, value + below.get(at, 0.0)) for at, value in points]
            below = dict(points)
        drawn.append(points)
    most = max((value for points in drawn for _, value in points), default=0.0) or 1.0
    out = [f'<text x="12" y="20" class="title">{html.escape(content["title"])}</text>']
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * (bottom - top)
        out.append(f'<path d="M{left} {y:.1f}H{right}" class="grid"/>')
        out.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" class="axis end">{shown(part * most, defaults["unit"])}</text>'
        )
    for part, anchor in ((0.0, ""), (1.0, " end")):
        clock = time.strftime("%H:%M:%S", time.gmtime(start + part * (end - start)))
        out.append(
            f'<text x="{left + part * (right - left):.1f}" y="{bottom + 14}" class="axis{anchor}">{clock}</text>'
        )
    for number, ((legend, own), points) in enumerate(zip(lines, drawn, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(
            f"{left + (at - start) / (end - start) * (right - left):.1f},{bottom - value / most * (bottom - top):.1f}"
            for at, value in points
        )
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        x, y = left + (number % 2) * (right - left) / 2, bottom + 32 + 17 * (number // 2)
        last = f"{legend}: {shown(own[-1][1], defaults['unit'])}" if own else legend
        out.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{x + 16}" y="{y}" class="axis">{html.escape(last)}</text>')
    if not lines:
        out.append(f'<text x="{width / 2}" y="{height / 2}" class="axis middle">no data</text>')
    body = "".join(out)
    return f'<rect width="{width}" height="{height}" rx="4" fill="#fff" stroke="#d5d8dc"/>{body}'


def page(dashboard: Mapping[str, Any], ask: Asked, seconds: float, interval: str) -> str:
    """Return the whole page.

    Parameters
    ----------
    dashboard
        What Grafana imports.
    ask
        Answers expressions.
    seconds
        Length of the range that ``ask`` answers.
    interval
        What rates are taken over, as Prometheus writes it.
    """
    end = time.time()
    out = []
    for content in dashboard["panels"]:
        x, y = content["gridPos"]["x"] * COLUMN + GAP, content["gridPos"]["y"] * ROW + 60
        if content["type"] == "row":
            drawn = f'<text x="2" y="22" class="row">{html.escape(content["title"])}</text>'
        else:
            lines = [line for target in content["targets"] for line in lines_of(target, ask, interval)]
            drawn = panel(content, lines, end - seconds, end)
        out.append(f'<g transform="translate({x},{y})">{drawn}</g>')
    height = 80 + ROW * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    note = f"the last {seconds / 60:g} minutes; drawn by scripts/dashboard.py, not by Grafana; times in UTC"
    style = (
        "text{font:12px Helvetica,Arial,sans-serif;fill:#333}.title{font-weight:bold;font-size:13px}"
        ".row{font-weight:bold;font-size:15px}.axis{font-size:11px;fill:#666}.end{text-anchor:end}"
        ".middle{text-anchor:middle}.grid{stroke:#e6e8eb;fill:none}.head{font-size:20px;font-weight:bold}"
    )
    title = html.escape(dashboard["title"])
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><body style="margin:0;background:#f3f4f6">'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{24 * COLUMN + GAP}" height="{height}"><style>{style}</style>'
        f'<text x="12" y="30" class="head">{title}</text><text x="12" y="50" class="axis">{note}</text>'
        f"{''.join(out)}</svg></body>\n"
    )


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prometheus", help="address of the Prometheus that scrapes the server")
    parser.add_argument("--minutes", type=float, default=30, help="how far the page looks back (default: 30)")
    parser.add_argument("--interval", default="30s", help="what rates are taken over (default: 30s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "dashboard.html", help="where the page is written")
    args = parser.parse_args()
    seconds = 60 * args.minutes
    ask = asker(args.prometheus, seconds, max(seconds / 240, 1))
    try:
        text = page(json.loads(DASHBOARD.read_text()), ask, seconds, args.interval)
    except OSError as error:
        print(f"dashboard: no answer from {args.prometheus}: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
