"""Token lists of one layer: row + ledger table -> CSR lists over the flat pool, a paged cache of page size 1.

The layout of a list is that of ``lethe_sglang/kernels/indices.py``: prefix, packed, tail.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from lethe_sglang.kernels.triton import Tuned, bucket, config, expect, expect_contiguous

_INTEGER = (torch.int32, torch.int64)
_PROGRAMS = 1024
"""Programs a launch aims at; batches smaller than this are split along the sequence."""


@triton.jit
def _length(  # type: ignore[no-untyped-def]
    table, rows, seq_lens, b, mask, table_stride, layer
):
    """Prefix, tail, k_l and the list's length of requests b."""
    line = table + tl.load(rows + b, mask=mask, other=0).to(tl.int64) * table_stride
    prefix = tl.load(line, mask=mask, other=0)
    tail = tl.load(line + 1, mask=mask, other=0)
    kept = tl.load(line + 4 + layer, mask=mask, other=0)
    seq = tl.load(seq_lens + b, mask=mask, other=0).to(tl.int32)
    return prefix, tail, kept, prefix + kept + seq - tail


@triton.jit(do_not_specialize=["batch", "capacity", "layer"])  # type: ignore[misc]
def _fill(  # type: ignore[no-untyped-def]
    req_to_token,
    table,
    rows,
    seq_lens,
    indptr,
    indices,
    batch,
    capacity,
    row_stride,
    table_stride,
    layer,
    num_layers,
    blocks,
    FILL_INDPTR: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    b = tl.program_id(1)
    prefix, tail, kept, length = _length(table, rows, seq_lens, b, True, table_stride, layer)
    if FILL_INDPTR:  # every program sums for itself: the lists need no launch before theirs
        earlier = tl.arange(0, BATCH)
        before = (earlier < b) & (earlier < batch)
        lengths = _length(table, rows, seq_lens, earlier, before, table_stride, layer)[3]
        begin = tl.sum(tl.where(before, lengths, 0), axis=0)
        if split == 0:
            tl.store(indptr + b + 1, begin + length)
            if b == 0:
                tl.store(indptr, 0)
    else:
        begin = tl.load(indptr + b).to(tl.int32)
        length = tl.minimum(length, tl.load(indptr + b + 1).to(tl.int32) - begin)
    row = tl.load(rows + b).to(tl.int64)
    offset = tl.load(table + row * table_stride + 4 + num_layers + layer)
    entries = req_to_token + row * row_stride
    for start in range(split * BLOCK, length, tl.num_programs(0) * BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (j < length) & (begin + j < capacity)
        packed = (j >= prefix) & (j < prefix + kept)
        number = tl.where(packed, offset + j - prefix, 0)
        behind = tl.where(j < prefix, j, tail + j - prefix - kept)
        slot = tl.load(entries + tl.where(packed, prefix + number // num_layers, behind), mask=mask, other=0)
        owner = tl.where(packed, number % num_layers, layer)
        tl.store(indices + begin + j, owner * blocks + slot, mask=mask)


_KERNEL = Tuned(_fill, [config(BLOCK=256), config(BLOCK=128), config(BLOCK=512), config(BLOCK=1024, num_warps=8)])


def _launch(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    fill_indptr: bool,
) -> None:
    expect("req_to_token", req_to_token, torch.int32, [None, None])
    expect("table", table, torch.int32, [None, None])
    expect("rows", rows, _INTEGER, [None])
    batch = rows.shape[0]
    expect("seq_lens", seq_lens, _INTEGER, [batch])
    expect("indptr", indptr, _INTEGER, [None])
    expect("indices", indices, _INTEGER, [None])
    num_layers = (table.shape[1] - 4) // 2
    if table.shape[1] != 4 + 2 * num_layers or not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is not among those of a table of {table.shape[1]} columns, 4 + 2L")
    if indptr.shape[0] < batch + 1:
        raise ValueError(f"indptr holds {indptr.shape[0]} entries; {batch} requests need {batch + 1}")
    if not 0 < blocks <= (2**31 - 1) // num_layers:
        raise ValueError(f"{num_layers} layers of {blocks} blocks cannot be addressed with 32 bits")
    expect_contiguous(rows=rows, seq_lens=seq_lens, indptr=indptr, indices=indices)
    if batch == 0:
        if fill_indptr:
            indptr[:1].zero_()
        return
    splits = max(1, _PROGRAMS // bucket(batch))
    _KERNEL.launch(
        lambda meta: (max(1, min(splits, triton.cdiv(req_to_token.shape[1], meta["BLOCK"]))), batch),
        (bucket(batch), fill_indptr),
        req_to_token,
        table,
        rows,
        seq_lens,
        indptr,
        indices,
        batch,
        indices.shape[0],
        req_to_token.stride(0),
        table.stride(0),
        layer,
        num_layers,
        blocks,
        fill_indptr,
        bucket(batch),
    )


def fill_lists(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write one layer's lists for a whole batch, in place, in one launch.

    List position j of a request is in layer l at (architecture.md) ::

        [0, P)            l * blocks + row[j]
        [P, P + k_l)      (cell % L) * blocks + row[P + cell // L]       cell = off_l + j - P
        [P + k_l, ...)    l * blocks + row[T + j - P - k_l]

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    table
        int32 ``[R, 4 + 2L]``: the ledger's table (P, T, first scored position, scored-after length, k_l, off_l).
    rows
        int32 or int64 ``[B]``: the requests' rows; 0 for a padded row of a CUDA graph.
    seq_lens
        int32 or int64 ``[B]``: logical length (tokens), the newest included; a padded row may have 0.
    layer, blocks
        l, and blocks of the pool, padding included.
    indptr
        int32 or int64, at least ``[B + 1]``: written; list b is ``indices[indptr[b]:indptr[b + 1]]``.
    indices
        int32 or int64, at least as long as all lists together: written. What does not fit is left out.

    Raises
    ------
    ValueError
        For a dtype, shape or stride other than these, or a layer the table does not have.
    """
    _launch(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices, fill_indptr=True)


def fill_indices(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """As :func:`fill_lists`, but ``indptr`` is read: the host knew the lengths when it planned.

    No list is written beyond its end in ``indptr``; see :func:`fill_lists` for arguments and errors.
    """
    _launch(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices, fill_indptr=False)
