"""The GPU suite and its bundle as far as they go without a GPU. Every figure here is made up."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite, bundle = script("gpu_suite"), script("gpu_bundle")
TINY = suite.Shape("LlamaForCausalLM", 3, 4, 2, 32, 64, 100, 256, 1e4, head_dim=8)
ABOUT = {"command": "bash scripts/gpu_suite.sh micro", "date": "2000-01-01T00:00:00+00:00", "gpus": ["TEST-GPU"],
         "machine": {}, "versions": {"torch": "0.0"}, "commit": "test"}  # fmt: skip


def listed(capsys, *arguments):
    assert suite.main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_imports_no_torch_and_writes_nothing(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['gpu_suite.py', 'all', '--dry-run', '--out', sys.argv[1]]\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / 'gpu_suite.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "loaded = {'torch', 'triton', 'flashinfer', 'sglang'} & set(sys.modules); assert not loaded, loaded"
    )
    out = tmp_path / "results"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "micro llama-3.1-8b" in done.stdout and not out.exists()


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
    assert len(lines) == 108 + 24 + 8 + 1
    assert len({point.key for point in suite.points()}) == len(suite.points())


def test_servers_are_listed_with_their_command_lines(capsys):
    lines = [line for line in listed(capsys, "server") if "launch_server" in line]
    assert len(lines) == 2 * (3 * 6 + 3 * 4)
    assert all("--load-format dummy" in line and str(ROOT) not in line for line in lines)
    by_arm = {arm: [line for line in lines if f" {arm} #1:" in line] for arm in suite.ARMS}
    assert all("--attention-backend" not in line and "--kv-evict" not in line for line in by_arm["stock"])
    assert all("--attention-backend flashinfer" in line for line in by_arm["stock-flashinfer"])
    assert all("--attention-backend triton --kv-evict lethe" in line for line in by_arm["lethe-triton"])
    assert all(" ample" in line for line in by_arm["idle-flashinfer"])
    assert {case.concurrency for case in suite.CASES} >= {1, 512}
    assert {case.output_len for case in suite.CASES} == {4096, 16384, 32000}


@pytest.mark.parametrize("run", suite.runs(list(suite.MODELS)), ids=lambda run: run.key)
def test_every_run_is_one_that_the_benchmark_accepts(run):
    plan, case = suite.plan_of(run, Path("models")), run.case
    plan.check()
    assert plan.input_len + plan.output_len <= suite.MODELS[run.model].context
    everything = case.concurrency * (case.input_len + case.output_len)
    assert (case.pool > everything) == case.name.startswith("ample")


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    torch = argparse.Namespace(cuda=argparse.Namespace(is_available=lambda: False))  # the real one takes seconds
    monkeypatch.setitem(sys.modules, "torch", torch)
    for part in ("kernels", "micro", "server", "all"):
        assert suite.main([part, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "gpu_suite: error: no CUDA device here; nothing was run. --dry-run lists what would run"
        ]
    assert not list(tmp_path.iterdir())


# -- byte floors, against numbers worked out by hand -------------------------------------------------------------------


def test_byte_floors():
    # K of a cell 2 x 8 x 2 = 32, index 4, score 8; a request 4 x (16 + 4) + 4 + 4 + 4 + 8 = 100; one more list end
    assert suite.score_bytes(TINY, batch=2, kept=3) == 2 * (3 * 44 + 100) + 4 == 468
    assert suite.score_bytes(TINY, batch=2, kept=3, recurrence=True) == 468 + 2 * 3 * 8
    # K and V 64, index 4; query and output 4 x 32, log-sum-exp 16, list end 4
    assert suite.attention_bytes(TINY, batch=2, length=5) == 2 * (5 * 68 + 148) + 4 == 980
    # layer 1 of 3, 4 packed cells: numbers 4 to 7 lie in blocks 1 and 2; 2 + 4 + 1 entries written, 2 + 2 + 1 read
    assert suite.indices_bytes(3, batch=2, prefix=2, packed=4, tail=1, layer=1) == 2 * (28 + 20 + 36) + 4 == 172
    assert suite.indices_bytes(3, batch=1, prefix=2, packed=0, tail=1, layer=1) == 12 + 12 + 36 + 4
    # K, V, score 68, four times; two int64 indices, twice
    assert suite.repack_bytes(TINY, cells=10) == 10 * (272 + 32) == 3040
    assert suite.select_bytes(segments=6, candidates=10) == 6 * 78 == 468
    assert suite.zero_bytes(layers=3, tokens=5) == 5 * 20 == 100
    assert suite.schedule_bytes(batch=4) == 128
    qwen = suite.MODELS["qwen2.5-7b"]  # K of a cell 4 x 128 x 2 = 1024; a request 28 x 260 + 20 = 7300
    assert suite.score_bytes(qwen, 64, 1024) == 64 * (1024 * 1036 + 7300) + 4 == 68_362_500


def test_the_floor_of_a_round_is_that_of_its_halves():
    shape = suite.MODELS["llama-3.1-8b"]
    floors = {name: suite.floor_of(shape, suite.Point(name, 64, 1024)) for name in ("round", "repack", "select")}
    assert floors["round"] == floors["repack"] + floors["select"]
    assert floors["repack"] == suite.repack_bytes(shape, 64 * 32 * (1024 - 307))


# -- results -----------------------------------------------------------------------------------------------------------


def results(path, keys=("a", "b"), **changes):
    return suite.Results(path, {"part": "micro", **ABOUT, **changes}, keys, changes.pop("fresh", False))


def test_results_are_on_disk_after_each_record_and_taken_up(tmp_path):
    path = tmp_path / "micro.json"
    first = results(path)
    first.add("a", {"status": "failed", "message": "test"})
    body = json.loads(path.read_text())
    assert body["gpus"] == ["TEST-GPU"] and body["command"] and body["date"] and body["versions"]
    assert not body["finished"] and list(body["records"]) == ["a"]
    second = results(path)
    assert second.todo() == ["b"]
    second.add("b", {"status": "failed", "message": "test"})
    assert json.loads(path.read_text())["finished"]


@pytest.mark.parametrize("name, value", [("gpus", ["OTHER"]), ("versions", {"torch": "1"}), ("commit", "other")])
def test_results_of_another_gpu_version_or_commit_are_not_mixed(tmp_path, name, value):
    results(tmp_path / "micro.json").add("a", {"status": "failed", "message": "test"})
    with pytest.raises(suite.SuiteError, match=name):
        results(tmp_path / "micro.json", **{name: value})


def test_a_refusal_is_a_record_and_not_a_crash(monkeypatch, tmp_path):
    from lethe_sglang.config import ConfigError
    from lethe_sglang.engine.guard import check_options
    from lethe_sglang.evaluation import bench
    from lethe_sglang.evaluation.servers import ServerError

    monkeypatch.setattr("lethe_sglang.engine.guard.REFUSALS", ())
    config = argparse.Namespace(device="cuda", attention_backend="nobackend", prefill_attention_backend=None,
                                decode_attention_backend=None)  # fmt: skip
    with pytest.raises(ConfigError) as refusal:
        check_options(config)

    def refuse(plan, arm, *_):
        if arm == "stock":
            raise ServerError("the server ended with status 1 before it was ready:\nno space left")
        raise ServerError(f"the server ended with status 2 before it was ready:\nlethe: error: {refusal.value}\nbye")

    monkeypatch.setattr(bench, "measure", refuse)
    monkeypatch.setattr(suite, "write_model", lambda *_: None)
    keys = [run.key for run in suite.runs(["qwen2.5-7b"])]
    found = results(tmp_path / "server.json", keys, part="server")
    suite.run_servers(found, time.monotonic() + 500, "qwen2.5-7b", 1, tmp_path)
    assert found.todo() == []
    for key, record in found.records.items():
        assert record["status"] == ("failed" if " stock" in key else "refused"), key
    assert found.records["qwen2.5-7b full-16k lethe-flashinfer #1"]["message"] == f"refused: {refusal.value}"


def test_a_server_that_outlasts_the_slot_is_recorded_only_if_it_had_all_of_it(monkeypatch, tmp_path):
    from lethe_sglang.evaluation import bench

    monkeypatch.setattr(bench, "measure", lambda *_: time.sleep(5))
    monkeypatch.setattr(suite, "write_model", lambda *_: None)
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0)
    keys = [run.key for run in suite.runs(["qwen2.5-7b"])][:2]
    found = results(tmp_path / "server.json", keys, part="server")
    started = time.monotonic()
    suite.run_servers(found, started + 1.5, "qwen2.5-7b", 1, tmp_path)
    assert time.monotonic() - started < 4
    assert {key: record["status"] for key, record in found.records.items()} == {keys[0]: "unfinished"}


def test_junit_counts(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
        '<testcase name="bad"><failure/></testcase><testcase name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    record = suite.junit_record(path, 1, "")
    assert record == {"status": "failed", "tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["bad"]}
    assert suite.junit_record(tmp_path / "none.xml", 4, "a\nb")["message"] == "a\nb"


def test_a_models_files_are_those_of_the_model(tmp_path):
    folder = suite.write_model(tmp_path / "tiny", TINY)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (3, 2, 100)
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 100


# -- goals and report --------------------------------------------------------------------------------------------------


def goal(least=True, planned=2, found=(), necessary=False):
    return suite.Goal("test", 10, least, " u", planned, lambda records: list(found), necessary)


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
    return {"status": "measured", "median_us": us, "p10_us": us, "p90_us": us, "floor_bytes": 1000, "of_copy": of_copy,
            "of_peak_copy": 0.5}  # fmt: skip


def served(tokens_per_second, tokens_held, step=10.0):
    return {"status": "measured", "times": {"output_throughput": tokens_per_second, "median_tpot_ms": step},
            "held": {"tokens_mean": tokens_held, "running_mean": 10, "retracted_requests": 0}}  # fmt: skip


def test_the_report_marks_every_goal_from_the_json(tmp_path):
    key = "batch=64 kept=1024 prefix=0"
    micro = {f"score {key}": timed(50.0), f"attention {key}": timed(100.0), f"indices {key}": timed(20.0),
             f"repack {key}": timed(9.0, of_copy=0.6), f"round {key}": timed(1500.0),
             "score batch=256 kept=4096 prefix=32768": {"status": "skipped", "message": "needs 1 GiB"}}  # fmt: skip
    server = {"full-16k stock #1": served(100.0, 1000), "full-16k stock #2": served(120.0, 1000),
              "full-16k stock #3": served(900.0, 1000), "full-16k lethe-triton #1": served(300.0, 50),
              "full-16k lethe-flashinfer #1": {"status": "refused", "message": "refused: test reason"},
              "ample-4k stock #1": served(100.0, 1), "ample-4k lethe-triton #1": served(98.0, 1)}  # fmt: skip
    server = {f"qwen2.5-7b {key}": record for key, record in server.items()}
    for name, part, records in (("micro-qwen2.5-7b", "micro", micro), ("server-qwen2.5-7b", "server", server)):
        body = {"part": part, "model": "qwen2.5-7b", **ABOUT, "planned": [*records, "more"], "finished": False}
        (tmp_path / f"{name}.json").write_text(json.dumps(body | {"records": records}))
    assert suite.main(["report", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    states = [line.split(" | ")[1] for line in page.splitlines()[6:15]]
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
    ]
    assert len(states) == len(starts) == len(suite.GOALS)
    for state, start in zip(states, starts, strict=True):
        assert state.startswith(start), (state, start)
    assert "refused: test reason" in page and "skipped: needs 1 GiB" in page and "TEST-GPU" in page
    assert page.count("**Unfinished**") == 2 and "## kernels\n\nNot yet run on a GPU." in page


def test_an_empty_folder_gives_a_page_on_which_nothing_was_run(tmp_path):
    page = suite.report(tmp_path)
    assert page.count("| not yet run on a GPU |") == len(suite.GOALS)
    assert "met:" not in page and "missed" not in page


# -- bundle ------------------------------------------------------------------------------------------------------------


def packed(tmp_path, part_bytes=5000):
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("a.whl", 12_000), ("b.whl", 0), ("c.whl", 700)):
        (source / name).write_bytes(bytes(i * i % 251 for i in range(size)))
    return source, bundle.split(source.iterdir(), tmp_path / "bundle", part_bytes)


def test_parts_are_small_and_give_the_files_back(tmp_path):
    source, manifest = packed(tmp_path)
    parts = sorted((tmp_path / "bundle").glob("bundle.part-*"))
    assert [part["name"] for part in manifest["parts"]] == [part.name for part in parts] and len(parts) > 3
    assert all(0 < part.stat().st_size <= 5000 for part in parts) and bundle.PART_BYTES <= 60_000_000
    assert all(part["size"] == 5000 for part in manifest["parts"][:-1])
    files = bundle.unpack(tmp_path / "bundle", tmp_path / "target")
    assert {f.name: f.read_bytes() for f in files} == {f.name: f.read_bytes() for f in source.iterdir()}
    again = bundle.split(source.iterdir(), tmp_path / "bundle", 50_000)
    assert len(again["parts"]) == 1 and len(list((tmp_path / "bundle").glob("bundle.part-*"))) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_wrong_part_is_refused_before_anything_is_unpacked(tmp_path, capsys, damage):
    packed(tmp_path)
    part = tmp_path / "bundle" / "bundle.part-001"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data if damage == "flip" else data[:-1])
    if damage == "remove":
        part.unlink()
    target = tmp_path / "target"
    assert bundle.main(["unpack", str(tmp_path / "bundle"), "--to", str(target)]) == 1
    assert "bundle.part-001" in capsys.readouterr().err and not target.exists()


def test_a_file_with_a_wrong_hash_is_refused(tmp_path):
    _, manifest = packed(tmp_path)
    manifest["files"][0]["sha256"] = "0" * 64
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(bundle.BundleError, match=r"a\.whl is damaged"):
        bundle.unpack(tmp_path / "bundle", tmp_path / "target")


def test_flash_ops_is_taken_out_of_a_wheel_and_of_its_record(tmp_path):
    wheel = tmp_path / "sglang_kernel-0-py3-none-any.whl"
    record = "sgl_kernel/flash_ops.abi3.so,sha256=x,9\nsgl_kernel/flash_attn.py,sha256=y,1\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sgl_kernel/flash_ops.abi3.so", "too large")
        file.writestr("sgl_kernel/flash_attn.py", "1")
        file.writestr("sglang_kernel-0.dist-info/RECORD", record)
    assert bundle.trim(wheel, bundle.TRIMMED) == ["sgl_kernel/flash_ops.abi3.so"]
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["sgl_kernel/flash_attn.py", "sglang_kernel-0.dist-info/RECORD"]
        assert file.read("sglang_kernel-0.dist-info/RECORD").decode() == record.splitlines(True)[1]


def test_a_bundles_dry_run_lists_and_fetches_nothing(monkeypatch, capsys, tmp_path):
    pins = [bundle.Pin("one", "1.0", 50_000_000), bundle.Pin("two", "2.0", 50_000_000)]
    monkeypatch.setattr(bundle, "pins_of", lambda with_sglang: pins if with_sglang else pins[:1])
    monkeypatch.setattr(bundle, "_run", lambda command: pytest.fail("a dry run ran something"))
    assert bundle.main(["--dry-run", "--with-sglang", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "fetch one==1.0" in out and "fetch two==2.0" in out and "3 wheels in at most 2 parts of 60 MB" in out
    assert bundle.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "two" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_only_what_the_target_needs_is_pinned(monkeypatch):
    requires = {
        "root": ["torch==1", "Small_One>=1", "extra-only; extra == 'x'", "windows; sys_platform == 'win32'"],
        "small-one": ["other[x]; python_version >= '3.12'"],
        "other": ["more; extra == 'x'", "none; extra == 'y'"],
        "more": [],
    }

    def distribution(name):
        return argparse.Namespace(version="1", files=None, requires=requires[name])

    monkeypatch.setattr(bundle.metadata, "distribution", distribution)
    assert [pin.requirement for pin in bundle.closure(["root"], ["torch"])] == [
        "more==1", "other==1", "root==1", "small-one==1"
    ]  # fmt: skip
