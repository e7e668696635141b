"""Which kernels serve a device, and that both implementations can be called alike."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import torch
import triton

from lethe_sglang.kernels import reference
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.triton import Kernel, _fits, bucket, config, expect, launchers


def test_cuda_takes_triton_and_a_cpu_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_for("cpu") is launchers, "under the interpreter"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels_for("cpu") is reference
    assert kernels_for(torch.device("cuda:1")) is launchers


@pytest.mark.parametrize("name", reference.__all__)
def test_both_are_called_alike(name):
    launcher, twin = getattr(launchers, name), getattr(reference, name)
    theirs, ours = (list(inspect.signature(function).parameters.values()) for function in (launcher, twin))
    assert [(p.name, p.default) for p in theirs[: len(ours)]] == [(p.name, p.default) for p in ours]
    assert all(p.default is not p.empty for p in theirs[len(ours) :]), "the twin lacks an argument that is required"
    assert launchers.__all__ == reference.__all__


def test_what_has_passed_is_not_looked_at_again_and_what_differs_is():
    """A step asks the same of 32 layers; an answer must not serve a tensor that differs in anything that is asked."""
    good = torch.zeros(4, 6)
    _fits.cache_clear()
    for _ in range(32):
        expect("x", good.clone(), torch.float32, [4, None])
    assert (_fits.cache_info().misses, _fits.cache_info().hits) == (1, 31)
    for other in (good.long(), good[:3], good.t(), torch.zeros(4, 12)[:, ::2], good.view(4, 6, 1), good[0]):
        with pytest.raises(ValueError, match="x must be float32 of shape"):
            expect("x", other, torch.float32, [4, None])
    for asked in ((torch.int32, [4, None]), ((torch.int32, torch.int64), [4, 6]), (torch.float32, [4, 5])):
        with pytest.raises(ValueError, match="x must be"):
            expect("x", good, *asked)
    expect("x", torch.zeros(4, 1).expand(4, 1), torch.float32, [None, 1])
    expect("x", torch.zeros(()), (torch.float32,), [])


def test_buckets_are_tritons_powers_of_two():
    assert [bucket(n) for n in range(-1, 2100)] == [triton.next_power_of_2(max(n, 1)) for n in range(-1, 2100)]


def test_a_launch_takes_the_first_configuration_and_another_where_it_is_told(monkeypatch):
    class Function:
        fn = test_buckets_are_tritons_powers_of_two
        seen: ClassVar[list[dict[str, int]]] = []

        def __getitem__(self, grid):
            return lambda *args, **meta: self.seen.append(meta)

    monkeypatch.setattr("lethe_sglang.kernels.triton.KERNELS", {})
    kernel = Kernel(Function(), [config(BLOCK=64), config(BLOCK=32, num_warps=8)])
    kernel.launch(lambda meta: (1,), 0)
    with pytest.raises(ValueError, match="inside"), kernel.taking(kernel.configs[1]):
        kernel.launch(lambda meta: (1,), 0)
        raise ValueError("inside")
    kernel.launch(lambda meta: (1,), 0)
    assert [(meta["BLOCK"], meta["num_warps"]) for meta in Function.seen] == [(64, 4), (32, 8), (64, 4)]
