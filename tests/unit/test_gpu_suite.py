"""The GPU suite as far as it goes without a GPU. Every figure here is made up."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from gpu_suite import floors, kernels, server, slots
from gpu_suite.__main__ import main
from gpu_suite.goals import GOALS, Goal
from gpu_suite.grid import Point, points
from gpu_suite.models import MODELS, Shape, write_model
from gpu_suite.report import PARTS, report
from gpu_suite.results import Results, SuiteError

ROOT = Path(__file__).parents[2]
TINY = Shape("LlamaForCausalLM", 3, 4, 2, 32, 64, 100, 256, 1e4, head_dim=8)
ABOUT = {
    "command": "bash scripts/gpu_suite.sh micro",
    "date": "2000-01-01T00:00:00+00:00",
    "gpus": ["TEST-GPU"],
    "machine": {},
    "versions": {"torch": "0.0"},
    "commit": "test",
}


def listed(capsys, *arguments):
    assert main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_imports_no_torch_and_writes_nothing(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['gpu_suite', 'all', '--dry-run', '--out', sys.argv[1]]\n"
        f"sys.path.append({str(ROOT / 'scripts')!r})\n"
        "try: runpy.run_module('gpu_suite', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "loaded = {'torch', 'triton', 'flashinfer', 'sglang'} & set(sys.modules); assert not loaded, loaded"
    )
    out = tmp_path / "results"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "micro llama-3.1-8b" in done.stdout and not out.exists()


def test_the_script_runs_the_suite_from_anywhere(tmp_path):
    (tmp_path / "lethe_sglang.py").write_text("raise ImportError('not the one of the checkout')")
    command = ["bash", str(ROOT / "scripts" / "gpu_suite.sh"), "all", "--dry-run"]
    environment = {**os.environ, "LETHE_PYTHON": sys.executable, "PYTHONPATH": "elsewhere"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = dict.fromkeys(line.split()[0] for line in done.stdout.splitlines())
    assert list(parts) == ["python", "micro", "server", "trace", "greedy", "report:"]


def test_kernels_are_listed_file_by_file(capsys):
    files = {line.split()[-1] for line in listed(capsys, "kernels")}
    assert {"tests/kernels/test_triton_score.py", "tests/kernels/test_triton_repack.py"} <= files
    assert all((ROOT / file).is_file() for file in files)


def test_the_grid_of_the_issue_is_listed(capsys):
    lines = listed(capsys, "micro", "--model", "qwen2.5-7b")
    for batch in (1, 16, 64, 256):
        for kept in (512, 1024, 4096):
            for prefix in (0, 4096, 32768):
                for kernel in ("score", "attention", "indices"):
                    key = f"{kernel} batch={batch} kept={kept} prefix={prefix}"
                    assert sum(f": {key}  floor" in line for line in lines) == 1, key
            assert any(f"repack batch={batch} kept={kept} " in line for line in lines)
            assert any(f"score-fp8 batch={batch} kept={kept} prefix=0 " in line for line in lines)
    assert len(lines) == 108 + 24 + 8 + 1 + 12
    assert len({point.key for point in points()}) == len(points())


def test_servers_are_listed_with_their_command_lines(capsys):
    lines = [line for line in listed(capsys, "server") if "launch_server" in line]
    assert len(lines) == 2 * (3 * 6 + 3 * 4) + 4
    assert all("--load-format dummy" in line and str(ROOT) not in line for line in lines)
    by_arm = {arm: [line for line in lines if f" {arm} #1:" in line] for arm in server.ARMS}
    assert all("--attention-backend" not in line and "--kv-evict" not in line for line in by_arm["stock"])
    assert all("--attention-backend flashinfer" in line for line in by_arm["stock-flashinfer"])
    assert all("--attention-backend triton --kv-evict lethe" in line for line in by_arm["lethe-triton"])
    assert all(" ample" in line for line in by_arm["idle-flashinfer"])
    for policy in ("lethe", "stock"):  # each beside the arm that differs in the KV cache's type alone
        wide, narrow = by_arm[f"{policy}-flashinfer"], by_arm[f"{policy}-flashinfer-fp8"]
        assert [line.split()[1:3] for line in narrow] == [["qwen2.5-7b", "full-16k"], ["qwen2.5-7b", "ample-4k"]]
        plain = [line.replace("-fp8", "").replace(" --kv-cache-dtype fp8_e4m3", "") for line in narrow]
        assert set(plain) <= set(wide) and all(" --kv-cache-dtype fp8_e4m3" in line for line in narrow)
    assert {case.concurrency for case in server.CASES} >= {1, 512}
    assert {case.output_len for case in server.CASES} == {4096, 16384, 32000}


@pytest.mark.parametrize("run", server.runs(list(MODELS)), ids=lambda run: run.key)
def test_every_run_is_one_that_the_benchmark_accepts(run):
    plan, case = server.plan_of(run, Path("models")), run.case
    plan.check()
    assert plan.input_len + plan.output_len <= MODELS[run.model].context
    everything = case.concurrency * (case.input_len + case.output_len)
    assert (case.pool > everything) == case.name.startswith("ample")


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    torch = argparse.Namespace(cuda=argparse.Namespace(is_available=lambda: False))  # the real one takes seconds
    monkeypatch.setitem(sys.modules, "torch", torch)
    for part in (*PARTS, "all"):
        assert main([part, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "gpu_suite: error: no CUDA device here; nothing was run. --dry-run lists what would run"
        ]
    assert not list(tmp_path.iterdir())


# -- byte floors, against numbers worked out by hand -------------------------------------------------------------------


def test_byte_floors():
    # K of a cell 2 x 8 x 2 = 32, index 4, score 8; a request 4 x (16 + 4) + 4 + 4 + 4 + 8 = 100; one more list end
    assert floors.score_bytes(TINY, batch=2, kept=3) == 2 * (3 * 44 + 100) + 4 == 468
    assert floors.score_bytes(TINY, batch=2, kept=3, recurrence=True) == 468 + 2 * 3 * 8
    assert floors.score_bytes(TINY, batch=2, kept=3, fp8=True) == 468 - 2 * 3 * 16, "a key of fp8 has half the bytes"
    # K and V 64, index 4; query and output 4 x 32, log-sum-exp 16, list end 4
    assert floors.attention_bytes(TINY, batch=2, length=5) == 2 * (5 * 68 + 148) + 4 == 980
    # layer 1 of 3, 4 packed cells: numbers 4 to 7 lie in blocks 1 and 2; 2 + 4 + 1 entries written, 2 + 2 + 1 read
    assert floors.indices_bytes(3, batch=2, prefix=2, packed=4, tail=1, layer=1) == 2 * (28 + 20 + 36) + 4 == 172
    assert floors.indices_bytes(3, batch=1, prefix=2, packed=0, tail=1, layer=1) == 12 + 12 + 36 + 4
    # K, V, score 68, four times; two int64 indices, twice
    assert floors.repack_bytes(TINY, cells=10) == 10 * (272 + 32) == 3040
    assert floors.select_bytes(segments=6, candidates=10) == 6 * 78 == 468
    assert floors.zero_bytes(layers=3, tokens=5) == 5 * 20 == 100
    assert floors.schedule_bytes(batch=4) == 128
    qwen = MODELS["qwen2.5-7b"]  # K of a cell 4 x 128 x 2 = 1024; a request 28 x 260 + 20 = 7300
    assert floors.score_bytes(qwen, 64, 1024) == 64 * (1024 * 1036 + 7300) + 4 == 68_362_500


def test_fp8_keys_change_a_points_floor_and_its_search_but_no_goal():
    wide, narrow = Point("score", 64, 512), Point("score-fp8", 64, 512)
    assert floors.floor_of(TINY, wide) - floors.floor_of(TINY, narrow) == 64 * 512 * 16
    assert narrow.tuned_at == Point("score-fp8", 64, 1024)
    assert floors.memory_of(TINY, narrow) == floors.memory_of(TINY, wide), "they are made as bf16"
    micro = {narrow.key: timed(1.0), wide.key.replace("score", "attention"): timed(1.0)}
    records = {name: {} for name in PARTS} | {"micro": {"qwen2.5-7b": micro}}
    assert not any(goal.values(records) for goal in GOALS)


def test_the_floor_of_a_round_is_that_of_its_halves():
    shape = MODELS["llama-3.1-8b"]
    found = {name: floors.floor_of(shape, Point(name, 64, 1024)) for name in ("round", "repack", "select")}
    assert found["round"] == found["repack"] + found["select"]
    assert found["repack"] == floors.repack_bytes(shape, 64 * 32 * (1024 - 307))


# -- results -----------------------------------------------------------------------------------------------------------


def results(path, keys=("a", "b"), **changes):
    return Results(path, {"part": "micro", **ABOUT, **changes}, keys, changes.pop("fresh", False))


def test_results_are_on_disk_after_each_record_and_taken_up(tmp_path):
    path = tmp_path / "micro.json"
    first = results(path)
    first.add("a", {"status": "failed", "message": "test"})
    body = json.loads(path.read_text())
    assert body["gpus"] == ["TEST-GPU"] and body["command"] and body["date"] and body["versions"]
    assert not body["finished"] and list(body["records"]) == ["a"]
    second = results(path)
    assert second.todo() == ["b"]
    second.add("b", {"status": "partial", "message": "test"})
    assert second.todo() == ["b"] and not json.loads(path.read_text())["finished"]
    second.add("b", {"status": "failed", "message": "test"})
    assert json.loads(path.read_text())["finished"]


@pytest.mark.parametrize("name, value", [("gpus", ["OTHER"]), ("versions", {"torch": "1"}), ("commit", "other")])
def test_results_of_another_gpu_version_or_commit_are_not_mixed(tmp_path, name, value):
    results(tmp_path / "micro.json").add("a", {"status": "failed", "message": "test"})
    with pytest.raises(SuiteError, match=name):
        results(tmp_path / "micro.json", **{name: value})


def test_a_refusal_is_a_record_and_not_a_crash(monkeypatch, tmp_path):
    from lethe_sglang.config import ConfigError
    from lethe_sglang.engine.guard import check_options
    from lethe_sglang.evaluation import bench
    from lethe_sglang.evaluation.servers import ServerError

    monkeypatch.setattr("lethe_sglang.engine.guard.REFUSALS", ())
    config = argparse.Namespace(
        device="cuda", attention_backend="nobackend", prefill_attention_backend=None, decode_attention_backend=None
    )
    with pytest.raises(ConfigError) as refusal:
        check_options(config)

    def refuse(plan, arm, *_):
        if arm == "stock":
            raise ServerError("the server ended with status 1 before it was ready:\nno space left")
        raise ServerError(f"the server ended with status 2 before it was ready:\nlethe: error: {refusal.value}\nbye")

    monkeypatch.setattr(bench, "measure", refuse)
    monkeypatch.setattr(server, "write_model", lambda *_: None)
    planned = server.runs(["qwen2.5-7b"])
    found = results(tmp_path / "server.json", [run.key for run in planned], part="server")
    server.run_all(found, time.monotonic() + 500, planned, tmp_path)
    assert found.todo() == []
    for key, record in found.records.items():
        assert record["status"] == ("failed" if " stock" in key else "refused"), key
    assert found.records["qwen2.5-7b full-16k lethe-flashinfer #1"]["message"] == f"refused: {refusal.value}"


def test_a_server_that_outlasts_the_slot_is_recorded_only_if_it_had_all_of_it(monkeypatch, tmp_path):
    from lethe_sglang.evaluation import bench
    from lethe_sglang.evaluation.servers import ServerError

    monkeypatch.setattr(bench, "measure", lambda *_: time.sleep(5))
    monkeypatch.setattr(server, "write_model", lambda *_: None)
    monkeypatch.setattr(slots, "LEAST_SECONDS", 0)
    planned = server.runs(["qwen2.5-7b"])[:2]
    keys = [run.key for run in planned]
    found = results(tmp_path / "server.json", keys, part="server")
    started = time.monotonic()
    server.run_all(found, started + 1.5, planned, tmp_path)
    assert time.monotonic() - started < 4
    assert {key: record["status"] for key, record in found.records.items()} == {keys[0]: "unfinished"}

    def quick_then_slow(plan, arm, *_):
        time.sleep(0 if arm == "stock" else 5)
        raise ServerError("test")

    monkeypatch.setattr(bench, "measure", quick_then_slow)
    found = results(tmp_path / "other.json", keys, part="server")
    server.run_all(found, time.monotonic() + 1.5, planned, tmp_path)
    assert {key: record["status"] for key, record in found.records.items()} == {keys[0]: "failed"}


def test_junit_counts(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
        '<testcase name="bad"><failure/></testcase><testcase name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    record = kernels.junit_record(path, 1, "")
    assert record == {"status": "failed", "tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["bad"]}
    assert kernels.junit_record(tmp_path / "none.xml", 4, "a\nb")["message"] == "a\nb"


def test_a_models_files_are_those_of_the_model(tmp_path):
    folder = write_model(tmp_path / "tiny", TINY)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (3, 2, 100)
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 100


# -- goals and report --------------------------------------------------------------------------------------------------


def goal(least=True, planned=2, found=(), necessary=False):
    return Goal("test", 10, least, " u", planned, lambda records: list(found), necessary)


@pytest.mark.parametrize(
    "marked, start",
    [
        (goal(), "not yet run on a GPU"),
        (goal(found=[("x", 10), ("y", 30)]), "met: worst 10 u (x); 2 of 2"),
        (goal(found=[("x", 9.9), ("y", 30)]), "missed: worst 9.9 u (x); 1 of 2"),
        (goal(found=[("x", 9.9)]), "missed: worst 9.9 u (x); 0 of 1"),
        (goal(found=[("x", 30)]), "not yet run on a GPU in full: 1 of 2 points"),
        (goal(least=False, found=[("x", 10), ("y", 3)]), "met: worst 10 u (x)"),
        (goal(least=False, found=[("x", 11), ("y", 3)]), "missed: worst 11 u (x); 1 of 2"),
        (goal(necessary=True, found=[("x", 10), ("y", 30)]), "not yet run on a GPU as a whole"),
        (goal(necessary=True, found=[("x", 1), ("y", 30)]), "missed: worst 1 u (x)"),
    ],
)
def test_a_goal_is_met_missed_or_not_yet_run(marked, start):
    assert marked.mark({}).startswith(start)


def timed(us, of_copy=0.9):
    return {
        "status": "measured",
        "median_us": us,
        "p10_us": us,
        "p90_us": us,
        "floor_bytes": 1000,
        "of_copy": of_copy,
        "of_peak_copy": 0.5,
    }


def served(tokens_per_second, tokens_held, step=10.0):
    return {
        "status": "measured",
        "times": {"output_throughput": tokens_per_second, "median_tpot_ms": step},
        "held": {"tokens_mean": tokens_held, "running_mean": 10, "retracted_requests": 0},
    }


def test_the_report_marks_every_goal_from_the_json(tmp_path):
    key = "batch=64 kept=1024 prefix=0"
    micro = {
        f"score {key}": timed(50.0),
        f"attention {key}": timed(100.0),
        f"indices {key}": timed(20.0),
        f"repack {key}": timed(9.0, of_copy=0.6),
        f"round {key}": timed(1500.0),
        "score batch=256 kept=4096 prefix=32768": {"status": "skipped", "message": "needs 1 GiB"},
    }
    server = {
        "full-16k stock #1": served(100.0, 1000),
        "full-16k stock #2": served(120.0, 1000),
        "full-16k stock #3": served(900.0, 1000),
        "full-16k lethe-triton #1": served(300.0, 50),
        "full-16k lethe-flashinfer #1": {"status": "refused", "message": "refused: test reason"},
        "ample-4k stock #1": served(100.0, 1),
        "ample-4k lethe-triton #1": served(98.0, 1),
    }
    server = {f"qwen2.5-7b {key}": record for key, record in server.items()}
    for name, part, records in (("micro-qwen2.5-7b", "micro", micro), ("server-qwen2.5-7b", "server", server)):
        body = {"part": part, "model": "qwen2.5-7b", **ABOUT, "planned": [*records, "more"], "finished": False}
        (tmp_path / f"{name}.json").write_text(json.dumps(body | {"records": records}))
    assert main(["report", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    states = [line.split(" | ")[1] for line in page.splitlines()[6 : 6 + len(GOALS)]]
    starts = [
        "not yet run on a GPU in full: 1 of 72 points; worst 90 %",
        "not yet run on a GPU in full: 1 of 24 points; worst 0.5x",
        "missed: worst 60 %",
        "missed: worst 5.6 %",
        "not yet run on a GPU as a whole; the part that was: worst 1.5 ms",
        "not yet run on a GPU in full: 1 of 12 points; worst 0.98x",
        "missed: worst 2.5x",
        "not yet run on a GPU in full: 1 of 4 points; worst 95 %",
        "not yet run on a GPU",
        "not yet run on a GPU",
        "not yet run on a GPU",
        "not yet run on a GPU",
    ]
    assert len(states) == len(starts) == len(GOALS)
    for state, start in zip(states, starts, strict=True):
        assert state.startswith(start), (state, start)
    assert "refused: test reason" in page and "skipped: needs 1 GiB" in page and "TEST-GPU" in page
    assert page.count("**Unfinished**") == 2 and "## kernels\n\nNot yet run on a GPU." in page


def test_an_empty_folder_gives_a_page_on_which_nothing_was_run(tmp_path):
    page = report(tmp_path)
    assert page.count("| not yet run on a GPU |") == len(GOALS)
    assert all(f"## {name}\n\nNot yet run on a GPU." in page for name in PARTS)
    assert "met:" not in page and "missed" not in page
