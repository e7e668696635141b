"""Zero-on-write: blocks are reused, so the states of a cell start anew when its slot is written."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from lethe_sglang.kernels.triton import Tuned, bucket, config, expect, expect_contiguous

_INTEGER = (torch.int32, torch.int64)


@triton.jit(do_not_specialize=["n", "cells"])  # type: ignore[misc]
def _start(  # type: ignore[no-untyped-def]
    score,
    memory,
    slots,
    positions,
    n,
    cells,
    blocks,
    HAS_SCORE: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
    RECURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = i % n
    mask = i < cells
    cell = (i // n).to(tl.int64) * blocks + tl.load(slots + token, mask=mask, other=0)
    if HAS_SCORE:
        if RECURS:
            tl.store(score + cell, tl.load(positions + token, mask=mask, other=0).to(tl.float32), mask=mask)
        else:
            tl.store(score + cell, tl.zeros([BLOCK], tl.float32), mask=mask)
    if HAS_MEMORY:
        tl.store(memory + cell, tl.zeros([BLOCK], tl.float32), mask=mask)


_KERNEL = Tuned(_start, [config(BLOCK=256), config(BLOCK=128), config(BLOCK=1024, num_warps=8)])


def start_states(
    score: torch.Tensor | None,
    memory: torch.Tensor | None,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    num_layers: int,
) -> None:
    """Start the states of slots just allocated, in all layers, in one launch.

    A cell that is written starts with S = M = 0, under rule recurrence (:class:`Accumulation`) with S = its position.

    Parameters
    ----------
    score, memory
        float32 ``[L * blocks]``: S and M of the whole pool, or None if the policy has no such state.
    slots
        int32 or int64 ``[n]``: the slots; padded rows name slot 0, whose cells nobody reads.
    positions
        int32 or int64 ``[n]``: logical position (tokens) of each slot under rule recurrence, else None.
    num_layers
        L.

    Raises
    ------
    ValueError
        For a dtype, shape or stride other than these.
    """
    expect("slots", slots, _INTEGER, [None])
    n = slots.shape[0]
    states = [state for state in (score, memory) if state is not None]
    if not states or n == 0:
        return
    for name, state in (("score", score), ("memory", memory)):
        if state is not None:
            expect(name, state, torch.float32, [states[0].shape[0]])
    if num_layers < 1 or states[0].shape[0] % num_layers:
        raise ValueError(f"{states[0].shape[0]} cells do not divide into {num_layers} layers")
    if positions is not None:
        expect("positions", positions, _INTEGER, [n])
    expect_contiguous(score=score, memory=memory, slots=slots, positions=positions)
    cells = num_layers * n
    _KERNEL.launch(
        lambda meta: (triton.cdiv(cells, meta["BLOCK"]),),
        (bucket(cells),),
        states[0] if score is None else score,
        states[0] if memory is None else memory,
        slots,
        slots if positions is None else positions,
        n,
        cells,
        states[0].shape[0] // num_layers,
        score is not None,
        memory is not None,
        positions is not None,
    )
