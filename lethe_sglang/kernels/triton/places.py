"""The better of two places of every candidate, by sorted parts of each list and a search of every part.

A list of any length is sorted in parts of at most ``PART`` candidates, each by a program of its own; a candidate's
place is how many there are before it in every part. So one compiled kernel serves all lengths: what the round at a
server's start has compiled is all that later ones need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lethe_sglang.kernels.triton import Kernel, bucket, config, expect
from lethe_sglang.policies.features import BEHIND

PART = 1024
"""Most candidates that one program sorts: 8 KB of shared memory, and the default budget's are one part."""


@triton.jit
def _keys(values, valid, j, n, NEGATED: tl.constexpr):
    """Candidates as int64 of the order of torch's stable sort of their values, the later one larger of those that tie.

    Above are the 32 bits of the value, in which 0 and -0 are equal and every NaN is above infinity; what is not valid
    is -inf. All is done on integers: a GPU's comparisons of float32 may take the smallest numbers for 0.
    """
    bits = tl.load(values + j, mask=j < n, other=0)
    if NEGATED:
        bits = bits ^ -0x80000000
    bits = tl.where(bits == -0x80000000, 0, bits)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    bits = tl.where(tl.load(valid + j, mask=j < n, other=0) != 0, bits, -0x800000)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(j < n, (order << 32) | j, -0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["n", "log"])
def _sort(score, likeness, valid, parts, n, log, PART: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    part, which = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, PART)
    j = (part << log) + i
    valid += segment * n
    if which == 0:
        key = _keys(score + segment * n, valid, j, n, False)
    else:
        key = _keys(likeness + segment * n, valid, j, n, True)
    # A bitonic network, largest first: of the first 2**log keys, for those behind them are beyond n.
    for stage in range(log):
        partner = (2 << stage) - 1
        for step in range(stage + 1):
            half = 1 << (stage - step)
            other = tl.gather(key, i ^ partner, 0)
            key = tl.where((key < other) == ((i & half) == 0), other, key)
            partner = half >> 1
    row = which * tl.num_programs(0) + segment
    tl.store(parts + ((row * tl.num_programs(1) + part) << log) + i, key, mask=i < (1 << log))


@triton.jit
def _places(key, parts, count, log):
    """How many keys there are above each, in ``count`` parts of ``2**log``."""
    place, size = tl.zeros(key.shape, tl.int32), 1 << log
    for _ in range(count):
        above = tl.zeros(key.shape, tl.int32)
        for step in range(log + 1):  # the last step tells a part of which all are above
            half = tl.maximum(size >> (step + 1), 1)
            above += tl.where(tl.load(parts + above + half - 1) > key, half, 0)
        place += above
        parts += size
    return place.to(tl.float32)


@triton.jit(do_not_specialize=["n", "log", "count"])
def _better_place(
    score, likeness, valid, parts, rank, n, log, count, by_score, by_key, BEHIND: tl.constexpr, BLOCK: tl.constexpr
):
    segment = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid += segment * n
    of_score = parts + ((segment * count) << log)
    of_key = parts + (((tl.num_programs(0) + segment) * count) << log)
    in_score = _places(_keys(score + segment * n, valid, j, n, False), of_score, count, log)
    in_keys = _places(_keys(likeness + segment * n, valid, j, n, True), of_key, count, log)
    better = tl.minimum(tl.div_rn(in_score, by_score), tl.div_rn(in_keys + BEHIND, by_key))
    tl.store(rank + segment * n + j, -better, mask=j < n)


_SORT = Kernel(_sort, [config(), config(num_warps=8), config(num_warps=2)])
_KERNEL = Kernel(_better_place, [config(BLOCK=256), config(BLOCK=512), config(BLOCK=128)])


def better_place(score: torch.Tensor, likeness: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Rank candidates by the better of two places, in two launches.

    Equal to :func:`~lethe_sglang.policies.features.better_place` bit for bit, as a CPU computes it. It takes 16 to 32
    bytes a candidate until it returns.

    Parameters
    ----------
    score, likeness, valid
        float32, float32 and bool ``[..., n]``: the larger the score and the smaller the likeness, the better; what is
        not valid ranks as if its score and its unlikeness were -inf.
    share
        Of the list by unlikeness, 0 < share < 1.

    Returns
    -------
    torch.Tensor
        float32 ``[..., n]``; larger is better.
    """
    if score.dim() == 0:
        raise ValueError("score must have at least one axis, that of the candidates")
    score, likeness, valid = (tensor.contiguous() for tensor in (score, likeness, valid))
    expect("score", score, torch.float32, score.shape)
    expect("likeness", likeness, torch.float32, score.shape)
    expect("valid", valid, torch.bool, score.shape)
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, not {share}")
    n = score.shape[-1]
    rank = torch.empty_like(score)
    if not score.numel():
        return rank
    segments, size = score.numel() // n, min(bucket(n), PART)
    count, log = triton.cdiv(n, size), size.bit_length() - 1
    parts = torch.empty(2 * segments * count * size, dtype=torch.int64, device=score.device)
    # As integers: see _keys.
    of_both = score.view(torch.int32), likeness.view(torch.int32), valid.view(torch.uint8), parts
    _SORT.launch(lambda meta: (segments, count, 2), *of_both, n, log, PART)
    _KERNEL.launch(
        lambda meta: (segments, triton.cdiv(n, meta["BLOCK"])),
        *of_both,
        rank,
        n,
        log,
        count,
        1 - share,
        share,
        BEHIND,
    )
    return rank
