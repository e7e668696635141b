"""The score of a decode step: attention that each own cell received, from the attention's log-sum-exp (paper eq. 5).

The kernel reads K through the index list that attention has just read, not through row and ledger table: the packed
layout is resolved once a layer (``indices.py``), attention and score cannot disagree about a list, and FlashInfer and
Triton decode are served alike. What depends on the request and the step only is resolved once a step, by
:func:`schedule`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from lethe_sglang.kernels.table import NEVER, column, layers_of
from lethe_sglang.kernels.triton import Tuned, bucket, config, expect, expect_contiguous, interpreted

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

_INTEGER = (torch.int32, torch.int64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_RULES = {"sum": 0, "max": 1, "recurrence": 2}
_PROGRAMS_PER_SM = 8
_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["batch", "every"])  # type: ignore[misc]
def _schedule(  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[misc]
def _score(  # type: ignore[no-untyped-def]
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
    query_stride_b,
    query_stride_h,
    lse_stride,
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
            normaliser = tl.load(lse + b * lse_stride + head, mask=heads < GROUP, other=float("inf")) * lse_scale
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


_SCHEDULE = Tuned(_schedule, [config(BLOCK=128), config(BLOCK=256)])
_SCORE = Tuned(
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


def schedule(
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulation: Accumulation,
    first: torch.Tensor,
    decay: torch.Tensor,
) -> None:
    """Resolve, once a step and for all layers, which own tokens this step scores and with which decay.

    A step is scored if ``seq % every == 0`` and, with a window, ``seq > score_after``; the first step of a window has
    decay 0. A padded row of a CUDA graph is never scored.

    Parameters
    ----------
    table
        int32 ``[R, columns]``: the device table (``kernels/table.py``).
    rows, seq_lens
        int32 or int64 ``[B]``: the requests' rows (0 for padding), and their lengths (tokens), the newest included.
    accumulation
        What the policy accumulates.
    first
        int32 ``[B]``: written; list position of the first scored token, ``NEVER`` where the step is not scored.
    decay
        float32 ``[B]``: written; gamma of this step.

    Raises
    ------
    ValueError
        For a dtype, shape or stride other than these.
    """
    expect("table", table, torch.int32, [None, None])
    expect("rows", rows, _INTEGER, [None])
    batch = rows.shape[0]
    expect("seq_lens", seq_lens, _INTEGER, [batch])
    expect("first", first, torch.int32, [batch])
    expect("decay", decay, torch.float32, [batch])
    expect_contiguous(rows=rows, seq_lens=seq_lens, first=first, decay=decay)
    num_layers = layers_of(table)
    if batch:
        _SCHEDULE.launch(
            lambda meta: (triton.cdiv(batch, meta["BLOCK"]),),
            (bucket(batch),),
            table,
            rows,
            seq_lens,
            first,
            decay,
            batch,
            table.stride(0),
            accumulation.every,
            accumulation.step_decay,
            *(column(name, num_layers) for name in ("score_from", "score_after")),
            NEVER,
            accumulation.window is not None,
        )


def score(
    rule: Accumulation,
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    first: torch.Tensor,
    decay: torch.Tensor,
    step: torch.Tensor,
    scores: torch.Tensor,
    memories: torch.Tensor | None,
    scaling: float,
    k_scale: float = 1.0,
    lse_base: Literal["e", "2"] = "e",
    splits: int | None = None,
) -> None:
    """Apply one decode step's attention to the states of each request's own cells, in place.

    For own cell j of a request, with H query heads (paper eq. 5; the rules are those of :class:`Accumulation`) ::

        logit_h,j = scaling * k_scale * q_h . k_j           lse_h = log sum_j exp(logit_h,j), over the whole list
        a_j = (1/H) * sum_h exp(logit_h,j - lse_h)
        sum         S = decay * S + a
        max         S = max(decay * S, a)
        recurrence  if a > threshold:  M = max(M, step - S);  S = step

    K is read once and only where it is scored. One program owns a cell, for all heads, so nothing is atomic and the
    result does not depend on the order of programs.

    Parameters
    ----------
    rule
        What the policy accumulates; its decay and schedule are in ``first`` and ``decay`` already.
    query
        ``[B, Hq, D]``, float32, float16 or bfloat16; D at most 256.
    keys
        ``[cells, Hkv, D]``: the flat pool; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, contiguous.
        Query head h reads KV head ``h // (Hq / Hkv)``.
    lse
        float32 ``[B, Hq]``: the attention's log-sum-exp, of the scaled logits.
    indptr
        int32 or int64, at least ``[B + 1]``: list b is ``indices[indptr[b]:indptr[b + 1]]``.
    indices
        int32 or int64 ``[n]``: flat cell indices. Of a list's scored cells no two are equal.
    first
        int32 ``[B]``: list position of the first scored token: a shared prefix is not scored. ``NEVER`` scores none.
    decay
        float32 ``[B]``: gamma of this step.
    step
        int32 or int64 ``[B]``: sequence length (tokens), this step's token included.
    scores, memories
        float32 ``[cells]``: S and M of the whole pool; memories only with rule recurrence.
    scaling, k_scale
        Softmax scale; factor of a stored key (fp8).
    lse_base
        Base of the logarithm in ``lse``: FlashInfer's is 2.
    splits
        Programs along the sequence, a power of two or not; None fills the device.

    Raises
    ------
    ValueError
        For a dtype, shape, stride or base other than these.
    """
    expect("query", query, _FLOAT, [None, None, None])
    batch, heads, head_dim = query.shape
    expect("keys", keys, (*_FLOAT, *_FP8), [None, None, head_dim])
    cells, kv_heads = keys.shape[:2]
    if kv_heads == 0 or heads % kv_heads or not 0 < head_dim <= 256:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads, or head_dim {head_dim} exceeds 256")
    expect("lse", lse, torch.float32, [batch, heads])
    expect("indptr", indptr, _INTEGER, [None])
    expect("indices", indices, _INTEGER, [None])
    expect("first", first, torch.int32, [batch])
    expect("decay", decay, torch.float32, [batch])
    expect("step", step, _INTEGER, [batch])
    expect("scores", scores, torch.float32, [cells])
    if indptr.shape[0] < batch + 1:
        raise ValueError(f"indptr holds {indptr.shape[0]} entries; {batch} requests need {batch + 1}")
    if (memories is not None) != (rule.rule == "recurrence"):
        raise ValueError(f"memories go with rule recurrence, the rule is {rule.rule}")
    if memories is not None:
        expect("memories", memories, torch.float32, [cells])
    if lse_base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', not {lse_base!r}")
    expect_contiguous(
        keys=keys, indptr=indptr, indices=indices, first=first, decay=decay, step=step, scores=scores, memories=memories
    )
    if batch == 0:
        return
    group, splits = heads // kv_heads, _splits(query, splits)
    _SCORE.launch(
        lambda meta: (splits, batch),
        (head_dim, group, kv_heads, bucket(batch), query.dtype, keys.dtype, rule.rule),
        query,
        keys,
        lse,
        indptr,
        indices,
        first,
        decay,
        step,
        scores,
        scores if memories is None else memories,
        query.stride(0),
        query.stride(1),
        lse.stride(0),
        scaling * k_scale * _LOG2_E,
        _LOG2_E if lse_base == "e" else 1.0,
        rule.threshold,
        _RULES[rule.rule],
        kv_heads,
        group,
        head_dim,
        max(16, bucket(group)),
        max(16, bucket(head_dim)),
        _compute_dtype(query.dtype, keys.dtype),
    )


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
    return _TRITON[query if keys in _FP8 else torch.promote_types(query, keys)]
