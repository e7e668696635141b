"""The best candidates of every segment, by radix selection over the bits of their ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.triton import INTEGER, Kernel, config, expect


@triton.jit
def _keys(rank, valid, pinned, j, mask):
    """Ranks as uint32 of the same order: 0, -0 and NaN are equal, and infinities are the largest finite numbers."""
    x = tl.load(rank + j, mask=mask, other=0.0)
    x = tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38))
    x = tl.where(j < pinned, float("inf"), x)
    x = tl.where(tl.load(valid + j, mask=mask, other=0) != 0, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["n"])
def _select(rank, valid, pinned, count, chosen, n, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    rank += segment * n
    valid += segment * n
    pinned = tl.load(pinned + segment).to(tl.int32)
    chosen += segment * n
    left = tl.minimum(tl.maximum(tl.load(count + segment).to(tl.int32), 0), n)
    digits = tl.arange(0, 256)

    # Most significant digit first: the last chosen key, and how many of the keys equal to it are chosen.
    last = tl.zeros([], tl.uint32)
    for place in tl.static_range(4):
        shift = 24 - 8 * place
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK):
            j = start + tl.arange(0, BLOCK)
            key = _keys(rank, valid, pinned, j, j < n)
            alike = j < n
            if place > 0:
                alike = alike & ((key >> (shift + 8)) == last)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alike)
        at_least = tl.cumsum(histogram, axis=0, reverse=True)
        digit = tl.maximum(tl.sum((at_least >= left).to(tl.int32), axis=0) - 1, 0)
        left -= tl.sum(tl.where(digits > digit, histogram, 0), axis=0)
        last = (last << 8) | digit.to(tl.uint32)

    # From the end, so that of equal keys the later ones are chosen.
    blocks = tl.cdiv(n, BLOCK)
    for i in range(0, blocks):
        j = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        key = _keys(rank, valid, pinned, j, j < n)
        equal = ((key == last) & (j < n)).to(tl.int32)
        later = tl.cumsum(equal, axis=0, reverse=True)
        keep = (key > last) | ((equal != 0) & (later <= left))
        tl.store(chosen + j, keep.to(tl.int8), mask=j < n)
        left -= tl.sum(equal, axis=0)


_KERNEL = Kernel(_select, [config(BLOCK=1024), config(BLOCK=2048, num_warps=8), config(BLOCK=512)])


def select(rank: torch.Tensor, valid: torch.Tensor, pinned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Choose the ``count`` best candidates of every segment; ties go to the later one.

    Equal to the twin bit for bit: a pinned entry ranks as inf, one that is not valid as -inf, whatever its rank. Of the
    others NaN ranks as 0 and an infinity as the largest finite number of its sign.

    Parameters
    ----------
    rank
        float32 ``[..., n]``: larger is better.
    valid
        bool ``[..., n]``: candidates.
    pinned, count
        int32 or int64 ``[...]``: first entries that are kept whatever their rank (sinks); survivors per segment, at
        most its candidates.

    Returns
    -------
    torch.Tensor
        bool ``[..., n]``: exactly ``count`` true per segment.
    """
    if rank.dim() == 0:
        raise ValueError("rank must have at least one axis, that of the candidates")
    rank, valid, pinned, count = (tensor.contiguous() for tensor in (rank, valid, pinned, count))
    expect("rank", rank, torch.float32, rank.shape)
    expect("valid", valid, torch.bool, rank.shape)
    expect("pinned", pinned, INTEGER, rank.shape[:-1])
    expect("count", count, INTEGER, rank.shape[:-1])
    n = rank.shape[-1]
    chosen = torch.empty(rank.shape, dtype=torch.bool, device=rank.device)
    segments = count.numel()
    if segments and n:
        _KERNEL.launch(
            lambda meta: (segments,),
            rank,
            valid.view(torch.uint8),
            pinned,
            count,
            chosen.view(torch.uint8),
            n,
        )
    return chosen
