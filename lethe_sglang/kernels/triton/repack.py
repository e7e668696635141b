"""Moving cells: one launch gathers into scratch, one scatters, so that sources and destinations may overlap."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.triton import INTEGER, Kernel, config, expect, expect_contiguous

_BUFFERS = 5
_ALIGNMENT = 16
_WORDS = (torch.int32, torch.int16, torch.uint8)


@triton.jit
def _move(buffer, scratch, cell, i, moves, column, WIDTH: tl.constexpr, SCATTER: tl.constexpr, BLOCK_W: tl.constexpr):
    if WIDTH == 1:
        mask = moves
        at_cell = buffer + cell
        at_scratch = scratch + i
    else:
        words = column * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = moves[:, None] & (words < WIDTH)[None, :]
        at_cell = buffer + cell[:, None] * WIDTH + words[None, :]
        at_scratch = scratch + i.to(tl.int64)[:, None] * WIDTH + words[None, :]
    if SCATTER:
        tl.store(at_cell, tl.load(at_scratch, mask=mask), mask=mask)
    else:
        tl.store(at_scratch, tl.load(at_cell, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _repack(
    buffers,
    scratches,
    source,
    destination,
    n,
    WIDTHS: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    origin = tl.load(source + i, mask=i < n, other=0).to(tl.int64)
    target = tl.load(destination + i, mask=i < n, other=0).to(tl.int64)
    moves = (i < n) & (origin != target)
    cell = target if SCATTER else origin
    column = tl.program_id(1)
    for b in tl.static_range(len(WIDTHS)):
        columns = (WIDTHS[b] + BLOCK_W - 1) // BLOCK_W
        if (column >= 0) & (column < columns):
            _move(buffers[b], scratches[b], cell, i, moves, column, WIDTHS[b], SCATTER, BLOCK_W)
        column -= columns


_KERNEL = Kernel(
    _repack,
    [
        config(BLOCK_N=16, BLOCK_W=256),
        config(BLOCK_N=8, BLOCK_W=256),
        config(BLOCK_N=32, BLOCK_W=128),
        config(BLOCK_N=32, BLOCK_W=256, num_warps=8),
    ],
)


def _cell_bytes(buffer: torch.Tensor) -> int:
    return int(buffer[:1].numel() * buffer.element_size())


def _words(buffer: torch.Tensor) -> torch.Tensor:
    """View a buffer as ``[cells, w]`` of the widest words its cells divide into."""
    raw = buffer.view(buffer.shape[0], -1).view(torch.uint8)
    for word in _WORDS:
        if raw.shape[1] % word.itemsize == 0 and raw.data_ptr() % word.itemsize == 0:
            return raw.view(word)
    raise AssertionError("bytes divide into bytes")


def scratch_bytes(buffers: Iterable[torch.Tensor], n: int) -> int:
    """Bytes of scratch that :func:`repack` needs for ``n`` cells.

    A round's requests own disjoint cells, so a caller may split it between requests to bound the scratch.
    """
    return sum(-(-_cell_bytes(buffer) * n // _ALIGNMENT) * _ALIGNMENT for buffer in buffers)


def repack(
    buffers: Iterable[torch.Tensor],
    source: torch.Tensor,
    destination: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """``buffer[destination] = buffer[source]`` for each buffer, as if all cells moved at once.

    One pair of launches for all buffers, whatever layers and requests the cells belong to. Bytes are moved, so any
    dtype will do. A cell that stays where it is costs its index only.

    Parameters
    ----------
    buffers
        ``[cells, ...]`` each, at most 5: keys, values and whatever states the policy declares.
    source, destination
        int32 or int64 ``[n]``: flat cell indices; destinations are distinct.
    scratch
        uint8, 16-byte aligned, ``scratch_bytes(buffers, n)`` or more; None or less allocates it.
    """
    buffers = list(buffers)
    if not 1 <= len(buffers) <= _BUFFERS:
        raise ValueError(f"1 to {_BUFFERS} buffers move in one launch, not {len(buffers)}")
    for i, buffer in enumerate(buffers):
        if buffer.dim() == 0 or buffer.shape[0] != buffers[0].shape[0] or buffer.numel() == 0:
            raise ValueError(f"buffer {i} must have {buffers[0].shape[:1]} cells of data, not shape {buffer.shape}")
        expect_contiguous(**{f"buffer {i}": buffer})
    expect("source", source, INTEGER, [None])
    expect("destination", destination, INTEGER, [source.shape[0]])
    expect_contiguous(source=source, destination=destination)
    n = source.shape[0]
    if n == 0:
        return
    needed = scratch_bytes(buffers, n)
    if scratch is None or scratch.shape[0] < needed:
        scratch = torch.empty(needed, dtype=torch.uint8, device=source.device)
    expect("scratch", scratch, torch.uint8, [None])
    if scratch.data_ptr() % _ALIGNMENT:
        raise ValueError(f"scratch must be {_ALIGNMENT}-byte aligned")

    words, temporary, start = tuple(_words(buffer) for buffer in buffers), [], 0
    for view, buffer in zip(words, buffers, strict=True):
        end = start + _cell_bytes(buffer) * n
        temporary.append(scratch[start:end].view(view.dtype))
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
    widths = tuple(view.shape[1] for view in words)
    for scatter in (False, True):
        _KERNEL.launch(
            lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), sum(triton.cdiv(w, meta["BLOCK_W"]) for w in widths)),
            words,
            tuple(temporary),
            source,
            destination,
            n,
            widths,
            scatter,
        )
