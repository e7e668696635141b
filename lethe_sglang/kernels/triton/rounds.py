"""The kernels of a round around the policy's ranks: gather the candidates, rewrite the rows, place the kept cells.

All host numbers are in one round table (``kernels/table.py``), so a launch of rounds is one upload. Each kernel is one
launch for all layers and requests; their reference is ``kernels/reference_round.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.common import Candidate, Cells, Extent
from lethe_sglang.kernels.table import ROUND
from lethe_sglang.kernels.triton import INTEGER, Kernel, config, expect, expect_contiguous
from lethe_sglang.kernels.triton.indices import hole_of


@triton.jit(do_not_specialize=["width"])
def _gather(
    req_to_token,
    table,
    scores,
    positions,
    memories,
    cells,
    valid,
    score,
    position,
    memory,
    width,
    row_stride,
    table_stride,
    blocks,
    ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    OLD_PACKED: tl.constexpr,
    OLD_TAIL: tl.constexpr,
    NEW_TAIL: tl.constexpr,
    OLD_KEPT: tl.constexpr,
    OLD_EXCESS: tl.constexpr,
    OLD_HOLES: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1)
    layer = tl.program_id(2)
    line = table + b * table_stride
    prefix = tl.load(line + PREFIX)
    packed = tl.load(line + OLD_PACKED)
    tail = tl.load(line + OLD_TAIL)
    kept = tl.load(line + OLD_KEPT + layer)
    length = kept + tl.load(line + NEW_TAIL) - tail
    entries = req_to_token + tl.load(line + ROW).to(tl.int64) * row_stride
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = j < length
    at = tl.where(j < kept, prefix + j, tail + j - kept)
    base = tl.zeros([BLOCK], tl.int32) + layer * blocks
    if packed < kept:
        away = (j >= packed) & (j < kept)
        number = tl.load(line + OLD_EXCESS + layer) + j - packed
        owner, place = hole_of(line, number, away, OLD_HOLES, OLD_KEPT, LAYERS)
        at = tl.where(away, prefix + place, at)
        base = tl.where(away, owner * blocks, base)
    cell = tl.where(mask, base + tl.load(entries + at, mask=mask, other=0), 0)
    out = (layer.to(tl.int64) * tl.num_programs(1) + b) * width + j
    inside = j < width
    tl.store(cells + out, cell, mask=inside)
    tl.store(valid + out, mask.to(tl.int8), mask=inside)
    if scores is not None:
        tl.store(score + out, tl.load(scores + cell, mask=inside, other=0.0), mask=inside)
    if memories is not None:
        tl.store(memory + out, tl.load(memories + cell, mask=inside, other=0.0), mask=inside)
    if positions is not None:
        stored = tl.load(positions + cell, mask=inside & (j < kept), other=0)
        tl.store(position + out, tl.where(j < kept, stored, tail + j - kept), mask=inside)


@triton.jit
def _rewrite(
    req_to_token,
    table,
    freed,
    row_stride,
    table_stride,
    ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    OLD_PACKED: tl.constexpr,
    OLD_TAIL: tl.constexpr,
    NEW_PACKED: tl.constexpr,
    NEW_TAIL: tl.constexpr,
    FREE_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = table + tl.program_id(0) * table_stride
    prefix = tl.load(line + PREFIX)
    old_packed = tl.load(line + OLD_PACKED)
    old_tail = tl.load(line + OLD_TAIL)
    packed = tl.load(line + NEW_PACKED)
    tail = tl.load(line + NEW_TAIL)
    entries = req_to_token + tl.load(line + ROW).to(tl.int64) * row_stride
    out = freed + tl.load(line + FREE_START) - packed
    own = old_packed + tail - old_tail
    # Entries only move to the front, so that a chunk never writes what a later one reads.
    for start in range(0, own, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.where(i < old_packed, prefix + i, old_tail + i - old_packed)
        slot = tl.load(entries + at, mask=i < own, other=0)
        tl.debug_barrier()
        tl.store(entries + prefix + i, slot, mask=i < packed)
        tl.store(out + i, slot.to(tl.int64), mask=(i >= packed) & (i < own))
    tl.debug_barrier()
    for start in range(prefix + packed, tail, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(entries + i, tl.zeros([BLOCK], tl.int32), mask=i < tail)


@triton.jit(do_not_specialize=["width", "room_width"])
def _place(
    req_to_token,
    table,
    cells,
    keep,
    position,
    score,
    memory,
    gaps,
    positions,
    memories,
    source,
    destination,
    written,
    mass,
    width,
    room_width,
    row_stride,
    table_stride,
    blocks,
    ROW: tl.constexpr,
    PREFIX: tl.constexpr,
    OLD_PACKED: tl.constexpr,
    OLD_TAIL: tl.constexpr,
    NEW_PACKED: tl.constexpr,
    NEW_TAIL: tl.constexpr,
    OLD_KEPT: tl.constexpr,
    KEPT: tl.constexpr,
    EXCESS: tl.constexpr,
    HOLES: tl.constexpr,
    START: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    layer = tl.program_id(1)
    line = table + b * table_stride
    prefix = tl.load(line + PREFIX)
    old_packed = tl.load(line + OLD_PACKED)
    packed = tl.load(line + NEW_PACKED)
    old_kept = tl.load(line + OLD_KEPT + layer)
    kept = tl.load(line + KEPT + layer)
    excess = tl.load(line + EXCESS + layer)
    start_kept = tl.load(line + START + layer)
    entries = req_to_token + tl.load(line + ROW).to(tl.int64) * row_stride
    room = tl.minimum(kept, packed)  # places of the layer's own
    segment = layer.to(tl.int64) * tl.num_programs(0) + b
    cells += segment * width
    keep += segment * width
    gaps += segment * room_width

    # Places that no kept cell of the layer's own holds, in ascending order.
    vacancies = 0
    for start in range(0, room, BLOCK):
        i = start + tl.arange(0, BLOCK)
        cell = tl.where(i < old_packed, i, old_kept + i - old_packed)
        holds = ((i < old_kept) | (i >= old_packed)) & (cell < width) & (i < room)
        taken = tl.load(keep + cell, mask=holds, other=0) != 0
        vacant = ((i < room) & ~taken).to(tl.int32)
        tl.store(gaps + vacancies + tl.cumsum(vacant, axis=0) - 1, i, mask=vacant != 0)
        vacancies += tl.sum(vacant, axis=0)
    tl.debug_barrier()

    own = old_kept + tl.load(line + NEW_TAIL) - tl.load(line + OLD_TAIL)
    moved = 0
    count = 0
    before, after = 0.0, 0.0
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        chosen = tl.load(keep + j, mask=j < width, other=0) != 0
        home = tl.where(j < old_kept, j, old_packed + j - old_kept)
        stays = chosen & (home < room) & ((j < old_packed) | (j >= old_kept))
        moves = (chosen & ~stays).to(tl.int32)
        turn = moved + tl.cumsum(moves, axis=0) - 1
        fills = (moves != 0) & (turn < vacancies)
        place = tl.where(fills, tl.load(gaps + turn, mask=fills, other=0), home)
        base = tl.zeros([BLOCK], tl.int32) + layer * blocks
        if packed < kept:
            away = (moves != 0) & (turn >= vacancies)
            owner, hole = hole_of(line, excess + turn - vacancies, away, HOLES, KEPT, LAYERS)
            place = tl.where(away, hole, place)
            base = tl.where(away, owner * blocks, base)
        target = base + tl.load(entries + prefix + place, mask=chosen, other=0)
        taken = chosen.to(tl.int32)
        out = start_kept + count + tl.cumsum(taken, axis=0) - 1
        tl.store(source + out, tl.load(cells + j, mask=chosen, other=0), mask=chosen)
        tl.store(destination + out, target, mask=chosen)
        if positions is not None:
            value = tl.load(position + segment * width + j, mask=chosen, other=0)
            tl.store(positions + target, value, mask=chosen)
            tl.store(written + out, value, mask=chosen)
        if memories is not None:
            renewed = tl.load(memory + segment * width + j, mask=chosen, other=0.0)
            tl.store(memories + target, renewed, mask=chosen)
        if score is not None:
            gathered = tl.load(score + segment * width + j, mask=j < own, other=0.0)
            before += tl.sum(gathered, axis=0)
            after += tl.sum(tl.where(chosen, gathered, 0.0), axis=0)
        moved += tl.sum(moves, axis=0)
        count += tl.sum(taken, axis=0)
    if score is not None:
        tl.store(mass + 2 * segment, before)
        tl.store(mass + 2 * segment + 1, after)


_GATHER = Kernel(_gather, [config(BLOCK=256), config(BLOCK=128), config(BLOCK=512)])
_REWRITE = Kernel(_rewrite, [config(BLOCK=1024), config(BLOCK=512)])
_PLACE = Kernel(_place, [config(BLOCK=512), config(BLOCK=256), config(BLOCK=1024, num_warps=8)])


def _columns(num_layers: int, *names: str) -> list[int]:
    return [ROUND.column(name, num_layers) for name in names]


def _expect(req_to_token: torch.Tensor, table: torch.Tensor, cells: Cells) -> tuple[int, int]:
    """Check what every launcher takes; return B and L."""
    expect("req_to_token", req_to_token, torch.int32, [None, None])
    expect("table", table, torch.int32, [None, None])
    num_layers = ROUND.layers_of(table)
    if num_layers != cells.num_layers:
        raise ValueError(f"the round table has {num_layers} layers, the pool {cells.num_layers}")
    if num_layers * cells.blocks >= 2**31:
        raise ValueError(f"{num_layers} layers of {cells.blocks} blocks cannot be addressed with 32 bits")
    return int(table.shape[0]), num_layers


def gather(req_to_token: torch.Tensor, table: torch.Tensor, cells: Cells, extent: Extent) -> Candidate:
    """Resolve the candidates of a launch and gather their states, in one launch.

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``.
    table
        int32 ``[B, columns]``: the round table.
    cells
        The pool.
    extent
        Of the launch.

    Returns
    -------
    Candidate
        ``cells`` int32 here.
    """
    batch, layers = _expect(req_to_token, table, cells)
    shape = (layers, batch, extent.candidates)

    def made(like: torch.Tensor | None) -> torch.Tensor | None:
        return None if like is None else torch.empty(shape, dtype=like.dtype, device=table.device)

    found = torch.empty(shape, dtype=torch.int32, device=table.device)
    valid = torch.empty(shape, dtype=torch.bool, device=table.device)
    position, score, memory = made(cells.position), made(cells.score), made(cells.memory)
    names = ("row", "prefix", "old_packed", "old_tail", "new_tail", "old_kept", "old_excess", "old_holes")
    _GATHER.launch(
        lambda meta: (triton.cdiv(max(extent.candidates, 1), meta["BLOCK"]), batch, layers),
        req_to_token,
        table,
        cells.score,
        cells.position,
        cells.memory,
        found,
        valid.view(torch.int8),
        score,
        position,
        memory,
        extent.candidates,
        req_to_token.stride(0),
        table.stride(0),
        cells.blocks,
        *_columns(layers, *names),
        layers,
    )
    return Candidate(found, valid, position, score, memory)


def rewrite_rows(req_to_token: torch.Tensor, table: torch.Tensor, extent: Extent) -> torch.Tensor:
    """Rewrite the row entries and return the slots that are not in use any more, in one launch.

    A request's own blocks are those of its packed cells and then those that have left the recent window. The first
    ``new_packed`` of them hold what is kept, whatever they held before; the rest is free, and its entries are dead.

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``; entries of packed, dead and tail positions are rewritten.
    table, extent
        See :func:`gather`.

    Returns
    -------
    torch.Tensor
        int64 ``[extent.freed]``: request by request, in row order.
    """
    expect("req_to_token", req_to_token, torch.int32, [None, None])
    expect("table", table, torch.int32, [None, None])
    freed = torch.empty(extent.freed, dtype=torch.int64, device=table.device)
    names = ("row", "prefix", "old_packed", "old_tail", "new_packed", "new_tail", "free_start")
    _REWRITE.launch(
        lambda meta: (int(table.shape[0]),),
        req_to_token,
        table,
        freed,
        req_to_token.stride(0),
        table.stride(0),
        *_columns(ROUND.layers_of(table), *names),
    )
    return freed


def place(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    candidate: Candidate,
    keep: torch.Tensor,
    cells: Cells,
    extent: Extent,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Say where kept cells lie and where they go, and write the states that are made anew, in one launch.

    A kept cell that lies in its layer's own buffer at one of the first ``min(k_l, m)`` places stays. Those places that
    none such holds are filled, in ascending order, by the cells that have to move, in the order of the candidates; what
    is left of these goes into holes (``cache/layout.py``).

    Parameters
    ----------
    req_to_token
        Rewritten.
    table, cells, extent
        See :func:`gather`.
    candidate
        ``position`` and ``memory`` (or None) become states of the cells at their new places; ``score`` is summed.
    keep
        bool ``[L, B, n]``: as many as the table says.

    Returns
    -------
    tuple
        Source and destination, int32 ``[extent.kept]``, request-major, then layer; the positions of these cells, int32,
        or None; and the sums of scores, of all candidates and of the kept ones, float32 ``[L, B, 2]``, or None.
    """
    batch, layers = _expect(req_to_token, table, cells)
    shape = [layers, batch, extent.candidates]
    expect("cells", candidate.cells, INTEGER, shape)
    expect("keep", keep, torch.bool, shape)
    expect_contiguous(keep=keep, **candidate._asdict())

    def made(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=table.device)

    source, destination, gaps = made(extent.kept), made(extent.kept), made(layers, batch, extent.most_packed)
    positions = None if candidate.position is None else cells.position
    written = None if positions is None else made(extent.kept)
    mass = None if candidate.score is None else torch.empty((layers, batch, 2), device=table.device)
    names = ("row", "prefix", "old_packed", "old_tail", "new_packed", "new_tail", "old_kept", "kept", "excess")
    _PLACE.launch(
        lambda meta: (batch, layers),
        req_to_token,
        table,
        candidate.cells,
        keep.view(torch.int8),
        *candidate[2:],
        gaps,
        positions,
        None if candidate.memory is None else cells.memory,
        source,
        destination,
        written,
        mass,
        extent.candidates,
        extent.most_packed,
        req_to_token.stride(0),
        table.stride(0),
        cells.blocks,
        *_columns(layers, *names, "holes", "start"),
        layers,
    )
    return source, destination, written, mass
