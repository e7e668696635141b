"""Decode attention over token lists that also yields the score of every cell (paper eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query per request to its padded token list.

    As :func:`attend_heads`, with the attention averaged over query heads: float32 ``[B, n]``, the ``a`` of the scores.
    """
    output, attention = attend_heads(query, keys, values, cells, length, scaling)
    return output, attention.mean(1)


def attend_heads(
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
        Output ``[B, Hq, D]`` in the query's dtype, and ``A = softmax(scaling * q k)``, float32 ``[B, Hq, n]`` (0 beyond
        a list's end).
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
    return out.view(batch, heads, dim).to(query.dtype), attention


def update(
    rule: Accumulation,
    score: torch.Tensor,
    memory: torch.Tensor | None,
    attention: torch.Tensor,
    decay: torch.Tensor | float,
    step: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply one step's attention to the states of cells; see ``policies.base.Accumulation`` for the rules.

    ``score`` may be overwritten.

    Parameters
    ----------
    rule
        What the policy accumulates.
    score, memory, attention
        float32 of one shape; memory only with rule recurrence.
    decay, step
        gamma of this step and the sequence length, each broadcastable.

    Returns
    -------
    tuple
        The new score and memory.
    """
    if rule.rule == "sum":
        return score.mul_(decay).add_(attention), memory
    if rule.rule == "max":
        return torch.maximum(score.mul_(decay), attention), memory
    assert memory is not None
    renewed = attention > rule.threshold
    gap = torch.where(renewed, step - score, 0.0)
    stamp = torch.where(renewed, torch.as_tensor(step, dtype=score.dtype, device=score.device), score)
    return stamp, torch.maximum(memory, gap)


def accumulate(
    rule: Accumulation,
    scores: torch.Tensor,
    memories: torch.Tensor | None,
    cells: torch.Tensor,
    attention: torch.Tensor,
    decay: torch.Tensor | float,
    step: torch.Tensor,
) -> None:
    """Update the states of cells in place.

    Parameters
    ----------
    rule
        What the policy accumulates.
    scores, memories
        float32 ``[cells]``: S and M of the whole pool.
    cells
        int64 ``[B, n]``: cells to update; entries that must not be scored point to cell 0, which is padding.
    attention
        float32 ``[B, n]``.
    decay
        gamma of this step: a number, or float32 ``[B, 1]``.
    step
        ``[B, 1]``: sequence length of each request, this step's token included.
    """
    index = cells.reshape(-1)
    score = scores.index_select(0, index).view_as(attention)
    memory = None
    if rule.rule == "recurrence":
        assert memories is not None
        memory = memories.index_select(0, index).view_as(attention)
    score, memory = update(rule, score, memory, attention, decay, step)
    scores.index_copy_(0, index, score.reshape(-1))
    if memory is not None:
        assert memories is not None
        memories.index_copy_(0, index, memory.reshape(-1))


def observation_attention(
    query: torch.Tensor, keys: torch.Tensor, cells: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    """Causal attention of a prefilled sequence's last queries, averaged over query heads.

    Parameters
    ----------
    query
        ``[Q, Hq, D]``: queries of the extend, the sequence's last ones.
    keys
        Flat pool ``[cells, Hkv, D]``.
    cells
        int64 ``[n]``: cells of the whole sequence in order, this extend's included.
    scaling, window
        Softmax scale, number of observed queries.

    Returns
    -------
    torch.Tensor
        float32 ``[min(window, Q), n]``, in the order of the sequence.
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
    return logits.masked_fill(future, float("-inf")).softmax(-1).reshape(heads, w, n).mean(0)


def replay(rule: Accumulation, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score a prefilled sequence as if its last queries had been decode steps.

    Parameters
    ----------
    rule
        What the policy accumulates.
    attention
        float32 ``[w, n]``: see :func:`observation_attention`.

    Returns
    -------
    tuple
        Score and memory, float32 ``[n]`` each (memory None unless the rule is recurrence).
    """
    w, n = attention.shape
    score, memory = attention.new_zeros(n), None
    if rule.rule == "recurrence":  # what happened before the observed queries is not known
        score = torch.arange(n, dtype=torch.float32, device=attention.device).clamp(min=n - w)
        memory = attention.new_zeros(n)
    for i, length in enumerate(range(n - w + 1, n + 1)):
        if length % rule.every == 0:
            score, memory = update(rule, score, memory, attention[i], rule.step_decay, length)
    return score, memory
