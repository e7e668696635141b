"""Which kernels serve a device, and that both implementations can be called alike."""

from __future__ import annotations

import inspect

import pytest
import torch

from lethe_sglang.kernels import reference
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.triton import launchers


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
