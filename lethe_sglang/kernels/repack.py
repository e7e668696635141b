"""Moving cells: gather to a temporary, then scatter, so that sources and destinations may overlap."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def repack(buffers: Iterable[torch.Tensor], source: torch.Tensor, destination: torch.Tensor) -> None:
    """``buffer[destination] = buffer[source]`` for each buffer, as if all cells moved at once.

    Parameters
    ----------
    buffers
        ``[cells, ...]`` each: keys, values and whatever states the policy declares.
    source, destination
        int64 ``[n]``: flat cell indices; destinations are distinct.
    """
    for buffer in buffers:
        buffer.index_copy_(0, destination, buffer.index_select(0, source))


def select(rank: torch.Tensor, valid: torch.Tensor, pinned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Choose the ``count`` best candidates of every segment; ties go to the later one.

    Parameters
    ----------
    rank
        float32 ``[..., n]``: larger is better.
    valid, pinned
        bool ``[..., n]``: candidates; those kept whatever their rank (sinks).
    count
        int ``[...]``: survivors per segment, at most its candidates.

    Returns
    -------
    torch.Tensor
        bool ``[..., n]``: exactly ``count`` true per segment.
    """
    n = rank.shape[-1]
    key = rank.masked_fill(pinned, float("inf")).masked_fill(~valid, float("-inf"))
    order = key.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = (n - 1) - order
    chosen = torch.arange(n, device=rank.device) < count.unsqueeze(-1)
    return torch.zeros_like(valid).scatter_(-1, order, chosen.expand_as(valid))
