"""The kernels that are timed: each maker sets one up on the device at a point, and returns its launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from lethe_bench.gpu.grid import BUDGET, Point
from lethe_bench.gpu.models import Shape
from lethe_sglang.kernels import table
from lethe_sglang.kernels.common import Attention, Batch, Lists, Schedule, States
from lethe_sglang.kernels.triton.indices import fill_lists
from lethe_sglang.kernels.triton.likeness import likeness
from lethe_sglang.kernels.triton.places import better_place
from lethe_sglang.kernels.triton.repack import repack, scratch_bytes
from lethe_sglang.kernels.triton.score import schedule, score
from lethe_sglang.kernels.triton.select import select
from lethe_sglang.kernels.triton.start_states import start_states
from lethe_sglang.policies.base import Accumulation

Launch = Callable[[], object]


def decode_lists(point: Point) -> Lists:
    """CSR lists of a batch over randomly placed cells, no two equal: prefixes are not shared.

    Returns
    -------
    Lists
        Ends, int32 ``[B + 1]``, and cells from 1 on, int32 ``[B * length]``.
    """
    indptr = torch.arange(point.batch + 1, dtype=torch.int32, device="cuda") * point.length
    indices = torch.randperm(point.batch * point.length, device="cuda").to(torch.int32) + 1
    return Lists(indptr, indices)


def make_score(shape: Shape, point: Point, keys_dtype: torch.dtype = torch.bfloat16) -> Launch:
    """One layer's score step."""
    lists = decode_lists(point)
    cells = lists.indices.shape[0] + 1
    keys = torch.empty(cells, shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16).normal_()
    keys = keys.to(keys_dtype)
    query = torch.randn(point.batch, shape.heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    lse = torch.full((point.batch, shape.heads), 16.0, device="cuda")
    first = torch.full((point.batch,), point.prefix, dtype=torch.int32, device="cuda")
    decay = torch.full((point.batch,), 0.998, device="cuda")
    step = torch.full((point.batch,), point.length, dtype=torch.int64, device="cuda")
    states, rule = States(torch.zeros(cells, device="cuda"), None), Accumulation(decay=0.998)
    attention, scheduled = Attention(query, keys, lse, shape.head_dim**-0.5), Schedule(first, decay, step)
    return lambda: score(rule, attention, lists, scheduled, states)


def make_attention(shape: Shape, point: Point) -> Launch:
    """One layer's FlashInfer decode with its log-sum-exp, as SGLang's backend sets it up."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # the other kernels are timed without it, too

    indptr, indices = decode_lists(point)
    size = (indices.shape[0] + 1, 1, shape.kv_heads, shape.head_dim)
    cache = tuple(torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    query = torch.randn(point.batch, shape.heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    out, lse = torch.empty_like(query), torch.empty(point.batch, shape.heads, device="cuda")
    workspace = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    grouped = shape.heads // shape.kv_heads >= 4
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped, backend="fa2")
    last = torch.ones(point.batch, dtype=torch.int32, device="cuda")
    heads = (shape.heads, shape.kv_heads, shape.head_dim, 1)
    wrapper.plan(indptr, indices, last, *heads, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    return lambda: wrapper.run(query, cache, out=out, lse=lse, return_lse=True)


def make_indices(shape: Shape, point: Point) -> Launch:
    """Fill the lists of a step under uniform budgets, of requests just pruned."""
    batch, layers, packed = point.batch, shape.layers, point.packed
    behind = point.prefix + packed
    lines = torch.zeros(batch + 1, table.width(layers), dtype=torch.int32, device="cuda")
    at = table.read(lines[1:])
    at.prefix[:], at.tail[:], at.kept[:], at.packed[:] = point.prefix, behind, packed, packed
    slots = torch.randperm(batch * point.length, device="cuda").to(torch.int32) + 1
    rows_table = torch.zeros(batch + 1, point.length, dtype=torch.int32, device="cuda")
    rows_table[1:] = slots.view(batch, point.length)
    rows = torch.arange(1, batch + 1, device="cuda")
    seq_lens = torch.full_like(rows, point.length)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * point.length
    indices = torch.empty(batch * point.length, dtype=torch.int32, device="cuda")
    requests, lists = Batch(rows_table, lines, rows, seq_lens), Lists(indptr, indices)
    return lambda: fill_lists(requests, layers // 2, None, lists, False)


def make_repack(shape: Shape, point: Point) -> Launch:
    """All layers' moves of a round in which every packed cell changes its place."""
    cells = point.batch * shape.layers * point.kept
    moved = point.batch * shape.layers * point.packed
    size = (cells, shape.kv_heads, shape.head_dim)
    buffers = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    buffers.append(torch.zeros(cells, device="cuda"))
    source, target = (torch.randperm(cells, device="cuda")[:moved].sort().values for _ in range(2))
    scratch = torch.empty(scratch_bytes(buffers, moved), dtype=torch.uint8, device="cuda")
    return lambda: repack(buffers, source, target, scratch)


def make_select(shape: Shape, point: Point) -> Launch:
    """All layers' choices of a round."""
    size = (shape.layers, point.batch, point.candidates)
    rank, valid = torch.rand(size, device="cuda"), torch.ones(size, dtype=torch.bool, device="cuda")
    pinned = torch.full(size[:2], 4, dtype=torch.int32, device="cuda")  # a server's are columns of its table
    count = torch.full_like(pinned, point.kept)
    return lambda: select(rank, valid, pinned, count)


def make_places(shape: Shape, point: Point) -> Launch:
    """All layers' ranks of a round of the default policy."""
    size = (shape.layers, point.batch, point.candidates)
    score, likeness = (torch.rand(size, device="cuda") for _ in range(2))
    valid = torch.ones(size, dtype=torch.bool, device="cuda")
    return lambda: better_place(score, likeness, valid, 0.5)


def make_likeness(shape: Shape, point: Point) -> Launch:
    """All layers' comparisons of keys of a round of the default policy, over randomly placed cells."""
    size = (shape.layers, point.batch, point.candidates)
    keys = torch.empty(math.prod(size), shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16).normal_()
    cells = torch.randperm(math.prod(size), device="cuda").to(torch.int32).view(size)
    valid = torch.ones(size, dtype=torch.bool, device="cuda")
    return lambda: likeness(keys, cells, valid)


def make_round(shape: Shape, point: Point) -> Launch:
    """Make a round's device part: selection and repacking. Ranking, bookkeeping and the host are not in it."""
    halves = [make_select(shape, point), make_repack(shape, point)]
    return lambda: [half() for half in halves]


def make_zero(shape: Shape, point: Point) -> Launch:
    """Start the states of one step's new slots, all layers."""
    blocks = 2**16
    states = States(torch.zeros(shape.layers * blocks, device="cuda"), None)
    slots = torch.randperm(blocks, device="cuda")[: point.batch].contiguous()
    return lambda: start_states(states, slots, None, shape.layers)


def make_schedule(shape: Shape, point: Point) -> Launch:
    """Resolve what a step scores, once for all layers."""
    lines = torch.zeros(point.batch + 1, table.width(shape.layers), dtype=torch.int32, device="cuda")
    rows = torch.arange(1, point.batch + 1, device="cuda")
    seq_lens, rule = torch.full_like(rows, BUDGET), Accumulation(decay=0.998)
    first = torch.empty(point.batch, dtype=torch.int32, device="cuda")
    decay = torch.empty(point.batch, device="cuda")
    requests = Batch(torch.zeros_like(lines), lines, rows, seq_lens)
    return lambda: schedule(requests, rule, first, decay)


MAKERS: dict[str, Callable[[Shape, Point], Launch]] = {
    "score": make_score,
    "attention": make_attention,
    "indices": make_indices,
    "repack": make_repack,
    "select": make_select,
    "places": make_places,
    "likeness": make_likeness,
    "round": make_round,
    "zero": make_zero,
    "schedule": make_schedule,
    "score-fp8": functools.partial(make_score, keys_dtype=torch.float8_e4m3fn),
}
