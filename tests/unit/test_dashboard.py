"""The page that stands in for Grafana draws every panel of the dashboard from what Prometheus answers."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import urllib.parse
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def dashboard():
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "scripts" / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(page: str) -> xml.etree.ElementTree.Element:
    return xml.etree.ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def heights(panel) -> list[float]:
    """The last point of each line, from the bottom of the page up."""
    return [-float(line.get("points").split()[-1].split(",")[1]) for line in panel.iter(f"{SVG}polyline")]


def test_every_panel_is_drawn_with_what_was_answered(dashboard):
    content, asked = json.loads(dashboard.DASHBOARD.read_text()), []

    def ask(expression):
        asked.append(expression)
        metric = {"reason": "interval", "layer_group": "0-3"}
        return [{"metric": metric, "values": [[1.0, "4"], [2.0, "8"], [3.0, "NaN"], [4.0, "6"]]}]

    page = dashboard.page(content, ask, 60, "30s")
    assert len(asked) > 20 and not [expression for expression in asked if "$" in expression or "[]" in expression]
    groups = list(drawn(page).iter(f"{SVG}g"))
    assert len(groups) == len(content["panels"])
    for panel, group in zip(content["panels"], groups, strict=True):
        text = ["".join(found.itertext()) for found in group.iter(f"{SVG}text")]
        assert panel["title"] in text
        lines = heights(group)
        assert len(lines) == len(panel.get("targets", ())) and "nan" not in str(lines)
        if panel["type"] == "timeseries" and panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal":
            assert lines == sorted(set(lines)), "areas do not lie on each other"
    assert "layers 0-3: 6" in page and "interval: 600 %" in page and "running: 6" in page


def test_a_panel_without_data_says_so(dashboard):
    content = json.loads(dashboard.DASHBOARD.read_text())
    page = dashboard.page(content, lambda expression: [], 60, "30s")
    assert page.count("no data") == sum(panel["type"] == "timeseries" for panel in content["panels"])


COMMAND = "scripts/dashboard.py http://127.0.0.1:9090 --minutes 30 --out out/dashboard.html"
"""As the page on monitoring has it."""


@pytest.mark.parametrize("answers", [True, False])
def test_the_command_writes_a_page_or_says_in_a_line_why_not(dashboard, monkeypatch, capsys, tmp_path, answers):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if not answers:
            raise OSError("refused")
        return io.BytesIO(b'{"data": {"result": []}}')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", COMMAND.split())
    monkeypatch.setattr(dashboard.urllib.request, "urlopen", urlopen)
    assert dashboard.main() == (0 if answers else 1)
    assert (tmp_path / COMMAND.split()[-1]).exists() is answers
    assert asked[0].startswith("http://127.0.0.1:9090/api/v1/query_range?query=sum%28sglang%3Anum_running_reqs")
    query = dict(urllib.parse.parse_qsl(asked[0].partition("?")[2]))
    assert float(query["end"]) - float(query["start"]) == pytest.approx(1800) and float(query["step"]) == 7.5
    told = capsys.readouterr()
    assert told.err == ("" if answers else "dashboard: no answer from http://127.0.0.1:9090: refused\n")
