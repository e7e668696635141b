"""Streaming accumulation against the same numbers from whole attention matrices."""

import math
from itertools import pairwise

import pytest
import torch

from lethe_sglang.allocation.profile import PER_PROMPT, PER_QUERY
from lethe_sglang.observers.measure import IDLE_STEPS, MASSES, Measurer, query_statistics

LAYERS, HEADS, SINKS = 3, 2, 4


def rows_of(seed: int, prompt: int, queries: int) -> list[torch.Tensor]:
    """Attention ``[L, H, n]`` of each decode query of one request."""
    generator = torch.Generator().manual_seed(seed)
    lengths = range(prompt + 1, prompt + queries + 1)
    return [torch.rand(LAYERS, HEADS, n, generator=generator).pow(8).add(1e-9) for n in lengths]


def normalised(rows):
    return [row / row.sum(-1, keepdim=True) for row in rows]


def feed(measurer: Measurer, requests: dict[int, tuple[int, list[torch.Tensor]]]) -> None:
    """Decode step after step; ``requests``: row -> (first step, attention of each of its steps)."""
    last = max(start + len(steps) for start, steps in requests.values())
    for t in range(last):
        running = {row: steps[t - start] for row, (start, steps) in requests.items() if 0 <= t - start < len(steps)}
        if not running:
            continue
        rows = torch.tensor(list(running))
        length = torch.tensor([a.shape[-1] for a in running.values()])
        width = int(length.max())
        measurer.begin_step(rows, length, width)
        for layer in range(LAYERS):
            padded = torch.zeros(len(running), HEADS, width)
            for i, a in enumerate(running.values()):
                padded[i, :, : a.shape[-1]] = a[layer]
            measurer.add(layer, rows, padded, length)


def dense(steps: list[torch.Tensor], prompt: int, layer: int) -> dict[str, float]:
    """Statistics of one layer of one request from its whole matrix."""
    total = prompt + len(steps)
    out = dict.fromkeys(PER_QUERY, 0.0)
    for a in steps:
        for head in a[layer].double():
            n = len(head)
            ordered = head.sort(descending=True).values.cumsum(0).tolist()
            norm = float(head.square().sum().sqrt())
            out["hoyer"] += (math.sqrt(n) - 1 / norm) / (math.sqrt(n) - 1)
            out["entropy"] -= float((head * head.log()).sum())
            out["variance"] += float(head.var(unbiased=False)) * n * n
            for mass, name in zip(MASSES, ("coverage_90", "coverage_95", "coverage_99"), strict=True):
                out[name] += next(i for i, x in enumerate(ordered, 1) if x >= mass - 1e-9)
            out["distance"] += sum(float(x) * (n - 1 - j) for j, x in enumerate(head))
            out["sink_share"] += float(head[:SINKS].sum())
    out = {name: value / HEADS for name, value in out.items()}
    seen: list[list[float]] = [[] for _ in range(total)]
    for a in steps:
        for j, x in enumerate(a[layer].mean(0).tolist()):
            seen[j].append(x)
    received = torch.tensor([sum(values) for values in seen], dtype=torch.float64)
    out["concentration"] = float(received.var(unbiased=False) / received.mean() ** 2)
    out["fluctuation"] = sum(float(torch.tensor(v, dtype=torch.float64).var(unbiased=False)) for v in seen)
    idle = back = 0
    for j, values in enumerate(seen):
        first = max(j + 1, prompt + 1)
        used = [first] + [first + i for i, x in enumerate(values) if i and x > 1 / (first + i)]
        came = any(b - a >= IDLE_STEPS for a, b in pairwise(used))
        back += came
        idle += came or total - used[-1] >= IDLE_STEPS
    out["recurrence"] = back / max(idle, 1)
    return out


def report_of(record) -> list[dict[str, float]]:
    """Per layer, sums of per-query statistics over all lengths, and per-prompt statistics."""
    report = record.report()
    layers = []
    for layer in range(LAYERS):
        sums = [sum(part["sums"][layer][s] for part in report["by_length"].values()) for s in range(len(PER_QUERY))]
        layers.append(dict(zip((*PER_QUERY, *PER_PROMPT), [*sums, *report["per_prompt"][layer]], strict=True)))
    return layers


@pytest.mark.parametrize("together", [False, True])
def test_records_equal_whole_matrices(together):
    requests = {2: (0, normalised(rows_of(1, 9, 70))), 5: (11, normalised(rows_of(2, 30, 40)))}
    prompts = {2: 9, 5: 30}
    measurer = Measurer(8, LAYERS, SINKS, "cpu")
    measurer.names = {2: "two", 5: "five"}
    for group in [requests] if together else [{row: request} for row, request in requests.items()]:
        feed(measurer, group)
    measurer.on_close([5, 2])
    records = {record.rid: record for record in measurer.drain()}
    for row, name in ((2, "two"), (5, "five")):
        record, steps = records[name], requests[row][1]
        assert (record.prompt_tokens, record.queries) == (prompts[row], len(steps))
        for layer, found in enumerate(report_of(record)):
            for statistic, expected in dense(steps, prompts[row], layer).items():
                assert found[statistic] == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, layer, statistic)


def test_queries_are_told_apart_by_the_length_of_their_context():
    steps = normalised(rows_of(4, 12, 30))  # contexts of 13 to 42
    measurer = Measurer(4, LAYERS, SINKS, "cpu")
    measurer.names[1] = "r"
    feed(measurer, {1: (0, steps)})
    measurer.on_close([1])
    report = measurer.drain()[0].report()
    assert {length: part["queries"] for length, part in report["by_length"].items()} == {"8": 3, "16": 16, "32": 11}
    expected = [query_statistics(a[1].unsqueeze(0), torch.tensor([a.shape[-1]]), SINKS)[0] for a in steps[3:19]]
    assert report["by_length"]["16"]["sums"][1] == pytest.approx(torch.stack(expected).sum(0).tolist(), rel=1e-5)


def test_a_row_that_is_used_again_starts_anew():
    measurer, fresh = Measurer(4, LAYERS, SINKS, "cpu"), Measurer(4, LAYERS, SINKS, "cpu")
    second = normalised(rows_of(8, 10, 25))
    measurer.names[1] = "first"
    feed(measurer, {1: (0, normalised(rows_of(7, 40, 33)))})
    measurer.on_close([1])
    for m in (measurer, fresh):
        m.names[1] = "second"
        feed(m, {1: (0, second)})
        m.on_close([1])
    again, alone = measurer.drain()[1].report(), fresh.drain()[0].report()
    assert again == alone
    assert measurer.drain() == [], "records are handed out once"


def test_rows_without_a_decode_query_or_a_name_leave_no_record():
    measurer = Measurer(4, LAYERS, SINKS, "cpu")
    measurer.names[1] = "prefill only"
    feed(measurer, {2: (0, normalised(rows_of(7, 10, 3)))})
    measurer.on_close([1, 2, 3])
    assert measurer.drain() == []


def test_a_token_that_comes_back_after_a_pause_counts_as_recurring():
    def attention(n, special):
        a = torch.full((LAYERS, HEADS, n), 1e-6)
        a[:, :, n - 1] = 1.0
        if special:
            a[:, :, 0] = 1.0
        return a / a.sum(-1, keepdim=True)

    def recurrence(steps, back_at):
        measurer = Measurer(4, LAYERS, SINKS, "cpu")
        measurer.names[1] = "r"
        feed(measurer, {1: (0, [attention(5 + t, t == back_at) for t in range(steps)])})
        measurer.on_close([1])
        return report_of(measurer.drain()[0])[0]["recurrence"]

    steps = IDLE_STEPS + 9
    idle = 4 + steps - IDLE_STEPS  # the prompt, and what was generated long enough before the end
    assert recurrence(steps, None) == 0
    assert recurrence(steps, IDLE_STEPS - 1) == 0, "back before it was idle"
    assert recurrence(steps, IDLE_STEPS) == pytest.approx(1 / idle)


def test_the_bytes_are_those_of_the_accumulators():
    measurer = Measurer(8, LAYERS, SINKS, "cpu")
    measurer.begin_step(torch.tensor([1]), torch.tensor([100]), 100)
    tokens = LAYERS * 8 * 128 * (4 + 4 + 4 + 1)
    assert measurer.bytes == tokens + measurer.queries.numel() * 4
