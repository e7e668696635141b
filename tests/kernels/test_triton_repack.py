"""Cells move as if all at once, whatever their dtype and width, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lethe_sglang.kernels import reference as twin
from lethe_sglang.kernels.triton import config, repack
from lethe_sglang.kernels.triton.repack import scratch_bytes

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repack._KERNEL, "configs", [config(BLOCK_N=16, BLOCK_W=64)])
        yield


def raw(buffer):
    return buffer.cpu().contiguous().view(buffer.shape[0], -1).view(torch.uint8)


def pool(cells, heads, dim, dtype, device):
    """Keys and values of random bits, NaN patterns included, a score, positions and a memory."""
    bits = [torch.randint(0, 256, (cells, heads, dim * dtype.itemsize), dtype=torch.uint8) for _ in range(2)]
    states = [torch.randn(cells), torch.randint(0, 2**31 - 1, (cells,), dtype=torch.int32), torch.randn(cells)]
    return [b.to(device) for b in [*(b.view(dtype) for b in bits), *states]]


def check(buffers, source, destination, **kwargs):
    expected = [raw(b).clone() for b in buffers]
    twin.repack(expected, source.cpu().long(), destination.cpu().long())
    repack.repack(buffers, source, destination, **kwargs)
    for i, (buffer, bits) in enumerate(zip(buffers, expected, strict=True)):
        assert torch.equal(raw(buffer), bits), f"buffer {i}"


@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=12)
@given(
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([1, 2, 5]),
    dim=st.sampled_from([3, 16, 96, 128]),
    n=st.integers(1, 45),
    states=st.integers(0, 3),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_cells_move_as_the_twin_moves_them(device, dtype, heads, dim, n, states, index, seed):
    torch.manual_seed(seed)
    buffers = pool(50, heads, dim, dtype, device)[: 2 + states]
    source = torch.randint(0, 50, (n,), device=device).to(index)
    destination = torch.randperm(50, device=device)[:n].to(index)
    check(buffers, source, destination)


@pytest.mark.parametrize("shift", [1, -1, 7])
def test_source_and_destination_may_overlap(device, shift):
    cells = torch.arange(10, 90, device=device)
    check(pool(100, 2, 16, torch.bfloat16, device), cells, cells + shift)


def test_a_cycle_of_cells_turns(device):
    cells = torch.arange(100, device=device)
    check(pool(100, 1, 8, torch.float16, device), cells, cells.roll(1))


def test_a_cell_that_stays_is_not_touched(device):
    buffers = pool(30, 2, 16, torch.bfloat16, device)
    before = [raw(b).clone() for b in buffers]
    cells = torch.arange(30, device=device)
    repack.repack(buffers, cells, cells)
    assert all(torch.equal(raw(b), old) for b, old in zip(buffers, before, strict=True))


def test_scratch_may_be_given_and_is_all_that_is_used(device):
    buffers = pool(40, 3, 5, torch.float8_e4m3fn, device)
    source, destination = torch.arange(20, 37, device=device), torch.arange(3, 20, device=device)
    needed = scratch_bytes(buffers, 17)
    scratch = torch.full((needed + 64,), 0xA5, dtype=torch.uint8, device=device)
    check(buffers, source, destination, scratch=scratch)
    assert (scratch[needed:] == 0xA5).all()
    check(buffers, source, destination, scratch=scratch[: needed - 1])
    with pytest.raises(ValueError, match="scratch must be 16-byte aligned"):
        repack.repack(buffers, source, destination, scratch[1:])


def test_requests_may_be_moved_one_after_the_other(device):
    torch.manual_seed(0)
    buffers = pool(60, 1, 8, torch.bfloat16, device)
    together = [b.clone() for b in buffers]
    source = torch.cat([torch.arange(11, 21), torch.arange(33, 53)]).to(device)
    destination = torch.cat([torch.arange(5, 15), torch.arange(30, 50)]).to(device)
    repack.repack(together, source, destination)
    for part in (slice(0, 10), slice(10, 30)):
        repack.repack(buffers, source[part], destination[part])
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(buffers, together, strict=True))


def test_nothing_to_move(device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    check(pool(5, 1, 4, torch.bfloat16, device), empty, empty)


@pytest.mark.parametrize(
    ("buffers", "source", "destination", "message"),
    [
        ([], 3, 3, "1 to 5 buffers"),
        ([torch.zeros(9)] * 6, 3, 3, "1 to 5 buffers"),
        ([torch.zeros(9), torch.zeros(8)], 3, 3, "buffer 1 must have"),
        ([torch.zeros(9, 4).t()], 3, 3, "buffer 0 must be contiguous"),
        ([torch.zeros(9)], 3, 2, "destination must be int32 or int64 of shape \\[3\\]"),
    ],
)
def test_bad_shapes_are_named(buffers, source, destination, message):
    with pytest.raises(ValueError, match=message):
        repack.repack(buffers, torch.arange(source), torch.arange(destination))
