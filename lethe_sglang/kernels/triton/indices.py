"""What attention reads, from row and device table: CSR lists of one layer's tokens, or page tables for all layers.

The order of both is that of ``common.slot_lists``: prefix, packed, tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.common import Batch, Lists
from lethe_sglang.kernels.table import column, layers_of
from lethe_sglang.kernels.triton import Kernel, bucket, config, expect, expect_batch, expect_lists

_PROGRAMS = 1024
"""Programs a launch aims at; batches smaller than this are split along the sequence."""


@triton.jit
def hole_of(line, number, wanted, HOLES: tl.constexpr, KEPT: tl.constexpr, LAYERS: tl.constexpr):
    """Layer and place of excess cells: the last layer whose first hole is not behind the cell's number."""
    owner = number * 0 - 1
    for other in range(LAYERS):
        owner += (number >= tl.load(line + HOLES + other)).to(tl.int32)
    owner = tl.where(wanted, owner, 0)
    place = tl.load(line + KEPT + owner, mask=wanted, other=0) + number
    return owner, place - tl.load(line + HOLES + owner, mask=wanted, other=0)


@triton.jit
def _length(
    table, rows, seq_lens, b, mask, table_stride, layer, PREFIX: tl.constexpr, TAIL: tl.constexpr, KEPT: tl.constexpr
):
    """Prefix, tail, k_l and the list's length of requests b."""
    line = table + tl.load(rows + b, mask=mask, other=0).to(tl.int64) * table_stride
    prefix = tl.load(line + PREFIX, mask=mask, other=0)
    tail = tl.load(line + TAIL, mask=mask, other=0)
    kept = tl.load(line + KEPT + layer, mask=mask, other=0)
    seq = tl.load(seq_lens + b, mask=mask, other=0).to(tl.int32)
    return prefix, tail, kept, prefix + kept + seq - tail


@triton.jit(do_not_specialize=["batch", "capacity", "layer"])
def _fill(
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
    blocks,
    PREFIX: tl.constexpr,
    TAIL: tl.constexpr,
    KEPT: tl.constexpr,
    PACKED: tl.constexpr,
    EXCESS: tl.constexpr,
    HOLES: tl.constexpr,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    FILL_INDPTR: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    b = tl.program_id(1)
    prefix, tail, kept, length = _length(table, rows, seq_lens, b, True, table_stride, layer, PREFIX, TAIL, KEPT)
    if FILL_INDPTR:  # every program sums for itself: the lists need no launch before theirs
        earlier = tl.arange(0, BATCH)
        before = (earlier < b) & (earlier < batch)
        lengths = _length(table, rows, seq_lens, earlier, before, table_stride, layer, PREFIX, TAIL, KEPT)[3]
        begin = tl.sum(tl.where(before, lengths, 0), axis=0)
        if split == 0:
            tl.store(indptr + b + 1, begin + length)
            if b == 0:
                tl.store(indptr, 0)
    else:
        begin = tl.load(indptr + b).to(tl.int32)
        length = tl.minimum(length, tl.load(indptr + b + 1).to(tl.int32) - begin)
    row = tl.load(rows + b).to(tl.int64)
    line = table + row * table_stride
    entries = req_to_token + row * row_stride
    if FLAT:
        first = prefix + tl.load(line + PACKED)  # of the excess, as a list position
        excess = tl.load(line + EXCESS + layer)
    for start in range(split * BLOCK, length, tl.num_programs(0) * BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (j < length) & (begin + j < capacity)
        position = tl.where(j < prefix + kept, j, tail + j - prefix - kept)
        base = 0
        if FLAT:
            base = tl.zeros([BLOCK], tl.int32) + layer * blocks
            away = (j >= first) & (j < prefix + kept)
            if first < prefix + kept:
                owner, place = hole_of(line, excess + j - first, away, HOLES, KEPT, LAYERS)
                position = tl.where(away, prefix + place, position)
                base = tl.where(away, owner * blocks, base)
        tl.store(indices + begin + j, base + tl.load(entries + position, mask=mask, other=0), mask=mask)


_KERNEL = Kernel(_fill, [config(BLOCK=256), config(BLOCK=128), config(BLOCK=512), config(BLOCK=1024, num_warps=8)])


def fill_lists(batch: Batch, layer: int, blocks: int | None, lists: Lists, fill_indptr: bool) -> None:
    """Write one layer's lists for a whole batch, in place, in one launch; see ``common.token_lists`` for their order.

    Parameters
    ----------
    batch, layer
        The requests, and l.
    blocks
        Blocks of the pool, padding included, for lists of flat cells. None for lists of slots of the layer's own
        buffer: the layer may have no excess, and every layer that keeps as much has the same lists.
    lists
        Written; ``indices`` at least as long as all lists together. What does not fit is left out.
    fill_indptr
        Write ``indptr``. Otherwise it is read, because the host knew the lengths when it planned, and no list is
        written beyond its end there.
    """
    expect("req_to_token", batch.req_to_token, torch.int32, [None, None])
    requests, num_layers = expect_batch(batch), layers_of(batch.table)
    expect_lists(lists, requests)
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is not among the {num_layers} of the table")
    if blocks is not None and not 0 < blocks <= (2**31 - 1) // num_layers:
        raise ValueError(f"{num_layers} layers of {blocks} blocks cannot be addressed with 32 bits")
    if requests == 0:
        if fill_indptr:
            lists.indptr[:1].zero_()
        return
    splits = max(1, _PROGRAMS // bucket(requests))
    _KERNEL.launch(
        lambda meta: (max(1, min(splits, triton.cdiv(batch.req_to_token.shape[1], meta["BLOCK"]))), requests),
        *batch,
        *lists,
        requests,
        lists.indices.shape[0],
        batch.req_to_token.stride(0),
        batch.table.stride(0),
        layer,
        blocks or 0,
        *(column(name, num_layers) for name in ("prefix", "tail", "kept", "packed", "excess", "holes")),
        num_layers,
        blocks is not None,
        fill_indptr,
        bucket(requests),
    )


@triton.jit(do_not_specialize=["width"])
def _pages(
    req_to_token,
    table,
    rows,
    seq_lens,
    lengths,
    pages,
    width,
    row_stride,
    table_stride,
    pages_stride,
    PREFIX: tl.constexpr,
    TAIL: tl.constexpr,
    KEPT: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    b = tl.program_id(1)
    prefix, tail, kept, length = _length(table, rows, seq_lens, b, True, table_stride, 0, PREFIX, TAIL, KEPT)
    if split == 0:
        tl.store(lengths + b, length)
    entries = req_to_token + tl.load(rows + b).to(tl.int64) * row_stride
    own = pages + b.to(tl.int64) * pages_stride
    used = tl.minimum(tl.cdiv(length, PAGE), width)
    for start in range(split * BLOCK, used, tl.num_programs(0) * BLOCK):
        page = start + tl.arange(0, BLOCK)
        mask = page < used
        first = page * PAGE
        position = tl.where(first < prefix + kept, first, tail + first - prefix - kept)
        tl.store(own + page, tl.load(entries + position, mask=mask, other=0) // PAGE, mask=mask)


_PAGES = Kernel(_pages, _KERNEL.configs)


def fill_pages(batch: Batch, page_size: int, lengths: torch.Tensor, pages: torch.Tensor) -> None:
    """Write a whole batch's packed rows as page tables, in place, in one launch; every layer keeps as many cells.

    A packed row is ``row[0, P + k) + row[T, seq)``, and P, k and T are multiples of the page size.

    Parameters
    ----------
    batch
        The requests; k is layer 0's.
    page_size
        Tokens.
    lengths
        int32 ``[B]``: written, the tokens of each packed row.
    pages
        int32 ``[B, W]``: written up to each row's last page; what is behind stays, and what does not fit is left out.
    """
    expect("req_to_token", batch.req_to_token, torch.int32, [None, None])
    requests, num_layers = expect_batch(batch), layers_of(batch.table)
    expect("lengths", lengths, torch.int32, [requests])
    expect("pages", pages, torch.int32, [requests, None])
    if page_size < 1:
        raise ValueError(f"a page has at least one token, not {page_size}")
    if requests == 0:
        return
    splits = max(1, _PROGRAMS // bucket(requests))
    _PAGES.launch(
        lambda meta: (max(1, min(splits, triton.cdiv(pages.shape[1], meta["BLOCK"]))), requests),
        *batch,
        lengths,
        pages,
        pages.shape[1],
        batch.req_to_token.stride(0),
        batch.table.stride(0),
        pages.stride(0),
        *(column(name, num_layers) for name in ("prefix", "tail", "kept")),
        page_size,
    )
