"""Part trace of the GPU suite: what counts as a wait, what a step is, what it would run, how it is judged. No GPU."""

import gzip
import json
import threading
from pathlib import Path

import pytest

from lethe_bench.gpu import base, trace
from lethe_bench.gpu.results import Results
from lethe_bench.gpu.waits import count_waits, is_wait, read_trace
from lethe_sglang.cli.main import main

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
    [
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cuStreamSynchronize_ptsz",
        "cuMemcpyDtoH_v2",
        "cudaFree",
    ],
)
def test_what_makes_the_host_wait(name):
    assert is_wait(name)


@pytest.mark.parametrize(
    "name",
    [
        "cudaMemcpyAsync",
        "cuMemcpyDtoHAsync_v2",
        "cudaEventRecord",
        "cudaStreamWaitEvent",
        "cudaGraphLaunch",
        "cudaFreeAsync",
        "cudaEventQuery",
    ],
)
def test_what_does_not(name):
    assert not is_wait(name)


def test_waits_are_counted_from_the_first_span_to_the_last():
    events = steps(["cudaEventSynchronize"], ["cudaEventSynchronize", "cudaStreamSynchronize"], end=["cudaMemcpy"])
    events.insert(0, call(-5, "cudaDeviceSynchronize"))
    found = count_waits(events[::-1], 16)
    assert (found.steps, found.graph_launches, found.most) == (2, 2, 2)
    assert found.waits == {"cudaEventSynchronize": 2, "cudaStreamSynchronize": 1}


def test_only_calls_of_the_runtime_and_the_driver_count():
    events = [
        *steps([], []),
        call(5, "cudaStreamSynchronize", category="python_function"),
        call(6, "cuStreamSynchronize", category="cuda_driver"),
    ]
    assert count_waits(events, 16).waits == {"cuStreamSynchronize": 1}


def test_copies_to_the_host_are_those_that_the_steps_asked_for():
    events = [
        *steps([], []),
        call(5, "cudaMemcpyAsync", 7),
        copy(7),
        copy(8),
        call(300, "cudaMemcpyAsync", 9),
        copy(9),
        call(6, "cudaMemcpyAsync", 4),
        copy(4, "Memcpy HtoD (Pinned -> Device)"),
    ]
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


def test_what_torchs_profiler_writes_is_read(tmp_path):
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            with torch.profiler.record_function(DECODE):
                torch.ones(1)
    profiler.export_chrome_trace(str(tmp_path / "t.json.gz"))
    with pytest.raises(ValueError, match="0 graphs were launched in 2 steps"):  # so it has found three spans
        count_waits(read_trace(tmp_path / "t.json.gz"), 16)


# -- servers -----------------------------------------------------------------------------------------------------------


class Double:
    """A server that logs decode steps when it has a load, and writes a trace when the profiler is started."""

    def __init__(self, command, port, log):
        self.command, self.log, self.evicts, self.rounds = command, log, "--kv-evict" in command, 5
        self.during, self.written, self.lines, self.asked = 64, {"traceEvents": []}, 10_000, []
        self.over = threading.Event()

    def __enter__(self):
        self.log.write_text("Decode batch, #running-req: 16, #token: 1\n" * 10_000)
        return self

    def __exit__(self, *_):
        self.over.set()

    def get(self, path):
        return {"internal_states": [{"lethe": {"rounds": self.rounds}} if self.evicts else {}]}

    def post(self, path, body):
        self.asked.append((path, body))
        if path == "/generate":
            with self.log.open("a") as log:
                log.write("Decode batch, #running-req: 15, #token: 1\n" * 10_000)
                log.write("Decode batch, #running-req: 16, #token: 1\n" * self.lines)
            assert self.over.wait(10)
        else:
            self.rounds += self.during
            path = Path(body["output_dir"], f"{body['profile_id']}-TP-0.trace.json.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(json.dumps(self.written).encode()))
        return ""


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Run the part on doubles that ``change`` has changed; returns the records and the doubles."""
    monkeypatch.setattr(trace, "write_model", lambda *_: None)
    monkeypatch.setattr(trace, "OUT", tmp_path)
    header = {"part": "trace", "gpus": ["TEST-GPU"], "versions": {}, "commit": "test", "planned": []}

    def run(change):
        started = []

        class Started(Double):
            def __enter__(self):
                started.append(self)
                self.written = {"traceEvents": steps(["cudaEventSynchronize"], ["cudaEventSynchronize"])}
                change(self)
                return super().__enter__()

        monkeypatch.setattr(base, "Server", Started)
        results = Results(tmp_path / "trace.jsonl", header)
        trace.Trace().work(results, "qwen2.5-7b")
        return results.records, started

    return run


def test_every_server_is_traced_under_a_steady_load_and_recorded(suite, tmp_path):
    records, started = suite(lambda server: None)
    assert list(records) == [f"qwen2.5-7b {arm}" for arm in trace.ARMS_TRACED]
    for key, found in records.items():
        assert found["status"] == "measured" and found["waits"] == {"cudaEventSynchronize": 2}, key
        assert (found["steps"], found["rounds"]) == (2, 0 if "stock" in key else 64)
        assert "--load-format dummy" in found["runs"] and str(tmp_path) not in found["runs"]
        assert (tmp_path / "traces" / found["trace"]).is_file()
    for server in started:
        (load, body), (profile, _) = server.asked
        assert (load, profile) == ("/generate", "/start_profile")
        assert len({tuple(prompt) for prompt in body["input_ids"]}) == 16, "prompts of one prefix would share it"
        assert body["sampling_params"]["ignore_eos"] and body["sampling_params"]["max_new_tokens"] == 8192
    again, more = suite(lambda server: None)
    assert again == records and more == [], "a server was started although nothing is left"


def test_the_trace_begins_when_all_requests_have_had_rounds(suite, tmp_path):
    plan = trace.trace_plan("qwen2.5-7b", "lethe-flashinfer")
    least = plan.first_round + 2 * plan.config.rounds.interval
    plan.check()
    assert least + trace.FORWARDS < plan.output_len / 4

    def one_short(server):
        server.lines = least - 1
        threading.Timer(1.0, server.over.set).start()

    records, started = suite(one_short)
    assert [path for server in started for path, _ in server.asked] == ["/generate"] * 3
    assert all("the load was over before the trace" in found["message"] for found in records.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"during": 0}, "no round was run in the traced steps"),
        ({"written": {"traceEvents": []}}, "qwen2.5-7b-lethe-triton-TP-0.trace.json.gz: 0 forward passes are no whole"),
        ({"evicts": False}, "does not report eviction"),
    ],
)
def test_a_trace_that_is_not_what_it_should_be_is_a_failure(suite, change, message):
    records, _ = suite(lambda server: vars(server).update(change) if server.evicts else None)
    assert [found["status"] for found in records.values()] == ["measured", "failed", "failed"]
    assert message in records["qwen2.5-7b lethe-triton"]["message"]


def test_a_trace_of_before_is_not_taken_for_a_new_one(suite, tmp_path, monkeypatch):
    path = tmp_path / "traces" / "qwen2.5-7b-stock-flashinfer-TP-0.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": steps(["cudaMemcpy"])}).encode()))

    def nothing_written(server):
        server.post = lambda path, body: Double.post(server, path, body) if path == "/generate" else ""

    monkeypatch.setattr(trace, "WRITING_SECONDS", 2)
    records, _ = suite(nothing_written)
    first = records["qwen2.5-7b stock-flashinfer"]
    assert first["status"] == "failed" and "no trace, within 2 s" in first["message"]


# -- plan, table ------------------------------------------------------------------------------------------------------


def test_one_server_an_arm_is_listed_with_rounds_that_come_due(capsys):
    assert main(["gpu", "trace", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[2] for line in lines] == ["stock-flashinfer", "lethe-flashinfer", "lethe-triton"]
    for line in lines:
        assert ("--kv-evict" in line) == ("lethe" in line.split(":")[0])
        assert "--disable-cuda-graph" not in line and "--disable-overlap-schedule" not in line
    assert trace.EVICTION["rounds"]["interval"] * 4 <= trace.FORWARDS - 1


def test_the_profiler_is_asked_for_the_file_that_is_read(tmp_path):
    path = tmp_path / "traces" / "qwen2.5-7b-lethe-triton-TP-0.trace.json.gz"
    request = trace.profile_request(path)
    assert Path(request["output_dir"]) / f"{request['profile_id']}-TP-0.trace.json.gz" == path
    assert request["num_steps"] == trace.FORWARDS and request["activities"] == ["CPU", "GPU"]


def record(waits, steps=64, **more):
    return {
        "status": "measured",
        "steps": steps,
        "graph_launches": steps,
        "rounds": 64,
        "most": 2,
        "waits": waits,
        "copies": {},
    } | more


def judged(records):
    """What the table says of each server beyond stock's waits and copies a step."""
    return {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in trace.Trace().table(records)[2:]}


def test_lethe_is_set_against_stock_on_flashinfer_and_failures_by_nothing():
    copies = {"Memcpy DtoH (Device -> Pinned)": 64}
    records = {
        "m stock-flashinfer": record({"cudaEventSynchronize": 64}, copies=copies),
        "m lethe-flashinfer": record({"cudaEventSynchronize": 64, "cudaStreamSynchronize": 16}, copies=copies),
        "m lethe-triton": {"status": "failed", "message": "no"},
    }
    assert judged(records)["m lethe-flashinfer"] == "0.25, 0"
    del records["m stock-flashinfer"]
    assert judged(records)["m lethe-flashinfer"] == "-"


def test_one_wait_or_copy_too_many_is_seen():
    waits, copies = {"cudaEventSynchronize": 64}, {"Memcpy DtoH (Device -> Pinned)": 64}
    arms = {f"m {arm}": record(dict(waits), copies=dict(copies)) for arm in trace.ARMS_TRACED}
    assert set(judged(arms).values()) == {"0, 0"}
    arms["m lethe-triton"]["copies"]["Memcpy DtoH (Device -> Pageable)"] = 1
    assert judged(arms)["m lethe-triton"] == "0, 0.0156" and judged(arms)["m lethe-flashinfer"] == "0, 0"
    arms["m lethe-flashinfer"]["waits"]["cudaMemcpy"] = 1
    assert judged(arms)["m lethe-flashinfer"] == "0.0156, 0"


def test_the_table_has_a_row_a_server():
    records = {
        "m stock-flashinfer": record({"cudaEventSynchronize": 64}),
        "m lethe-triton": {"status": "failed", "message": "the server is gone | really"},
    }
    lines = trace.Trace().table(records)
    assert len(lines) == 4 and "| 64 | 64 | 64 | cudaEventSynchronize 1 | 2 | none | 0, 0 |" in lines[2]
    assert "failed: the server is gone / really" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
