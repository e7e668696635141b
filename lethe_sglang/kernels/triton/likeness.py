"""How like the mean key of its layer each candidate's key is, for all layers and requests in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.triton import FLOAT, FP8, INTEGER, Kernel, bucket, config, expect, expect_contiguous


@triton.jit
def _keys_of(keys, cells, valid, j, width, dims, HEAD_DIM: tl.constexpr, STRIDE: tl.constexpr):
    """Load a tile of one head's keys as float32, 0 where there is no candidate; and the norm of each."""
    there = tl.load(valid + j, mask=j < width, other=0) != 0
    cell = tl.load(cells + j, mask=there, other=0).to(tl.int64)
    k = tl.load(
        keys + cell[:, None] * STRIDE + dims[None, :], mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
    ).to(tl.float32)
    return k, tl.sqrt(tl.sum(k * k, axis=1)), there


@triton.jit(do_not_specialize=["width"])
def _likeness(
    keys,
    cells,
    valid,
    likeness,
    width,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    segment = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    cells += segment * width
    valid += segment * width
    likeness += segment * width
    dims = tl.arange(0, DIM_PAD)
    ROWS: tl.constexpr = BLOCK // DIM_PAD
    # One head after the other, so that its keys are still in the device's cache when they are read again.
    for head in range(KV_HEADS):
        of_head = keys + head * HEAD_DIM
        total = tl.zeros([ROWS, DIM_PAD], tl.float32)
        number = tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, ROWS, num_stages=STAGES):
            j = start + tl.arange(0, ROWS)
            k, norm, there = _keys_of(of_head, cells, valid, j, width, dims, HEAD_DIM, KV_HEADS * HEAD_DIM)
            total += k / tl.maximum(norm, 1e-12)[:, None]
            number += there.to(tl.float32)
        mean = tl.sum(total, axis=0) / tl.maximum(tl.sum(number, axis=0), 1.0)
        unit = mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), 1e-8)
        tl.debug_barrier()  # another thread may have stored what is now added to
        for start in tl.range(0, width, ROWS, num_stages=STAGES):
            j = start + tl.arange(0, ROWS)
            k, norm, there = _keys_of(of_head, cells, valid, j, width, dims, HEAD_DIM, KV_HEADS * HEAD_DIM)
            cosine = tl.sum(k * unit[None, :], axis=1) / tl.maximum(norm, 1e-8)
            before = tl.load(likeness + j, mask=(j < width) & (head > 0), other=0.0)
            tl.store(likeness + j, before + cosine / KV_HEADS, mask=j < width)


_KERNEL = Kernel(
    _likeness,
    [  # few large programs: the keys that all programs at work are about to read again have to fit into the cache
        config(BLOCK=8192, STAGES=2, num_warps=8),
        config(BLOCK=8192, STAGES=3, num_warps=8),
        config(BLOCK=16384, STAGES=3, num_warps=16),
        config(BLOCK=4096, STAGES=3),
    ],
)


def likeness(keys: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compare each candidate's key with the mean normalised key of its layer's candidates, in one launch.

    For candidate j among the valid i of a layer of a request, over this rank's KV heads h::

        (1/H) * sum_h cos(k_h,j, mean_i k_h,i / |k_h,i|)

    One program owns a layer of a request, so nothing is atomic, and what it finds depends on its own candidates alone.

    Parameters
    ----------
    keys
        ``[cells, H, D]``: the flat pool; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, contiguous; D at
        most 256. Cells that are not candidates are not read.
    cells, valid
        int32 or int64, and bool ``[L, B, n]``: of :class:`~lethe_sglang.kernels.common.Candidate`.

    Returns
    -------
    torch.Tensor
        float32 ``[L, B, n]``; 0 where ``valid`` is false.
    """
    expect("keys", keys, (*FLOAT, *FP8), [None, None, None])
    expect("cells", cells, INTEGER, [None, None, None])
    expect("valid", valid, torch.bool, cells.shape)
    expect_contiguous(keys=keys, cells=cells, valid=valid)
    kv_heads, head_dim = keys.shape[1:]
    if not 0 < head_dim <= 256:
        raise ValueError(f"head_dim must be 1 to 256, not {head_dim}")
    layers, batch, width = cells.shape
    found = torch.empty(cells.shape, dtype=torch.float32, device=keys.device)
    _KERNEL.launch(
        lambda meta: (batch, layers),
        keys,
        cells,
        valid.view(torch.uint8),
        found,
        width,
        kv_heads,
        head_dim,
        bucket(head_dim),
    )
    return found
