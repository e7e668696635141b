"""Profiles that servers keep: first start, second start, corrupted, two at once, read-only; with a fake measuring."""

import io
import logging
import pickle
import resource
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from profiles import MODEL, profile

from lethe_sglang.allocation.fingerprint import sample_weights
from lethe_sglang.allocation.profile import load, save
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.profiling import automatic, cache
from lethe_sglang.profiling.cache import directory, file_of, obtain
from lethe_sglang.profiling.records import Partial
from lethe_sglang.profiling.run import Pass
from lethe_sglang.profiling.settle import settle

HOYER = (0.9, 0.5, 0.7, 0.8)
MADE = profile(rule="hoyer", hoyer=HOYER)


class Fake:
    """Stands for the measuring process."""

    def __init__(self, made=MADE, seconds=0.0, text=None):
        self.made, self.seconds, self.text, self.paths = made, seconds, text, []

    def __call__(self, path: Path) -> None:
        self.paths.append(path)
        time.sleep(self.seconds)
        if self.text is not None:
            path.write_text(self.text)
        else:
            save(self.made, path)


def never(path: Path) -> None:
    pytest.fail(f"measured again, to {path}")


def test_the_first_start_measures_and_the_second_reads(tmp_path):
    make = Fake()
    assert obtain(MODEL, make, tmp_path / "cache") == MADE
    assert make.paths == [file_of(MODEL, tmp_path / "cache")]
    assert obtain(MODEL, never, tmp_path / "cache") == MADE


def test_another_model_has_a_profile_of_its_own(tmp_path):
    obtain(MODEL, Fake(), tmp_path)
    other = MODEL.model_copy(update={"weights": "sampled:ffff"})
    make = Fake(profile(other))
    assert obtain(other, make, tmp_path).model == other
    assert len(make.paths) == 1 and obtain(MODEL, never, tmp_path) == MADE


@pytest.mark.parametrize("content", ["", "{", "format: 1", "format: 2", "format: 9", "\x00garbage"])
def test_a_corrupted_profile_is_made_again_with_a_warning(tmp_path, caplog, content):
    path = file_of(MODEL, tmp_path)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "lethe_sglang"):
        assert obtain(MODEL, Fake(), tmp_path) == MADE
    assert "of no use and is made again" in caplog.text and str(path) in caplog.text
    assert load(path) == MADE
    assert obtain(MODEL, never, tmp_path) == MADE


def test_a_profile_of_another_model_under_this_models_name_is_made_again(tmp_path, caplog):
    save(profile(MODEL.model_copy(update={"layers": 2})), file_of(MODEL, tmp_path))
    assert obtain(MODEL, Fake(), tmp_path) == MADE
    assert "layers 2 against 4" in caplog.text


def test_two_servers_that_start_at_once_measure_once(tmp_path, caplog):
    make, found = Fake(seconds=0.3), []
    servers = [threading.Thread(target=lambda: found.append(obtain(MODEL, make, tmp_path))) for _ in range(4)]
    with caplog.at_level(logging.INFO, "lethe_sglang"):
        for server in servers:
            server.start()
        for server in servers:
            server.join(30)
    assert found == [MADE] * 4
    assert len(make.paths) == 1
    assert "another server is measuring this model" in caplog.text


def test_a_server_takes_over_from_one_whose_measuring_failed(tmp_path):
    def broken(path):
        raise ConfigError("no memory")

    with pytest.raises(ConfigError, match="no memory"):
        obtain(MODEL, broken, tmp_path)
    assert obtain(MODEL, Fake(), tmp_path) == MADE


@pytest.mark.parametrize("how", ["no directory", "not writable", "no locks", "no home"])
def test_where_nothing_can_be_kept_the_profile_is_used_all_the_same(tmp_path, monkeypatch, caplog, how):
    folder: Path | None = tmp_path / "cache"
    if how == "no directory":
        (tmp_path / "cache").write_text("a file where a directory should be")
    elif how == "not writable":
        monkeypatch.setattr(cache, "_writable", lambda folder: False)
    elif how == "no locks":
        monkeypatch.setattr(cache.fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(37, "No locks")))
    else:
        folder = None
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    make = Fake()
    assert obtain(MODEL, make, folder) == MADE
    assert not make.paths[0].exists(), "the temporary copy stayed behind"
    assert "could not be kept" in caplog.text and "--kv-evict-profile" in caplog.text


def test_a_read_only_directory_with_a_profile_in_it_is_read(tmp_path, monkeypatch):
    obtain(MODEL, Fake(), tmp_path)
    monkeypatch.setattr(cache, "_writable", lambda folder: False)
    monkeypatch.setattr(cache.fcntl, "flock", lambda *a: pytest.fail("locked"))
    assert obtain(MODEL, never, tmp_path) == MADE


def test_a_directory_that_lets_nobody_write_is_noticed_by_trying(tmp_path, monkeypatch):
    assert cache._writable(tmp_path)
    assert not cache._writable(tmp_path / "nowhere")


def test_a_full_disk_is_noticed_by_writing_bytes(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # files can be made, as on a full disk, and hold nothing
    try:
        assert not cache._writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache._writable(tmp_path) and not list(tmp_path.iterdir())


class Full(Fake):
    """A pass that fills the disk under the cache half-way, and is stopped by it."""

    def __init__(self, monkeypatch, folder):
        super().__init__()
        self.monkeypatch, self.folder = monkeypatch, folder

    def __call__(self, path: Path) -> None:
        if path.parent == self.folder:
            self.paths.append(path)
            Partial(path, "key").start([{"rid": "0"}])
            self.monkeypatch.setattr(cache, "_writable", lambda folder: folder != self.folder)
            raise ConfigError("--out: cannot be written: No space left on device")
        super().__call__(path)


def test_a_disk_that_fills_up_meanwhile_costs_a_pass_and_not_the_start(tmp_path, monkeypatch, caplog):
    make = Full(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING, "lethe_sglang"):
        assert obtain(MODEL, make, tmp_path) == MADE
    assert len(make.paths) == 2 and make.paths[1].parent != tmp_path
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"], "the records of the pass stayed behind"
    assert len(caplog.records) == 1 and "its disk is full" in caplog.text


def test_where_nothing_has_room_at_all_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_writable", lambda folder: False)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", lambda **where: (_ for _ in ()).throw(full))
    with pytest.raises(ConfigError, match=r"no room for a profile.*No space left on device.*--kv-evict-profile none"):
        obtain(MODEL, never, tmp_path)


def test_a_measuring_that_writes_nonsense_or_another_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not a profile"):
        obtain(MODEL, Fake(text="nonsense: 1"), tmp_path)
    with pytest.raises(ConfigError, match="layers 3 against 4"):
        obtain(MODEL, Fake(profile(MODEL.model_copy(update={"layers": 3}))), tmp_path)


def test_the_directory_is_the_users_cache_and_names_are_harmless(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory() == tmp_path / "lethe-sglang" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert directory() == tmp_path / "home" / ".cache" / "lethe-sglang" / "profiles"
    odd = MODEL.model_copy(update={"name": "../Qwen/Qwen3 8B\n" + "x" * 200})
    name = file_of(odd, tmp_path).name
    assert "/" not in name and " " not in name and len(name) < 120 and not name.startswith(".")


# -- what the launcher settles ----------------------------------------------------------------------------------------


def config(**budget):
    return from_mapping({"budget": {"tokens": 100, **budget}})


def test_budgets_of_a_file_of_auto_and_of_uniform(tmp_path):
    save(MADE, tmp_path / "p.yaml")
    shared = settle(config(allocation="profile", profile=str(tmp_path / "p.yaml")), MODEL, None)
    assert 276 < sum(shared) <= 280 and len(set(shared)) == 4
    make = Fake()
    assert settle(config(allocation="profile"), MODEL, make, tmp_path / "cache") == shared
    assert settle(config(allocation="profile"), MODEL, never, tmp_path / "cache") == shared
    assert settle(config(), MODEL, never) == (70,) * 4, "uniform measures nothing"
    assert settle(config(allocation="breakpoint"), MODEL, never) == (70,) * 4, "breakpoint measures nothing"
    first = settle(config(allocation="breakpoint", profile=str(tmp_path / "p.yaml")), MODEL, never)
    assert first == shared, "the first round of breakpoint"


def test_configurations_choose_their_profile_and_share_one_measuring(tmp_path):
    save(profile(rule="hoyer", hoyer=(0.1, 0.2, 0.3, 0.9)), tmp_path / "other.yaml")
    save(profile(rule="hoyer", alpha=-1.0, hoyer=HOYER), tmp_path / "inverted.yaml")
    save(profile(rule="pyramid"), tmp_path / "pyramid.yaml")
    make = Fake()

    def budgets(**more):
        return settle(config(allocation="profile", **more), MODEL, make, tmp_path / "cache")

    kept, again = budgets(), budgets()
    inverted, other, pyramid = (budgets(profile=str(tmp_path / f"{n}.yaml")) for n in ("inverted", "other", "pyramid"))
    assert len(make.paths) == 1
    assert settle(config(), MODEL, make) == (70,) * 4 and kept == again
    assert kept[1] == max(kept) and inverted[1] == min(inverted)
    assert other[3] == min(other) and list(pyramid) == sorted(pyramid, reverse=True)


def test_a_kept_profile_says_by_which_rule_the_budget_is_shared(tmp_path):
    save(profile(rule="sensitivity", changed=(0.4, 0.0, 0.1, 0.1)), file_of(MODEL, tmp_path))
    budgets = settle(config(allocation="profile"), MODEL, never, tmp_path)
    assert budgets[0] == max(budgets) and budgets[1] == min(budgets)


def test_before_the_start_files_are_checked_and_nothing_is_measured(tmp_path):
    assert settle(config(allocation="profile"), MODEL, None) == ()
    with pytest.raises(ConfigError, match=r"budget.profile .*nowhere.yaml: cannot be read"):
        settle(config(allocation="profile", profile=str(tmp_path / "nowhere.yaml")), MODEL, None)
    save(profile(MODEL.model_copy(update={"kv_heads": 8})), tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match=r"profile of another model \(toy\): KV heads 8 against 1"):
        settle(config(allocation="breakpoint", profile=str(tmp_path / "p.yaml")), MODEL, None)


def test_a_profile_of_another_number_format_is_used_with_a_warning(tmp_path, caplog):
    save(MADE, tmp_path / "p.yaml")
    served = MODEL.model_copy(update={"dtype": "float16"})
    assert settle(config(allocation="profile", profile=str(tmp_path / "p.yaml")), served, None)
    assert "dtype float32 against float16" in caplog.text


# -- the measuring process --------------------------------------------------------------------------------------------

SERVER_ARGS = SimpleNamespace(
    model_path="some model",
    nnodes=1,
    dtype="float16",
    quantization=None,
    tp_size=2,
    trust_remote_code=True,
    device="cpu",
    json_model_override_args="{}",
    model_loader_extra_config={"a": 1},
)


def test_the_pass_runs_the_servers_model_as_the_server_does(tmp_path):
    task = automatic.request(SERVER_ARGS, tmp_path / "p.yaml")
    assert (task.model_path, task.out, task.time_limit) == ("some model", tmp_path / "p.yaml", 240)
    assert replace(task, model_path="m", out=None, time_limit=None, server_args=()) == Pass(model_path="m")
    assert task.server_args == (
        "--model-loader-extra-config",
        '{"a": 1}',
        "--trust-remote-code",
        "--json-model-override-args",
        "{}",
        "--dtype",
        "float16",
        "--device",
        "cpu",
        "--tp-size",
        "2",
    )


def test_the_process_of_the_pass_measures_what_it_is_asked_to_and_reports_in_one_line(tmp_path, monkeypatch, capsys):
    task, asked = automatic.request(SERVER_ARGS, tmp_path / "p.yaml"), []
    monkeypatch.setattr(automatic.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(task))))
    monkeypatch.setattr(automatic, "measure", asked.append)
    assert automatic.main() == 0 and asked == [task]

    def fail(task):
        raise ConfigError("no memory")

    monkeypatch.setattr(automatic.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(task))))
    monkeypatch.setattr(automatic, "measure", fail)
    assert automatic.main() == 2
    assert capsys.readouterr().err == "lethe profile: error: no memory\n"


def test_the_pass_is_handed_to_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "run_to_end", lambda *given: started.append(given) or 0)
    started = []
    automatic.run(SERVER_ARGS, tmp_path / "p.yaml")
    ((words, seconds, given),) = started
    assert words == [sys.executable, "-m", "lethe_sglang.profiling.automatic"] and seconds == 1800
    assert pickle.loads(given) == automatic.request(SERVER_ARGS, tmp_path / "p.yaml")


def test_failures_and_several_nodes_say_what_to_do_instead(tmp_path, monkeypatch):
    for status, expected in ((3, "lethe profile failed \\(status 3"), (None, "took more than 1800 s")):
        monkeypatch.setattr(automatic, "run_to_end", lambda words, seconds, given, status=status: status)
        with pytest.raises(ConfigError, match=f"budget.profile auto: .*{expected}.*--kv-evict-profile none"):
            automatic.run(SERVER_ARGS, tmp_path / "p.yaml")
    monkeypatch.setattr(automatic, "run_to_end", lambda words, seconds, given: pytest.fail("started"))
    with pytest.raises(ConfigError, match="does not measure over several nodes"):
        automatic.run(SimpleNamespace(**{**vars(SERVER_ARGS), "nnodes": 2}), tmp_path / "p.yaml")


def test_a_process_is_run_to_its_end_or_its_time_and_leaves_nothing(tmp_path):
    assert automatic.run_to_end(["sh", "-c", "exit 7"], 30) == 7
    assert automatic.run_to_end(["sh", "-c", 'test "$(cat)" = given'], 30, b"given") == 0
    started, mark = time.monotonic(), tmp_path / "mark"
    assert automatic.run_to_end(["sh", "-c", f"(sleep 1.5; touch {mark}) & sleep 60"], 0.3) is None
    assert time.monotonic() - started < 20
    time.sleep(1.6)
    assert not mark.exists(), "a child lived on"


def test_fine_tunes_of_one_model_have_different_weights(tmp_path):
    for name, middle in (("a", b"x"), ("b", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"h" * 5000 + middle * 200_000 + b"t" * 5000)
        (tmp_path / name / "README.md").write_text(name)
    first, second = (sample_weights(tmp_path / name) for name in "ab")
    assert first.startswith("sampled:") and first != second
    assert sample_weights(tmp_path / "a") == first
    assert sample_weights(tmp_path) == ""
