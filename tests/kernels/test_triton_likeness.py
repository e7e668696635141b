"""The likeness of keys to the mean key: that of the policies' own definition, whatever is not a candidate holds."""

from __future__ import annotations

import pytest
import torch

from lethe_sglang.kernels import reference
from lethe_sglang.kernels.triton import config
from lethe_sglang.kernels.triton import likeness as kernels
from lethe_sglang.policies import features

NAN, CELLS = float("nan"), 400
LENGTHS = ((40, 0, 9), (1, 33, 23))
CASES = [
    (torch.float32, 64, 1, torch.int32),
    (torch.bfloat16, 80, 3, torch.int64),
    (torch.float16, 128, 8, torch.int32),
    (torch.float8_e4m3fn, 64, 4, torch.int32),
    (torch.float8_e5m2, 128, 2, torch.int64),
    (torch.bfloat16, 256, 1, torch.int32),
    (torch.float32, 5, 2, torch.int32),
]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels._KERNEL, "configs", [config(BLOCK=2048, STAGES=2)])
        yield


def case(dtype=torch.float32, dim=64, kv_heads=2, integer=torch.int32, lengths=LENGTHS, offset=1.0):
    """Keys, lists and what of them is valid; keys are of no mean zero, and NaN in cells that are no candidates'."""
    generator = torch.Generator().manual_seed(dim + kv_heads)
    length = torch.tensor(lengths)
    valid = torch.arange(int(length.max())) < length.unsqueeze(2)
    cells = torch.zeros(valid.shape, dtype=torch.int64)
    cells[valid] = 1 + torch.randperm(CELLS - 1, generator=generator)[: int(valid.sum())]
    keys = torch.full((CELLS, kv_heads, dim), NAN)
    shape = (int(valid.sum()), kv_heads, dim)
    size = 0.1 + torch.rand(*shape[:2], 1, generator=generator)
    keys[cells[valid]] = size * (
        offset * torch.rand(dim, generator=generator) + torch.randn(shape, generator=generator)
    )
    return keys.to(dtype), cells.to(integer), valid


def run(device, keys, cells, valid):
    return kernels.likeness(keys.to(device), cells.to(device), valid.to(device)).cpu()


def defined(keys, cells, valid):
    """What the definition makes of each layer of each request alone."""
    want = torch.zeros(cells.shape)
    for layer in range(cells.shape[0]):
        for b in range(cells.shape[1]):
            own = cells[layer, b][valid[layer, b]].long()
            alone = torch.ones(1, len(own), dtype=torch.bool)
            want[layer, b, : len(own)] = features.likeness(keys[own].float().unsqueeze(0), alone)[0]
    return want


def directly(keys, cells, valid):
    """The equation in numbers of twice the precision."""
    want = torch.zeros(cells.shape, dtype=torch.float64)
    for layer in range(cells.shape[0]):
        for b in range(cells.shape[1]):
            k = keys[cells[layer, b][valid[layer, b]].long()].double()
            unit = k / k.norm(dim=-1, keepdim=True)
            mean = unit.mean(0, keepdim=True)
            want[layer, b, : len(k)] = (unit * mean / mean.norm(dim=-1, keepdim=True)).sum(-1).mean(-1)
    return want.float()


@pytest.mark.parametrize(("dtype", "dim", "kv_heads", "integer"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_likeness_is_the_definitions_and_the_references(device, dtype, dim, kv_heads, integer):
    given = case(dtype, dim, kv_heads, integer)
    want = directly(*given)
    assert float(want[given[2]].std()) > 0.02, "all keys are alike: the test says nothing"
    for found in (run(device, *given), reference.likeness(*given), defined(*given)):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not run(device, *given)[~given[2]].any()


def test_keys_of_zeros_and_keys_that_cancel_out_are_like_nothing(device):
    keys, cells, valid = case()
    own = cells[0, 0][valid[0, 0]].long()
    keys[own[3]] = 0.0
    torch.testing.assert_close(run(device, keys, cells, valid), defined(keys, cells, valid), rtol=1e-4, atol=1e-5)
    assert run(device, keys, cells, valid)[0, 0, 3] == 0
    keys[own] = 0.0
    assert not run(device, keys, cells, valid)[0, 0].any()


@pytest.mark.parametrize("likeness", [run, lambda device, *given: reference.likeness(*given)], ids=["kernel", "twin"])
def test_a_request_has_the_same_bits_alone_and_in_any_batch(device, likeness):
    keys, cells, valid = case()
    keys[cells[0, 0][8].long()] = keys[cells[0, 0][31].long()]
    together = likeness(device, keys, cells, valid)
    assert together[0, 0, 8] == together[0, 0, 31], "equal keys are not equally like the mean"
    for b in range(cells.shape[1]):
        most = max(int(valid[:, b].sum(-1).max()), 1)
        alone = likeness(device, keys, cells[:, b : b + 1, :most].contiguous(), valid[:, b : b + 1, :most].contiguous())
        assert torch.equal(alone[:, 0], together[:, b, :most])


def test_cells_lie_beyond_what_32_bits_address(device):
    """A cache of 4 GiB of which eight cells are touched; nothing is read at an offset that wraps around."""
    dim, far = 256, 2**24 - 8  # the product of both is beyond 2**31
    keys = torch.empty(2**24, 1, dim, dtype=torch.float8_e5m2, device=device)
    cells = torch.arange(far, far + 8, dtype=torch.int32, device=device).view(1, 1, 8)
    keys[far:] = torch.randn(8, 1, dim, generator=torch.Generator().manual_seed(0)).to(device, keys.dtype)
    valid = torch.ones(1, 1, 8, dtype=torch.bool, device=device)
    torch.testing.assert_close(kernels.likeness(keys, cells, valid), directly(keys, cells, valid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(9, 2, 64, dtype=torch.float64)}, "keys must be float32 or float16"),
        ({"keys": torch.zeros(2, 9, 64).transpose(0, 1)}, "keys must be contiguous"),
        ({"keys": torch.zeros(9, 2, 257)}, "head_dim must be 1 to 256, not 257"),
        ({"cells": torch.zeros(2, 3, 5)}, "cells must be int32 or int64"),
        ({"valid": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"valid must be bool of shape \[2, 3, 5\]"),
        ({"valid": torch.zeros(3, 2, 5, dtype=torch.bool).transpose(0, 1)}, "valid must be contiguous"),
    ],
)
def test_bad_shapes_are_named(change, message):
    cells = torch.zeros(2, 3, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        kernels.likeness(**({"keys": torch.zeros(9, 2, 64), "cells": cells, "valid": cells.bool()} | change))
