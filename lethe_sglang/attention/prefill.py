"""Scores of prompts that are evicted from, and of re-prefills: those of a prefill's last queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lethe_sglang.kernels.common import update

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

OBSERVATION_WINDOW = 32
"""Queries of an observed prefill that initialise its scores."""


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
    w, n = min(window, query.shape[0]), cells.shape[0]
    kv_heads, heads, dim = keys.shape[1], query.shape[1], query.shape[2]
    q = query[-w:].float().mul(scaling).view(w, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("wkgd,nkd->kgwn", q, keys[cells].float())
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
