"""The score of a decode step: attention that each own cell received, from the attention's log-sum-exp (paper eq. 5).

The kernel reads K through the index list that attention has just read, not through row and ledger table: the packed
layout is resolved once a layer (``indices.py``), attention and score cannot disagree about a list, and FlashInfer and
Triton decode are served alike. What depends on the request and the step only is resolved once a step, by
:func:`schedule`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.common import Attention, Batch, Lists, Schedule, States
from lethe_sglang.kernels.table import NEVER, column, layers_of
from lethe_sglang.kernels.triton import (
    FLOAT,
    FP8,
    INTEGER,
    Kernel,
    bucket,
    config,
    expect,
    expect_batch,
    expect_contiguous,
    expect_lists,
    interpreted,
)

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_RULES = {"sum": 0, "max": 1, "recurrence": 2}
_PROGRAMS_PER_SM = 8
_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["batch", "every"])
def _schedule(
    table,
    rows,
    seq_lens,
    first,
    decay,
    batch,
    table_stride,
    every,
    step_decay,
    SCORE_FROM: tl.constexpr,
    SCORE_AFTER: tl.constexpr,
    NEVER: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    row = tl.load(rows + b, mask=mask, other=0).to(tl.int64)
    seq = tl.load(seq_lens + b, mask=mask, other=0).to(tl.int32)
    score_from = tl.load(table + row * table_stride + SCORE_FROM, mask=mask, other=0)
    scored = (row != 0) & (seq % every == 0)
    gamma = tl.zeros([BLOCK], tl.float32) + step_decay
    if WINDOW:
        score_after = tl.load(table + row * table_stride + SCORE_AFTER, mask=mask, other=0)
        scored = scored & (seq > score_after)
        gamma = tl.where(seq == score_after + 1, 0.0, gamma)
    tl.store(first + b, tl.where(scored, score_from, NEVER), mask=mask)
    tl.store(decay + b, gamma, mask=mask)


@triton.jit
def _score(
    query,
    keys,
    lse,
    indptr,
    indices,
    first,
    decay,
    step,
    scores,
    memories,
    parts,
    query_stride_b,
    query_stride_h,
    lse_stride,
    lse_stride_h,
    logit_scale,
    lse_scale,
    threshold,
    RULE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(1)
    begin = tl.load(indptr + b).to(tl.int64)
    length = (tl.load(indptr + b + 1).to(tl.int64) - begin).to(tl.int32)
    gamma = tl.load(decay + b)
    now = tl.load(step + b).to(tl.float32)
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    own = tl.minimum(tl.load(first + b), length)  # NEVER plus a program's offset would wrap around
    used = 1
    if parts is not None:  # as SGLang's kernel divides a list; it writes the parts that it uses
        part = tl.cdiv(tl.cdiv(length, tl.maximum(tl.load(parts + b).to(tl.int32), 1)), MULTIPLE) * MULTIPLE
        used = tl.cdiv(length, tl.maximum(part, 1))
    for start in range(own + tl.program_id(0) * BLOCK_N, length, tl.num_programs(0) * BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        mask = j < length
        cell = tl.load(indices + begin + j, mask=mask, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_N], tl.float32)  # sum_h exp(logit - lse)
        row = keys + cell * (KV_HEADS * HEAD_DIM)
        for kv_head in range(KV_HEADS):
            head = kv_head * GROUP + heads
            k = tl.load(
                row[:, None] + (kv_head * HEAD_DIM + dims)[None, :],
                mask=mask[:, None] & (dims < HEAD_DIM)[None, :],
                other=0.0,
            )
            q = tl.load(
                query + b * query_stride_b + head[None, :] * query_stride_h + dims[:, None],
                mask=(heads < GROUP)[None, :] & (dims < HEAD_DIM)[:, None],
                other=0.0,
            )
            at = lse + b * lse_stride + head * lse_stride_h
            if parts is None:
                normaliser = tl.load(at, mask=heads < GROUP, other=float("inf"))
            else:  # a tile and not a loop, which would keep the keys of the next head from being loaded ahead
                p = tl.arange(0, PARTS_PAD)
                tile = (heads < GROUP)[:, None] & (p < used)[None, :]
                some = tl.load(at[:, None] + p[None, :], mask=tile, other=0.0)
                some = tl.where((heads >= GROUP)[:, None] | (p < used)[None, :], some, float("-inf"))
                most = tl.max(some, axis=1)
                merged = most + tl.log(tl.sum(tl.exp(some - most[:, None]), axis=1))
                normaliser = tl.where(heads < GROUP, merged, float("inf"))
            normaliser *= lse_scale
            logits = tl.dot(k.to(COMPUTE), q.to(COMPUTE), input_precision="ieee") * logit_scale
            total += tl.sum(tl.exp2(logits - normaliser[None, :]), axis=1)
        a = total / (KV_HEADS * GROUP)
        old = tl.load(scores + cell, mask=mask, other=0.0)
        if RULE == 0:
            new = old * gamma + a
        elif RULE == 1:
            new = tl.maximum(old * gamma, a)
        else:
            renewed = a > threshold
            memory = tl.load(memories + cell, mask=mask, other=0.0)
            tl.store(memories + cell, tl.maximum(memory, tl.where(renewed, now - old, 0.0)), mask=mask)
            new = tl.where(renewed, now, old)
        tl.store(scores + cell, new, mask=mask)


_SCHEDULE = Kernel(_schedule, [config(BLOCK=128), config(BLOCK=256)])
_SCORE = Kernel(
    _score,
    [
        config(BLOCK_N=32),
        config(BLOCK_N=32, num_stages=3),
        config(BLOCK_N=64, num_stages=3),
        config(BLOCK_N=128, num_warps=8),
        config(BLOCK_N=128, num_warps=8, num_stages=3),
        config(BLOCK_N=16, num_warps=2, num_stages=4),
    ],
)


def schedule(batch: Batch, accumulation: Accumulation, first: torch.Tensor, decay: torch.Tensor) -> None:
    """Resolve, once a step and for all layers, which own tokens this step scores and with which decay.

    A step is scored if ``seq % every == 0`` and, with a window, ``seq > score_after``; the first step of a window has
    decay 0. A padded row of a CUDA graph is never scored. ``first`` and ``decay`` are written, those of a
    :class:`~lethe_sglang.kernels.common.Schedule`.
    """
    requests, num_layers = expect_batch(batch), layers_of(batch.table)
    _expect_schedule(Schedule(first, decay, batch.seq_lens), requests)
    if requests:
        _SCHEDULE.launch(
            lambda meta: (triton.cdiv(requests, meta["BLOCK"]),),
            *batch[1:],
            first,
            decay,
            requests,
            batch.table.stride(0),
            accumulation.every,
            accumulation.step_decay,
            *(column(name, num_layers) for name in ("score_from", "score_after")),
            NEVER,
            accumulation.window is not None,
        )


def score(
    rule: Accumulation,
    attention: Attention,
    lists: Lists,
    schedule: Schedule,
    states: States,
    splits: int | None = None,
) -> None:
    """Apply one decode step's attention to the states of each request's own cells, in place.

    For own cell j of a request, with H query heads (paper eq. 5) ::

        logit_h,j = scaling * q_h . k_j                     lse_h = log sum_j exp(logit_h,j), over the whole list
        a_j = (1/H) * sum_h exp(logit_h,j - lse_h)

    which then joins S and M of the cell by the policy's rule (:class:`Accumulation`). K is read once and only where it
    is scored. One program owns a cell, for all heads, so nothing is atomic and the result does not depend on the order
    of programs.

    Parameters
    ----------
    rule
        What the policy accumulates; its decay and schedule are in ``schedule`` already.
    attention, lists
        One layer's, and what it has read. Of a list's scored cells no two are equal.
    schedule, states
        Of this step; updated in place, memory only with rule recurrence.
    splits
        Programs along the sequence, a power of two or not; None fills the device.
    """
    query, keys, lse, scaling, lse_base, parts = attention
    scores, memories = states
    expect("query", query, FLOAT, [None, None, None])
    batch, heads, head_dim = query.shape
    expect("keys", keys, (*FLOAT, *FP8), [None, None, head_dim])
    cells, kv_heads = keys.shape[:2]
    if kv_heads == 0 or heads % kv_heads or not 0 < head_dim <= 256:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads, or head_dim {head_dim} exceeds 256")
    if parts is None:
        expect("lse", lse, torch.float32, [batch, heads])
    else:
        expect("lse", lse, torch.float32, [batch, heads, None])
        expect("parts.count", parts.count, INTEGER, [batch])
        if lse_base != "e" or parts.multiple < 1:
            raise ValueError(f"parts have base e and a positive multiple, not {lse_base!r} and {parts.multiple}")
    expect_lists(lists, batch)
    _expect_schedule(schedule, batch)
    assert scores is not None
    expect("scores", scores, torch.float32, [cells])
    if (memories is not None) != (rule.rule == "recurrence"):
        raise ValueError(f"memories go with rule recurrence, the rule is {rule.rule}")
    if memories is not None:
        expect("memories", memories, torch.float32, [cells])
    if lse_base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', not {lse_base!r}")
    expect_contiguous(keys=keys, scores=scores, memories=memories)
    if batch == 0:
        return
    group, splits = heads // kv_heads, _splits(query, splits)
    _SCORE.launch(
        lambda meta: (splits, batch),
        query,
        keys,
        lse,
        *lists,
        *schedule,
        scores,
        scores if memories is None else memories,
        None if parts is None else parts.count,
        query.stride(0),
        query.stride(1),
        lse.stride(0),
        lse.stride(1),
        scaling * _LOG2_E,
        _LOG2_E if lse_base == "e" else 1.0,
        rule.threshold,
        _RULES[rule.rule],
        kv_heads,
        group,
        head_dim,
        max(16, bucket(group)),
        max(16, bucket(head_dim)),
        _compute_dtype(query.dtype, keys.dtype),
        1 if parts is None else parts.multiple,
        1 if parts is None else bucket(lse.shape[2]),
    )


def _expect_schedule(schedule: Schedule, batch: int) -> None:
    expect("first", schedule.first, torch.int32, [batch])
    expect("decay", schedule.decay, torch.float32, [batch])
    expect("step", schedule.step, INTEGER, [batch])
    expect_contiguous(**schedule._asdict())


def _splits(query: torch.Tensor, splits: int | None) -> int:
    if splits is not None:
        if splits < 1:
            raise ValueError(f"splits must be at least 1, not {splits}")
        return splits
    if not query.is_cuda:
        return 1
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    return int(max(1, -(-processors * _PROGRAMS_PER_SM // query.shape[0])))


def _compute_dtype(query: torch.dtype, keys: torch.dtype) -> Any:
    """Type of the dot product's operands; it always sums in float32, and none of these conversions rounds."""
    if interpreted():  # the interpreter has no bfloat16 dot
        return tl.float32
    return _TRITON[query if keys in FP8 else torch.promote_types(query, keys)]
