"""The GPU suite as far as it goes without a GPU. Every figure here is made up."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lethe_bench.gpu import bench, check, floors
from lethe_bench.gpu.base import failure
from lethe_bench.gpu.grid import Point, points
from lethe_bench.gpu.kernels import LAUNCHED
from lethe_bench.gpu.models import MODELS, Shape, write_model
from lethe_bench.gpu.report import PARTS, report
from lethe_bench.gpu.results import Results, header
from lethe_bench.servers import ServerError
from lethe_sglang.cli.main import main
from lethe_sglang.config import ConfigError, from_mapping

ROOT = Path(__file__).parents[2]
TINY = Shape("LlamaForCausalLM", 3, 4, 2, 32, 64, 100, 256, 1e4, head_dim=8)
ABOUT = {
    "part": "kernels",
    "command": "lethe gpu kernels",
    "date": "2000-01-01T00:00:00+00:00",
    "gpus": ["TEST-GPU"],
    "machine": {},
    "versions": {"torch": "0.0"},
    "commit": "test",
    "planned": ["a", "b"],
}


def listed(capsys, *arguments):
    assert main(["gpu", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


# -- dry runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [arm for arm, (_, options) in check.ARMS.items() if options is not None])
def test_a_server_that_is_checked_compares_what_it_reads_where_no_graph_is_replayed(arm):
    arguments, options = check.ARMS[arm]
    config = from_mapping(options)
    assert config.debug.shadow == ("--disable-cuda-graph" in arguments)
    layers = json.loads((check.MODEL / "config.json").read_text())["num_hidden_layers"]
    assert len(config.budget.layers or range(layers)) == layers


def test_a_dry_run_imports_no_torch_and_writes_nothing(tmp_path):
    code = (
        "import sys; from lethe_sglang.cli.main import main\n"
        "assert main(['gpu', 'all', '--dry-run', '--out', sys.argv[1]]) == 0\n"
        "loaded = {'torch', 'triton', 'flashinfer', 'sglang'} & set(sys.modules); assert not loaded, loaded"
    )
    out = tmp_path / "results"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels llama-3.1-8b" in done.stdout and not out.exists()
    parts = dict.fromkeys(line.split()[0] for line in done.stdout.splitlines())
    assert list(parts) == ["kernels", "bench", "trace", "greedy", "report:"]


def test_the_grid_of_the_issue_is_listed(capsys):
    lines = listed(capsys, "kernels", "--model", "qwen2.5-7b")
    for batch in (1, 16, 64, 256):
        for kept in (512, 1024, 4096):
            for prefix in (0, 4096, 32768):
                for kernel in ("score", "attention", "indices"):
                    key = f"{kernel} batch={batch} kept={kept} prefix={prefix}"
                    assert sum(f" {key}: byte floor " in line for line in lines) == 1, key
            assert any(f"repack batch={batch} kept={kept} " in line for line in lines)
            assert any(f"score-fp8 batch={batch} kept={kept} prefix=0:" in line for line in lines)
    assert len(lines) == 108 + 48 + 8 + 1 + 12
    assert len({point.key for point in points()}) == len(points())


def test_servers_are_listed_with_their_command_lines(capsys):
    lines = [line for line in listed(capsys, "bench")]
    assert len(lines) == 2 * (3 * 6 + 3 * 4) + 4
    assert all("--load-format dummy" in line and str(ROOT) not in line for line in lines)
    by_arm = {arm: [line for line in lines if f" {arm}:" in line] for arm in bench.ARMS}
    assert all("--attention-backend" not in line and "--kv-evict" not in line for line in by_arm["stock"])
    assert all("--attention-backend flashinfer" in line for line in by_arm["stock-flashinfer"])
    assert all("--attention-backend triton --kv-evict lethe" in line for line in by_arm["lethe-triton"])
    assert all(" ample" in line for line in by_arm["idle-flashinfer"])
    for policy in ("lethe", "stock"):  # each beside the arm that differs in the KV cache's type alone
        wide, narrow = by_arm[f"{policy}-flashinfer"], by_arm[f"{policy}-flashinfer-fp8"]
        assert [line.split()[1:3] for line in narrow] == [["qwen2.5-7b", "full-16k"], ["qwen2.5-7b", "ample-4k"]]
        plain = [line.replace("-fp8", "").replace(" --kv-cache-dtype fp8_e4m3", "") for line in narrow]
        assert set(plain) <= set(wide) and all(" --kv-cache-dtype fp8_e4m3" in line for line in narrow)
    assert {case.concurrency for case in bench.CASES} >= {1, 512}
    assert {case.output_len for case in bench.CASES} == {4096, 16384, 32000}


@pytest.mark.parametrize("run", bench.runs(), ids=lambda run: run.key)
def test_every_run_is_one_that_the_benchmark_accepts(run):
    plan, case = run.plan(), run.case
    plan.check()
    assert plan.input_len + plan.output_len <= MODELS[run.model].context
    everything = case.concurrency * (case.input_len + case.output_len)
    assert (case.pool > everything) == case.name.startswith("ample")


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    torch = argparse.Namespace(cuda=argparse.Namespace(is_available=lambda: False))  # the real one takes seconds
    monkeypatch.setitem(sys.modules, "torch", torch)
    for part in (*PARTS, "all"):
        assert main(["gpu", part, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "lethe gpu: error: no CUDA device here; nothing was run. --dry-run lists what would run"
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
    assert floors.places_bytes(segments=6, candidates=10) == 6 * 130 == 780
    # K 32, its cell 4, a flag and the likeness 4
    assert floors.likeness_bytes(TINY, segments=6, candidates=10) == 6 * 10 * 41 == 2460
    assert floors.zero_bytes(layers=3, tokens=5) == 5 * 20 == 100
    assert floors.schedule_bytes(batch=4) == 128
    qwen = MODELS["qwen2.5-7b"]  # K of a cell 4 x 128 x 2 = 1024; a request 28 x 260 + 20 = 7300
    assert floors.score_bytes(qwen, 64, 1024) == 64 * (1024 * 1036 + 7300) + 4 == 68_362_500


def test_fp8_keys_change_a_points_floor():
    wide, narrow = Point("score", 64, 512), Point("score-fp8", 64, 512)
    assert floors.floor_of(TINY, wide) - floors.floor_of(TINY, narrow) == 64 * 512 * 16
    assert floors.memory_of(TINY, narrow) == floors.memory_of(TINY, wide), "they are made as bf16"


def test_the_floor_of_a_round_is_that_of_its_halves():
    shape = MODELS["llama-3.1-8b"]
    found = {name: floors.floor_of(shape, Point(name, 64, 1024)) for name in ("round", "repack", "select")}
    assert found["round"] == found["repack"] + found["select"]
    assert found["repack"] == floors.repack_bytes(shape, 64 * 32 * (1024 - 308))


# -- results -----------------------------------------------------------------------------------------------------------


def results(path, **changes):
    return Results(path, {**ABOUT, **changes}, changes.pop("fresh", False))


def test_results_are_on_disk_after_each_record_and_taken_up(tmp_path):
    path = tmp_path / "kernels.jsonl"
    results(path).add("a", {"status": "failed", "message": "test"})
    about, *lines = map(json.loads, path.read_text().splitlines())
    assert about["gpus"] == ["TEST-GPU"] and about["command"] and about["date"] and about["versions"]
    assert [line["key"] for line in lines] == ["a"]
    with path.open("a") as file:
        file.write('{"key": "b", "status": "fai')  # a kill
    second = results(path, date="later")
    assert second.records == {"a": {"status": "failed", "message": "test"}}
    second.add("b", {"status": "failed", "message": "test"})
    assert list(results(path).records) == ["a", "b"]
    anew = results(path, fresh=True)
    assert anew.records == {} and list(results(path).records) == ["a", "b"], "nothing is lost before there is a record"
    anew.add("b", {"status": "failed", "message": "test"})
    assert list(results(path).records) == ["b"]


@pytest.mark.parametrize("name, value", [("gpus", ["OTHER"]), ("versions", {"torch": "1"}), ("commit", "other")])
def test_results_of_another_gpu_version_or_commit_are_not_mixed(tmp_path, name, value):
    results(tmp_path / "kernels.jsonl").add("a", {"status": "failed", "message": "test"})
    with pytest.raises(ConfigError, match=name):
        results(tmp_path / "kernels.jsonl", **{name: value})


def test_a_header_says_what_a_reader_needs_and_no_path_of_this_machine():
    found = header("bench", ["a"], ["bench", "/private/out"])
    assert found["command"] == "lethe gpu bench out" and found["planned"] == ["a"] and "sglang" in found["versions"]
    assert "gpus" not in found["machine"] and set(found) == set(ABOUT)


def test_a_refusal_is_a_record_and_not_a_crash(monkeypatch, tmp_path):
    from lethe_sglang.engine.guard import check_options

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

    monkeypatch.setattr(bench.measure, "measure", refuse)
    monkeypatch.setattr(bench, "write_model", lambda *_: None)
    found, part = results(tmp_path / "bench.jsonl"), PARTS["bench"]
    part.work(found, "qwen2.5-7b")
    assert list(found.records) == list(part.listing("qwen2.5-7b"))
    for key, record in found.records.items():
        assert record["status"] == ("failed" if " stock" in key else "refused"), key
        assert "launch_server" in record["runs"] and str(ROOT) not in record["runs"]
    assert found.records["qwen2.5-7b full-16k lethe-flashinfer"]["message"] == str(refusal.value)
    monkeypatch.setattr(bench.measure, "measure", lambda *_: pytest.fail("measured again"))
    part.work(results(tmp_path / "bench.jsonl"), "qwen2.5-7b")


@pytest.mark.parametrize(
    ("message", "status", "kept"),
    [
        ("the server ended:\nlethe: error: no such backend\nbye", "refused", "no such backend"),
        ("Traceback\nlethe_sglang.config.errors.ConfigError: a reason\n", "refused", "a reason"),
        ("1\n2\n3\n4\n5\n6", "failed", "2\n3\n4\n5\n6"),
    ],
)
def test_a_refusal_is_told_from_a_failure(message, status, kept):
    assert failure(message) == {"status": status, "message": kept}


def test_a_point_that_fails_is_recorded_and_a_broken_device_ends_the_part(monkeypatch, tmp_path):
    part, found = type(PARTS["kernels"])(), results(tmp_path / "kernels.jsonl")
    monkeypatch.setattr("lethe_bench.gpu.kernels._free_bytes", lambda: 2**36)
    last = list(part.listing("qwen2.5-7b"))[1]

    def time(model, shape, point):
        raise ValueError("of this point") if point == points()[0] else RuntimeError("CUDA error: of the device")

    monkeypatch.setattr(part, "_time", time)
    with pytest.raises(ConfigError, match=f"{last}: RuntimeError: CUDA error: of the device"):
        part.work(found, "qwen2.5-7b")
    assert [record["message"] for record in found.records.values()] == ["ValueError: of this point"]


def test_a_point_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr("lethe_bench.gpu.kernels._free_bytes", lambda: 1000)
    key = next(iter(PARTS["kernels"].listing()))
    assert PARTS["kernels"].measure(key)["status"] == "skipped"


def test_what_servers_take_is_timed_and_every_other_configuration_beside_it(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from lethe_bench.gpu import launches
    from lethe_sglang.kernels.triton import KERNELS, launchers

    assert set(LAUNCHED) == set(launches.MAKERS) - {"attention", "round"}
    assert {name for names in LAUNCHED.values() for name in names} < set(KERNELS) and launchers
    kernel, part = KERNELS["_score"], type(PARTS["kernels"])()

    class Bench:
        def time(self, run):
            config = run()
            if config is kernel.configs[0] and len(kernel.configs) == 1 and config.kwargs["BLOCK_N"] == 16:
                raise OutOfResources(300_000, 230_000, "shared memory")
            return {"median_us": 100.0 - config.kwargs["BLOCK_N"]}

        def measure(self, run, floor):
            shares = dict.fromkeys(("p10_us", "p90_us", "of_copy", "of_peak_copy"), 1)
            return {"status": "measured", **shares, "floor_bytes": floor, **self.time(run)}

    monkeypatch.setitem(vars(part), "_bench", Bench())
    monkeypatch.setitem(launches.MAKERS, "score", lambda shape, point: lambda: kernel.configs[0])
    known = list(kernel.configs)
    found = part._time("qwen2.5-7b", MODELS["qwen2.5-7b"], Point("score", 16, 1024))
    assert found["median_us"] == 68 and kernel.configs == known
    assert [other["configuration"] for other in found["others"]] == [config.all_kwargs() for config in known[1:]]
    assert [other.get("median_us") for other in found["others"]] == [68, 36, -28, -28, None]
    assert "shared memory" in found["others"][-1]["message"]
    assert part.table({"a": found})[-1].endswith(
        "| -0.41: _score with BLOCK_N 128, num_warps 8, num_ctas 1, num_stages 2 |"
    )
    long = part._time("qwen2.5-7b", MODELS["qwen2.5-7b"], Point("score", 16, 1024, 4096))
    assert "others" not in long and part.table({"a": long})[-1].endswith("| - |")


def test_a_points_round_is_that_of_a_server_at_its_defaults():
    config = from_mapping({"budget": {"tokens": 1024}})
    point = Point("select", 64, 1024)
    assert (
        (point.tail, point.candidates) == (config.recent, 1024 - config.recent + config.rounds.interval) == (308, 844)
    )


def test_a_models_files_are_those_of_the_model(tmp_path):
    folder = write_model(tmp_path / "tiny", TINY)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (3, 2, 100)
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 100


# -- report ------------------------------------------------------------------------------------------------------------


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


def test_the_report_sets_kernels_against_copies_and_servers_against_stock(tmp_path, capsys):
    kernels = {
        "qwen2.5-7b score batch=64 kept=1024 prefix=0": timed(50.0),
        "qwen2.5-7b score batch=256 kept=4096 prefix=32768": {"status": "skipped", "message": "needs 1 GiB"},
    }
    servers = {
        "qwen2.5-7b full-16k stock": served(100.0, 1000),
        "qwen2.5-7b full-16k lethe-triton": served(250.0, 50),
        "qwen2.5-7b full-16k lethe-flashinfer": {"status": "refused", "message": "test | reason"},
        "llama-3.1-8b ample-4k lethe-triton": served(98.0, 10),
    }
    for name, records in (("kernels", kernels), ("bench", servers)):
        found = results(tmp_path / f"{name}.jsonl", part=name, planned=[*records, "more"])
        for key, record in records.items():
            found.add(key, record)
    capsys.readouterr()
    assert main(["gpu", "report", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| qwen2.5-7b score batch=64 kept=1024 prefix=0 | 50.0 (50.0 to 50.0) | 0.001 | 90% | 50% | - |" in page
    assert "| qwen2.5-7b full-16k lethe-triton | 250 | 2.50 | 10.00 | 10.0 | 5 | 0.05 | 0 |" in page
    assert "| llama-3.1-8b ample-4k lethe-triton | 98 | - | 10.00 | 10.0 | 1 | - | 0 |" in page
    assert "refused: test / reason" in page and "skipped: needs 1 GiB" in page and "TEST-GPU" in page
    assert page.count("**Unfinished**") == 2 and "## trace\n\nNot yet run on a GPU." in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {7, 9}


def test_an_empty_folder_gives_a_page_on_which_nothing_was_run(tmp_path):
    page = report(tmp_path)
    assert all(f"## {name}\n\nNot yet run on a GPU." in page for name in PARTS)
