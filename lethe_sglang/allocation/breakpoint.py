"""The paper's run-time rule (Algorithm 1, reading R1): the scores themselves say how many tokens a layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SPARSE_RATIO = 400.0
"""tau, the paper's value."""

SEGMENTS = 64
"""D: the count of salient tokens is right to one part in 64."""


def breakpoint_counts(
    rank: torch.Tensor,
    pinned: torch.Tensor,
    candidates: torch.Tensor,
    sparse_ratio: float = SPARSE_RATIO,
    segments: int = SEGMENTS,
) -> torch.Tensor:
    """Count the salient tokens of every segment of candidates.

    With v the scores in descending order, cut into D equal segments, the breakpoint segment is the last one whose first
    (largest) element satisfies ``v[start_d] >= S_max / tau``; it and everything before it is salient. ``S_max`` is
    taken over tokens that are not sinks: a sink can hold half of the attention and would make every other token look
    unimportant.

    Parameters
    ----------
    rank
        float32 ``[L, B, n]``: scores; ``-inf`` beyond the candidates.
    pinned
        bool ``[L, B, n]``: sinks.
    candidates
        int ``[L, B]``: candidates of each (layer, request).
    sparse_ratio
        tau > 1.
    segments
        D.

    Returns
    -------
    torch.Tensor
        int32 ``[L, B]``: salient tokens; equal to ``candidates`` where the scores are flat (no breakpoint).
    """
    ordered = rank.sort(dim=-1, descending=True).values
    threshold = rank.masked_fill(pinned, float("-inf")).amax(-1, keepdim=True) / sparse_ratio
    n = candidates.to(torch.int64).unsqueeze(-1)
    d = torch.arange(segments, device=rank.device)
    starts = (d * n) // segments
    salient = ordered.gather(-1, starts.clamp(max=rank.shape[-1] - 1)) >= threshold
    last = torch.where(salient, d, 0).amax(-1, keepdim=True)
    count = ((last + 1) * n) // segments
    return torch.where(threshold > 0, count.clamp(min=1), n).squeeze(-1).to(torch.int32)


def breakpoint_budgets(
    counts: Sequence[int], observed: Sequence[int], candidates: Sequence[int], mean: int, floor: int
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Turn the counts of the round before into this round's budgets.

    Parameters
    ----------
    counts
        Salient tokens per layer, from the round before.
    observed
        Candidates per layer that those counts were taken over.
    candidates
        Candidates per layer now.
    mean
        K: the mean of the budgets never exceeds it.
    floor
        Fewest tokens a layer keeps (sinks + 1).

    Returns
    -------
    tuple
        Budgets per layer, and which layers were flat (they are not pruned beyond what the mean demands, and their
        threshold doubles).
    """
    flat = tuple(c >= n for c, n in zip(counts, observed, strict=True))
    wanted = [max(floor, n if f else min(c, n)) for c, n, f in zip(counts, candidates, flat, strict=True)]
    limit, total = mean * len(wanted), sum(wanted)
    if total > limit:
        spare, above = limit - floor * len(wanted), total - floor * len(wanted)
        wanted = [floor + (w - floor) * spare // above for w in wanted]
    return tuple(wanted), flat
