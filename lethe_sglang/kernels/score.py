"""Decode attention over token lists that also yields the score of every cell (paper eq. 5)."""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query per request to its padded token list.

    Parameters
    ----------
    query
        ``[B, Hq, D]``.
    keys, values
        The flat pool, ``[cells, Hkv, D]``.
    cells
        int64 ``[B, n]``: the lists.
    length
        int64 ``[B]``: valid entries of each list.
    scaling
        Softmax scale.

    Returns
    -------
    tuple
        Output ``[B, Hq, D]`` in the query's dtype, and ``(1/Hq) * sum_h A_h[j]``, float32 ``[B, n]`` (0 beyond a
        list's end), where ``A = softmax(scaling * q k)``.
    """
    batch, heads, dim = query.shape
    kv_heads = keys.shape[1]
    n = cells.shape[1]
    if kv_heads == 1:
        index = cells.reshape(-1)
        k = keys.view(-1, dim).index_select(0, index).view(batch, n, dim)
        v = values.view(-1, dim).index_select(0, index).view(batch, n, dim)
    else:  # gather straight into [B, Hkv, n, D]: no permuted copy
        index = (cells.unsqueeze(1) * kv_heads + torch.arange(kv_heads, device=cells.device).view(1, -1, 1)).reshape(-1)
        k = keys.view(-1, dim).index_select(0, index).view(batch * kv_heads, n, dim)
        v = values.view(-1, dim).index_select(0, index).view(batch * kv_heads, n, dim)
    q = (query.float() * scaling).view(batch * kv_heads, heads // kv_heads, dim)
    logits = torch.bmm(q, k.float().transpose(1, 2)).view(batch, heads, n)
    beyond = torch.arange(n, device=cells.device).unsqueeze(0) >= length.unsqueeze(1)
    attention = logits.masked_fill_(beyond.unsqueeze(1), float("-inf")).softmax(-1)
    out = torch.bmm(attention.view(batch * kv_heads, heads // kv_heads, n), v.float())
    return out.view(batch, heads, dim).to(query.dtype), attention.mean(1)


def accumulate(scores: torch.Tensor, cells: torch.Tensor, attention: torch.Tensor, decay: torch.Tensor | float) -> None:
    """``S[cell] = decay * S[cell] + attention`` in place (paper eq. 5).

    Parameters
    ----------
    scores
        float32 ``[cells]``: S of the whole pool.
    cells
        int64 ``[B, n]``: cells to update; entries that must not be scored point to cell 0, which is padding.
    attention
        float32 ``[B, n]``.
    decay
        gamma per scored step.
    """
    index = cells.reshape(-1)
    updated = scores.index_select(0, index).mul_(decay).add_(attention.reshape(-1))
    scores.index_copy_(0, index, updated)


def observation_scores(
    query: torch.Tensor, keys: torch.Tensor, cells: torch.Tensor, scaling: float, decay: float, window: int
) -> torch.Tensor:
    """Score a prefilled sequence as if its last queries had been decode steps.

    ``S[j] = sum_{i < w} decay^i * (1/H) * sum_h A_h[last - i, j]`` with causal attention and ``w = min(window, Q)``.

    Parameters
    ----------
    query
        ``[Q, Hq, D]``: queries of the extend, the sequence's last ones.
    keys
        Flat pool ``[cells, Hkv, D]``.
    cells
        int64 ``[n]``: cells of the whole sequence in order, this extend's included.
    scaling, decay, window
        Softmax scale, gamma per step, number of observed queries.

    Returns
    -------
    torch.Tensor
        float32 ``[n]``.
    """
    w = min(window, query.shape[0])
    n = cells.shape[0]
    kv_heads = keys.shape[1]
    heads, dim = query.shape[1], query.shape[2]
    q = query[-w:].float().mul(scaling).view(w, kv_heads, heads // kv_heads, dim)
    k = keys[cells].float()
    logits = torch.einsum("wkgd,nkd->kgwn", q, k)
    step = torch.arange(w, device=cells.device)
    future = torch.arange(n, device=cells.device).unsqueeze(0) > (n - w + step).unsqueeze(1)
    attention = logits.masked_fill(future, float("-inf")).softmax(-1).reshape(heads, w, n).mean(0)
    weight = torch.pow(torch.tensor(float(decay), device=cells.device), (w - 1 - step).float())
    return weight @ attention
