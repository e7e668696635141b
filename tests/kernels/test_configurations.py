"""What a search finds serves later launches and other processes; what is none of ours is refused."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import triton

from lethe_sglang.kernels import reference as twin
from lethe_sglang.kernels.triton import KERNELS, config, configurations, tuning
from lethe_sglang.kernels.triton.select import select

MAKE, GPU = "NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"


@pytest.fixture(autouse=True)
def kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = KERNELS["_select"]
    monkeypatch.setattr(kernel, "configs", [config(BLOCK=64), config(BLOCK=32), config(BLOCK=16)])
    yield kernel
    configurations.take([], "none")
    for each in KERNELS.values():
        each.times.clear()


@pytest.fixture
def clock(monkeypatch):
    """A search that runs each configuration, and is told how long it took."""
    times = iter([0.004, 0.003, 0.005])

    def bench(call, quantiles):
        call()
        return [next(times)] * 3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=bench))


def arguments(device, n=100):
    rank = torch.randn(2, 2, n, generator=torch.Generator().manual_seed(1)).to(device)
    one = torch.ones(2, 2, dtype=torch.int64, device=device)
    return rank, torch.ones_like(rank, dtype=torch.bool), one, 7 * one


def blocks(kernel, monkeypatch, run):
    """Return the BLOCK of each launch."""
    seen, original = [], kernel.kernel

    class Spy:
        fn = original.fn

        def __getitem__(self, grid):
            def launch(*args, **meta):
                seen.append(meta["BLOCK"])
                return original[grid](*args, **meta)

            return launch

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "kernel", Spy())
        run()
    return seen


def test_what_a_search_found_serves_launches_of_its_key_here_and_elsewhere(device, kernel, clock, monkeypatch):
    with tuning():
        select(*arguments(device))
    (entry,) = json.loads(json.dumps(configurations.found()))
    assert entry["kernel"] == "_select" and entry["key"] == [128, 4] and entry["configuration"]["BLOCK"] == 32
    assert (entry["us"], entry["default_us"]) == (3.0, 4.0)
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "configs", [config(BLOCK=64), config(BLOCK=32), config(BLOCK=16)])
    assert configurations.take([], "none") == 0
    assert blocks(kernel, monkeypatch, lambda: select(*arguments(device))) == [64]
    assert configurations.take([entry], "a test") == 1
    assert blocks(kernel, monkeypatch, lambda: select(*arguments(device))) == [32]
    assert blocks(kernel, monkeypatch, lambda: select(*arguments(device, 200))) == [64], "of another key"
    assert torch.equal(select(*arguments(device)).cpu(), twin.select(*(a.cpu() for a in arguments(device))))


def test_types_in_a_key_are_types_again():
    score = KERNELS["_score"]
    key = (128, 4, 8, 64, torch.bfloat16, torch.float8_e4m3fn, "sum")
    score.found, score.times = {key: score.configs[2]}, {key: [9.0, 8.0, 2.0, 8.0, 8.0, 8.0]}
    entries = json.loads(json.dumps(configurations.found()))
    score.found = {}
    assert configurations.take(entries, "a test") == 1 and score.found == {key: score.configs[2]}


def wanted(**changes):
    entry = {"kernel": "_select", "key": [128, 4], "configuration": config(BLOCK=32).all_kwargs()}
    return {**entry, **changes}


def test_a_gpu_has_a_file_of_its_own(kernel, tmp_path):
    path = configurations.file_of(MAKE)
    assert path == tmp_path / "lethe-sglang" / "kernels" / f"{GPU}.json"
    assert configurations.use(MAKE) == 0, "there is none"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"configurations": [wanted()]}))
    assert configurations.use("NVIDIA H200") == 0 and not kernel.found
    assert configurations.use(MAKE) == 1 and kernel.found == {(128, 4): kernel.configs[1]}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not a file of `lethe gpu tune` (JSONDecodeError"),
        ("[]", "not a file of `lethe gpu tune` (TypeError"),
        ('{"configurations": [{"kernel": "_select"}]}', "not a file of `lethe gpu tune` (KeyError"),
        (json.dumps({"configurations": [wanted(kernel="_other")]}), "kernel _other has no configuration"),
        (json.dumps({"configurations": [wanted(configuration={"BLOCK": 48})]}), "_select has no configuration {'BLO"),
        (json.dumps({"configurations": [wanted(key=[["a"], 4])]}), "not a file of `lethe gpu tune` (TypeError"),
        (json.dumps({"configurations": [wanted(key=["torch.float7"])]}), "not a file of `lethe gpu tune` (Attribute"),
    ],
)
def test_what_is_not_of_these_kernels_is_refused_and_changes_nothing(kernel, text, named):
    kernel.found = {(1, 1): kernel.configs[2]}
    path = configurations.file_of(MAKE)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        configurations.use(MAKE)
    assert str(path) in str(error.value) and named in str(error.value) and "`lethe gpu tune` again" in str(error.value)
    assert kernel.found == {(1, 1): kernel.configs[2]}
