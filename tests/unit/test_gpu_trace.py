"""Part trace of the GPU suite: what counts as a wait, what a step is, what it would run, how it is judged. No GPU."""

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from gpu_suite import trace
from gpu_suite.__main__ import main
from gpu_suite.goals import waits_more_than_stock
from gpu_suite.waits import count_waits, is_wait, read_trace

DECODE = "step[DECODE bs=16]"


def span(ts, name=DECODE):
    return {"cat": "user_annotation", "name": name, "ts": ts, "dur": 5}


def call(ts, name, number=0, category="cuda_runtime"):
    return {"cat": category, "name": name, "ts": ts, "args": {"correlation": number}}


def copy(number, name="Memcpy DtoH (Device -> Pinned)"):
    return {"cat": "gpu_memcpy", "name": name, "ts": 0, "args": {"correlation": number}}


def steps(*per_step, end=()):
    """A trace of one graph launch and the given calls in every step; the last span begins no whole step."""
    events = []
    for n, calls in enumerate((*per_step, end)):
        events += [span(100 * n), call(100 * n + 1, "cudaGraphLaunch")]
        events += [call(100 * n + 2 + i, name) for i, name in enumerate(calls)]
    return events


@pytest.mark.parametrize(
    "name",
    ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize_ptsz",
     "cuMemcpyDtoH_v2", "cudaFree"],
)  # fmt: skip
def test_what_makes_the_host_wait(name):
    assert is_wait(name)


@pytest.mark.parametrize(
    "name", ["cudaMemcpyAsync", "cuMemcpyDtoHAsync_v2", "cudaEventRecord", "cudaStreamWaitEvent", "cudaGraphLaunch",
             "cudaFreeAsync", "cudaEventQuery"],
)  # fmt: skip
def test_what_does_not(name):
    assert not is_wait(name)


def test_waits_are_counted_from_the_first_span_to_the_last():
    events = steps(["cudaEventSynchronize"], ["cudaEventSynchronize", "cudaStreamSynchronize"], end=["cudaMemcpy"])
    events.insert(0, call(-5, "cudaDeviceSynchronize"))
    found = count_waits(events[::-1], 16)
    assert (found.steps, found.graph_launches, found.most) == (2, 2, 2)
    assert found.waits == {"cudaEventSynchronize": 2, "cudaStreamSynchronize": 1}


def test_only_calls_of_the_runtime_and_the_driver_count():
    events = [*steps([], []), call(5, "cudaStreamSynchronize", category="python_function"),
              call(6, "cuStreamSynchronize", category="cuda_driver")]  # fmt: skip
    assert count_waits(events, 16).waits == {"cuStreamSynchronize": 1}


def test_copies_to_the_host_are_those_that_the_steps_asked_for():
    events = [*steps([], []), call(5, "cudaMemcpyAsync", 7), copy(7), copy(8), call(300, "cudaMemcpyAsync", 9), copy(9),
              call(6, "cudaMemcpyAsync", 4), copy(4, "Memcpy HtoD (Pinned -> Device)")]  # fmt: skip
    assert count_waits(events, 16).copies == {"Memcpy DtoH (Device -> Pinned)": 1}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "0 forward passes are no whole step"),
        ([*steps([], []), span(150, "step[EXTEND bs=1]")], r"1 of 4 forward passes are others than 16 decodes"),
        ([*steps([], []), span(150, "step[DECODE bs=15]")], r"others than 16 decodes: step\[DECODE bs=15\]"),
        ([e for e in steps([], []) if e["name"] != "cudaGraphLaunch"], "0 graphs were launched in 2 steps"),
    ],
)
def test_a_trace_that_proves_nothing_is_an_error(events, message):
    with pytest.raises(ValueError, match=message):
        count_waits(events, 16)


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_trace_may_be_gzipped(tmp_path, name):
    data = json.dumps({"traceEvents": steps([])}).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert count_waits(read_trace(tmp_path / name), 16).steps == 1


def test_one_server_an_arm_is_listed_with_rounds_that_come_due(capsys):
    assert main(["trace", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split()[2] for line in lines] == ["stock-flashinfer", "lethe-flashinfer", "lethe-triton"]
    for line in lines:
        assert ("--kv-evict" in line) == ("lethe" in line.split(",")[0])
        assert "--disable-cuda-graph" not in line and "--disable-overlap-schedule" not in line
    assert trace.EVICTION["rounds"]["interval"] * 4 <= trace.FORWARDS - 1


def test_the_profiler_is_asked_for_the_file_that_is_read(tmp_path):
    path = tmp_path / "traces" / "qwen2.5-7b-lethe-triton-TP-0.trace.json.gz"
    request = trace.profile_request(path)
    assert Path(request["output_dir"]) / f"{request['profile_id']}-TP-0.trace.json.gz" == path
    assert request["num_steps"] == trace.FORWARDS and request["activities"] == ["CPU", "GPU"]


def record(waits, steps=64, **more):
    return {"status": "measured", "steps": steps, "graph_launches": steps, "rounds": 64, "most": 2, "waits": waits,
            "copies": {}} | more  # fmt: skip


def test_lethe_is_judged_against_stock_on_flashinfer_and_failures_by_nothing():
    records = {
        "m stock-flashinfer": record({"cudaEventSynchronize": 64}),
        "m lethe-flashinfer": record({"cudaEventSynchronize": 64, "cudaStreamSynchronize": 16}),
        "m lethe-triton": {"status": "failed", "message": "no"},
    }
    assert waits_more_than_stock({"trace": records}) == [("m lethe-flashinfer", 0.25)]
    del records["m stock-flashinfer"]
    assert waits_more_than_stock({"trace": records}) == []


def test_the_table_has_a_row_a_server():
    records = {"m stock-flashinfer": record({"cudaEventSynchronize": 64}), "m lethe-triton": {
        "status": "failed", "message": "the server is gone | really"}}  # fmt: skip
    lines = trace.Trace().table(records)
    assert len(lines) == 4 and "| 64 | 64 | 64 | cudaEventSynchronize 1 | 2 | none |" in lines[2]
    assert "failed: the server is gone / really" in lines[3]
