"""Scores of prompts that are evicted from, and of re-prefills: those of a prefill's last queries."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lethe_sglang.kernels.common import update

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

OBSERVATION_WINDOW = 32
"""Queries of an observed prefill that initialise its scores."""


CHUNK = 4096
"""Tokens whose keys are looked at together; a longer sequence would need its keys and logits in float32 all at once."""


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
    last = torch.arange(n - w, n, device=cells.device).unsqueeze(1)

    def logits(start: int) -> torch.Tensor:
        """Return those of a chunk of tokens, ``[Hkv, group, w, tokens]``."""
        part = cells[start : start + CHUNK]
        position = torch.arange(start, start + len(part), device=cells.device)
        products = torch.einsum("wkgd,nkd->kgwn", q, keys[part].float())
        return products.masked_fill_(position.unsqueeze(0) > last, float("-inf"))

    if n <= CHUNK:
        return logits(0).softmax(-1).reshape(heads, w, n).mean(0)
    starts = range(0, n, CHUNK)
    total = torch.stack([logits(start).logsumexp(-1) for start in starts]).logsumexp(0).unsqueeze(-1)
    return torch.cat([(logits(start) - total).exp_().reshape(heads, w, -1).mean(0) for start in starts], -1)


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
    w = attention.shape[0]
    steps = list(range((w - 1) % rule.every, w, rule.every))  # back from the last query, which is always one of them
    if rule.rule == "recurrence":
        return _recurred(rule, attention, steps)
    factors = [rule.step_decay**later for later in reversed(range(len(steps)))]
    if rule.rule == "max":
        return torch.stack([attention[i] * factor for i, factor in zip(steps, factors, strict=True)]).amax(0), None
    return _weights(tuple(factors), tuple(steps), w, attention.device) @ attention, None


@lru_cache(maxsize=64)
def _weights(factors: tuple[float, ...], steps: tuple[int, ...], w: int, device: torch.device) -> torch.Tensor:
    """Return float32 ``[w]``: the factor of each query, 0 of one that is not scored; uploaded once."""
    weights = [0.0] * w
    for i, factor in zip(steps, factors, strict=True):
        weights[i] = factor
    return torch.tensor(weights, device=device)


def _recurred(rule: Accumulation, attention: torch.Tensor, steps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rule recurrence. What happened before the observed queries is not known, so gaps begin with them."""
    w, n = attention.shape
    stamp: torch.Tensor | None = torch.arange(n, dtype=torch.float32, device=attention.device).clamp(min=n - w)
    memory: torch.Tensor | None = attention.new_zeros(n)
    for i in steps:
        stamp, memory = update(rule, stamp, memory, attention[i], rule.step_decay, n - w + 1 + i)
    assert stamp is not None and memory is not None
    return stamp, memory
