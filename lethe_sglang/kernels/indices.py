"""Token lists: which cells a layer of a request attends to, and in which order.

Layer l of a request attends to ``prefix, packed, tail``, that is to list positions

    [0, P)              row[j],                      layer l
    [P, P + k_l)        cell number off_l + (j - P)  (architecture.md: (cell % L) * rows + row[P + cell // L])
    [P + k_l, ...)      row[T + j - P - k_l],        layer l
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLists(NamedTuple):
    """Padded token lists of all layers of a batch.

    Attributes
    ----------
    cells
        int64 ``[L, B, n]``: flat cell index; 0 (the padding block's cell) beyond a list's end.
    length
        int64 ``[L, B]``: tokens in each list.
    """

    cells: torch.Tensor
    length: torch.Tensor


def token_lists(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix: torch.Tensor,
    tail: torch.Tensor,
    kept: torch.Tensor,
    offset: torch.Tensor,
    blocks: int,
    width: int,
    skip_prefix: bool = False,
) -> TokenLists:
    """Resolve the token lists of every layer.

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    rows
        int64 ``[B]``: the requests' rows.
    seq_lens
        int ``[B]``: logical length (tokens), the newest included.
    prefix, tail
        int ``[B]``: P and T.
    kept, offset
        int ``[B, L]``: k_l and off_l.
    blocks
        Blocks of the pool (``rows`` of the flat index), padding included.
    width
        n: at least the longest list (tokens).
    skip_prefix
        Leave the shared prefix out: own tokens only.

    Returns
    -------
    TokenLists
        ``cells[l, b, j]`` for list position j (own position if ``skip_prefix``).
    """
    num_layers = kept.shape[1]
    p = (torch.zeros_like(prefix) if skip_prefix else prefix).to(torch.int64).view(1, -1, 1)
    base = prefix.to(torch.int64).view(1, -1, 1)
    t = tail.to(torch.int64).view(1, -1, 1)
    k = kept.to(torch.int64).t().unsqueeze(2)
    off = offset.to(torch.int64).t().unsqueeze(2)
    length = (p + k + seq_lens.to(torch.int64).view(1, -1, 1) - t).squeeze(2)

    j = torch.arange(width, device=req_to_token.device).view(1, 1, -1)
    number = off + j - p
    is_packed = (j >= p) & (j < p + k)
    behind = torch.where(j < p, j, t + j - p - k)
    position = torch.where(is_packed, base + torch.div(number, num_layers, rounding_mode="floor"), behind)
    layer = torch.arange(num_layers, device=req_to_token.device).view(-1, 1, 1)
    layer = torch.where(is_packed, number % num_layers, layer)
    valid = j < length.unsqueeze(2)
    position = torch.where(valid, position, 0)
    slot = req_to_token[rows.view(1, -1, 1), position].to(torch.int64)
    return TokenLists(torch.where(valid, layer * blocks + slot, 0), length)
