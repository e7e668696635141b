"""Kernels run on the CUDA device if there is one, else under Triton's interpreter on CPU tensors.

Failing examples are not shrunk: under the interpreter that takes minutes.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
MODULES = ("score", "indices", "select", "repack", "rounds", "likeness", "places", "start_states")

if not CUDA:  # Triton decides at import; the variable must not reach the servers that other tests start
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without its interpreter: run tests/kernels in a process of its own"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in MODULES:
            __import__(f"lethe_sglang.kernels.triton.{name}")


@pytest.fixture(autouse=True, scope="package")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if CUDA else "cpu")
