"""What Prometheus scrapes: the ledger's numbers, under names that ``promtool check metrics`` takes, and a dashboard."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt.observability.metrics_collector as stock
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families as families
from promtool import lint
from torch import tensor

from lethe_sglang.cache.layout import RoundPlan, RowLayout
from lethe_sglang.cache.ledger import RequestState
from lethe_sglang.engine import metrics
from lethe_sglang.engine.counters import Counters
from lethe_sglang.engine.metrics import NAMES, PREFIX, Metrics, groups

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "lethe.json").read_text())
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
disable_created_metrics()  # there are none where several processes write, as in a server
LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": 0}


def runtime(budgets=(12, 12, 30, 12), **requests):
    """What the metrics read of a scheduler."""
    return SimpleNamespace(
        num_layers=len(budgets),
        budgets=budgets,
        counters=Counters(evicted=[0] * len(budgets)),
        ledger=SimpleNamespace(requests=requests),
        pressure=SimpleNamespace(events=0, share=None, at_floor=lambda: 1),
        config=SimpleNamespace(budget=SimpleNamespace(tokens=48)),
    )


def state(rounds=0, allocated=0, packed=0, tail=0):
    layout = RowLayout(prefix=8, packed=packed, tail=tail)
    return RequestState(rid="r", row=1, layout=layout, kept=(0,) * 4, rounds=rounds, allocated=allocated)


def plan(evicted):
    """A round that evicts so many cells of each layer."""
    nothing, candidates = (0,) * len(evicted), tuple(10 + n for n in evicted)
    return RoundPlan(0, 1, 0, 0, 0, 0, 0, nothing, candidates, (10,) * len(evicted), 0)


def result(freed=0, mass=None):
    """What a launch leaves that is counted: slots, and for each layer the scores of a request's cells, all and kept."""
    return SimpleNamespace(freed=tensor(range(freed)), mass=None if mass is None else tensor(mass))


class Scraped:
    """Metrics of a double in a registry of their own, and what a scrape of it says."""

    def __init__(self, of):
        self.registry = CollectorRegistry()
        self.metrics = Metrics(of, LABELS, self.registry)
        of.counters.publish = self.metrics.count

    def text(self):
        return generate_latest(self.registry).decode()

    def __getitem__(self, name):
        found = {}
        for family in families(self.text()):
            for sample in family.samples:
                if sample.name == PREFIX + name:
                    found[sample.labels.get("layer_group", "")] = sample.value
        return found[""] if list(found) == [""] else found


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_what_is_scraped_is_what_was_counted_when_it_was_counted():
    world = runtime()
    scraped = Scraped(world)
    assert (scraped["rounds_total"], scraped["round_seconds_count"]) == (0, 0), "a series starts at 0"
    world.counters.count_launch([state(), state(rounds=3)], [plan((5, 5, 2, 5)), plan((6, 6, 0, 6))], result(17))
    world.counters.spend(0.25)
    assert scraped["evicted_cells_total"] == {"0-1,3": 33, "2": 2}
    assert sum(scraped["evicted_cells_total"].values()) == sum(world.counters.evicted)
    assert (scraped["rounds_total"], scraped["blocks_freed_total"], scraped["requests_pruned_total"]) == (2, 17, 1)
    assert (scraped["round_seconds_count"], scraped["round_seconds_sum"]) == (1, 0.25)
    world.counters.retracted, world.pressure.events = 4, 2
    world.counters.record(state())
    assert (scraped["requests_retracted_total"], scraped["pressure_events_total"]) == (4, 2)
    assert (scraped["rounds_total"], scraped["blocks_freed_total"]) == (2, 17), "counted again"
    assert scraped["round_seconds_count"] == 1, "the end of a request is no launch"


def test_gauges_are_what_running_requests_hold():
    world = runtime(a=state(allocated=100, packed=16, tail=64), b=state(allocated=30, tail=8))
    scraped = Scraped(world)
    scraped.metrics.refresh()
    assert (scraped["held_blocks"], scraped["saved_blocks"]) == (60 + 30, 40)
    assert (scraped["requests_at_floor"], scraped["budget_tokens"], scraped["pressure_share_tokens"]) == (1, 48, 0)
    world.pressure.share = 77
    world.ledger.requests.clear()
    scraped.metrics.refresh()
    assert (scraped["held_blocks"], scraped["saved_blocks"], scraped["pressure_share_tokens"]) == (0, 0, 77)


def test_cells_belong_to_the_group_that_evicted_them():
    world = runtime()
    scraped = Scraped(world)
    world.counters.count_launch([state()], [plan((5, 5, 2, 5))], result())
    world.counters.spend(0.1)
    world.budgets = (20, 20, 20, 20)
    world.counters.count_launch([state()], [plan((1, 1, 1, 1))], result())
    world.counters.spend(0.1)
    assert scraped["evicted_cells_total"] == {"0-1,3": 15, "2": 2, "0-3": 4}
    assert scraped["layers"] == {"0-1,3": 3, "2": 1, "0-3": 4}


def test_the_score_mass_that_rounds_drop_is_a_share_over_all_layers():
    """Two requests, two layers, the scores of all candidates and of the kept ones; the third was never scored."""
    world = runtime((12, 12))
    scraped = Scraped(world)
    mass = [[[6.0, 5.0], [1.0, 1.0], [0.0, 0.0]], [[2.0, 1.0], [3.0, 1.0], [0.0, 0.0]]]
    world.counters.count_launch([state()] * 3, [plan((2, 2))] * 3, result(mass=mass))
    assert scraped["score_mass_dropped_ratio_count"] == 0, "nobody has looked whether the sums are there"
    world.counters.spend(0.1)
    assert scraped["score_mass_dropped_ratio_count"] == 2
    assert scraped["score_mass_dropped_ratio_sum"] == pytest.approx(2 / 8 + 2 / 4)
    assert world.counters.dropped.mean == pytest.approx((2 / 8 + 2 / 4) / 2)
    world.counters.count_launch([state()], [plan((2, 2))], result())
    world.counters.spend(0.1)
    assert scraped["score_mass_dropped_ratio_count"] == 2, "a policy without a score"


def test_sums_that_are_on_their_way_are_not_waited_for_and_stay_in_their_order():
    class Copy:
        arrived = False

        def query(self):
            return self.arrived

    world, copies = runtime((12,)), [Copy(), Copy()]
    scraped = Scraped(world)
    world.counters.dropped._coming.extend([(tensor([[[4.0, 3.0]]]), copies[0]), (tensor([[[4.0, 1.0]]]), copies[1])])
    copies[1].arrived = True
    scraped.metrics.refresh()
    assert world.counters.dropped.mean is None
    copies[0].arrived = True
    scraped.metrics.refresh()
    assert scraped["score_mass_dropped_ratio_count"] == 2 and world.counters.dropped.mean == 0.5


@pytest.mark.parametrize(
    ("budgets", "names"),
    [((5,), ["0"]), ((5, 5), ["0-1"]), ((1, 2, 1, 2), ["0,2", "1,3"]), ((9, 9, 1, 9, 9, 9, 9), ["0-1,3-6", "2"])],
)
def test_groups_are_named_by_their_layers(budgets, names):
    assert list(groups(budgets)) == names
    assert sorted(itertools.chain(*groups(budgets).values())) == list(range(len(budgets)))


@pytest.mark.parametrize("publishes", [True, False])
def test_only_ranks_that_publish_sglangs_metrics_publish_ours(monkeypatch, publishes):
    world, made = runtime(), []
    monkeypatch.setattr(metrics, "current", lambda: world)
    world.monitor = SimpleNamespace(export=lambda labels: made.append("quality"))
    double = SimpleNamespace(count=made.append, runtime=world, labels=LABELS)
    monkeypatch.setattr(metrics, "Metrics", lambda of, labels: made.append(labels) or double)
    collector = SimpleNamespace(labels=LABELS)
    metrics.start(SimpleNamespace(current_scheduler_metrics_enabled=publishes, collector=collector), object)
    world.counters.spend(0.5)
    assert made == ([LABELS, "quality", 0.5] if publishes else [])


# -- names ------------------------------------------------------------------------------------------------------------


def test_promtools_rules_find_nothing():
    scraped = Scraped(runtime())
    scraped.metrics.refresh()
    assert lint(scraped.text()) == []
    kinds = {family.name: family.type for family in families(scraped.text())}
    assert {name.removesuffix("_total") for name in NAMES} == set(kinds)
    assert all((kinds[name.removesuffix("_total")] == "counter") == name.endswith("_total") for name in NAMES)
    seconds = [name for name in NAMES if name.endswith("seconds")]
    assert seconds and all(kinds[name] == "histogram" for name in seconds)


def test_the_rules_find_what_they_should():
    registry = CollectorRegistry()
    Gauge("rounds_total", "Not a counter.", registry=registry)
    Gauge("held_count", "Reserved.", registry=registry)
    Gauge("round_ms", "Abbreviated.", registry=registry)
    Gauge("share_gauge", "Its type.", registry=registry)
    Gauge("heldBlocks", "Camel.", registry=registry)
    Gauge("silent", "", registry=registry)
    Counter("fine", "Fine.", registry=registry)
    Histogram("fine_seconds", "Fine.", registry=registry)
    found = [line.partition(":")[0] for line in lint(generate_latest(registry).decode())]
    assert sorted(found) == ["heldBlocks", "held_count", "round_ms", "rounds_total", "share_gauge", "silent"]


@pytest.mark.parametrize(
    ("asks", "prefix"),
    [
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "sglang_"),  # Prometheus 2
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", "sglang:"),  # Prometheus 3
        ("text/plain;version=0.0.4", "sglang:"),
    ],
)
def test_an_older_prometheus_is_told_names_without_a_colon(asks, prefix):
    """The page says so, and how to have the dashboard ask for them."""
    encode, _ = choose_encoder(asks)
    assert f"\n{prefix}kv_evict_rounds_total" in encode(Scraped(runtime()).registry).decode()


def test_every_label_of_sglangs_is_on_every_metric():
    scraped = Scraped(runtime())
    scraped.metrics.refresh()
    for family in families(scraped.text()):
        assert family.samples and all(LABELS.keys() <= sample.labels.keys() for sample in family.samples)


# -- dashboard and page -----------------------------------------------------------------------------------------------

ABSENT: set[str] = set()
"""What is exported and deliberately not on the dashboard."""
QUALITY = {f"sglang:kv_evict_quality_{name}" for name in ("k3", "tokens_total", "probes_total", "skipped_total")}
"""What a server exports of quality where it is watched."""
WORD = re.compile(r"\b(?:sglang|lethe):\w*[a-z0-9]\b")


def base(name):
    """The metric of a series: a histogram's without the ending."""
    return re.sub("_(bucket|sum|count)$", "", name)


def expressions():
    charts = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in charts for target in panel["targets"]]


def test_the_dashboard_shows_what_is_exported_and_nothing_else():
    shown = {base(name) for text in expressions() for name in WORD.findall(text)}
    of_sglang = set(re.findall(r'"(sglang:\w+)"', Path(stock.__file__).read_text()))
    assert len(shown) > 15 and shown <= {*NAMES, *of_sglang, *QUALITY} and shown >= QUALITY
    assert set(NAMES) - shown == ABSENT
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert set(WORD.findall(variable["query"]["query"])) <= set(NAMES)


def test_the_dashboard_rates_counters_and_nothing_else():
    for text in expressions():
        rated = {base(name) for name in re.findall(r"rate\(([\w:]+)", text)}
        plain = {base(name) for name in WORD.findall(text)} - rated
        assert all(name.endswith(("_total", "_seconds", "_k3", "_ratio")) for name in rated), text
        assert not [name for name in plain if name.endswith("_total")], text


def test_the_dashboards_panels_are_complete_and_do_not_overlap():
    taken, panels = set(), DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".") and panel["datasource"]["uid"] == "${datasource}"


def test_the_page_explains_every_metric_and_names_no_other():
    named = {base(name) for name in WORD.findall(PAGE)}
    rows = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert {name.removeprefix(PREFIX) for name in NAMES} <= rows
    of_sglang = set(re.findall(r'"(sglang:\w+)"', Path(stock.__file__).read_text()))
    assert named <= {*NAMES, *of_sglang}
