"""Zero-on-write: blocks are reused, so the states of a cell start anew when its slot is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.common import States
from lethe_sglang.kernels.triton import INTEGER, Kernel, config, expect, expect_contiguous


@triton.jit(do_not_specialize=["n", "cells"])
def _start(score, memory, slots, positions, n, cells, blocks, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = i % n
    mask = i < cells
    cell = (i // n).to(tl.int64) * blocks + tl.load(slots + token, mask=mask, other=0)
    if score is not None:
        if positions is not None:
            tl.store(score + cell, tl.load(positions + token, mask=mask, other=0).to(tl.float32), mask=mask)
        else:
            tl.store(score + cell, tl.zeros([BLOCK], tl.float32), mask=mask)
    if memory is not None:
        tl.store(memory + cell, tl.zeros([BLOCK], tl.float32), mask=mask)


_KERNEL = Kernel(_start, [config(BLOCK=256), config(BLOCK=128), config(BLOCK=1024, num_warps=8)])


def start_states(states: States, slots: torch.Tensor, positions: torch.Tensor | None, num_layers: int) -> None:
    """Start the states of slots just allocated, in all layers, in one launch.

    A cell that is written starts with S = M = 0, under rule recurrence (:class:`Accumulation`) with S = its position.

    Parameters
    ----------
    states
        Written.
    slots
        int32 or int64 ``[n]``: the slots; padded rows name slot 0, whose cells nobody reads.
    positions
        int32 or int64 ``[n]``: logical position (tokens) of each slot under rule recurrence, else None.
    num_layers
        L.
    """
    expect("slots", slots, INTEGER, [None])
    n = slots.shape[0]
    present = {name: state for name, state in states._asdict().items() if state is not None}
    if not present or n == 0:
        return
    some = next(iter(present.values()))
    for name, state in present.items():
        expect(name, state, torch.float32, [some.shape[0]])
    if num_layers < 1 or some.shape[0] % num_layers:
        raise ValueError(f"{some.shape[0]} cells do not divide into {num_layers} layers")
    if positions is not None:
        expect("positions", positions, INTEGER, [n])
    expect_contiguous(**present, slots=slots, positions=positions)
    cells = num_layers * n
    _KERNEL.launch(
        lambda meta: (triton.cdiv(cells, meta["BLOCK"]),),
        *states,
        slots,
        positions,
        n,
        cells,
        some.shape[0] // num_layers,
    )
