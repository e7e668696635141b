"""The torch reference of every kernel: what the Triton launchers do, with their signatures, on any device.

Shapes, dtypes and errors are documented at the launcher of the same name in ``kernels/triton/``; nothing is checked
here. Only :func:`attend` and :func:`accumulate` have no launcher: a CPU's attention yields its weights, so its score
needs no second pass over the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from lethe_sglang.kernels.common import token_lists, update
from lethe_sglang.kernels.table import NEVER, read

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

__all__ = ["fill_lists", "repack", "schedule", "score", "select", "start_states"]


# -- a decode step ----------------------------------------------------------------------------------------------------


def schedule(
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulation: Accumulation,
    first: torch.Tensor,
    decay: torch.Tensor,
) -> None:
    """Resolve which own tokens a step scores and with which decay."""
    lines, scored = read(table[rows]), rows != 0
    if accumulation.every > 1:
        scored &= seq_lens % accumulation.every == 0
    decay.fill_(accumulation.step_decay)
    if accumulation.window is not None:
        scored &= seq_lens > lines.score_after
        decay.masked_fill_(seq_lens == lines.score_after + 1, 0.0)
    first.copy_(torch.where(scored, lines.score_from, NEVER))


def start_states(
    score: torch.Tensor | None,
    memory: torch.Tensor | None,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    num_layers: int,
) -> None:
    """Start the states of slots just allocated, in all layers."""
    for state, fresh in ((score, 0.0 if positions is None else positions.float()), (memory, 0.0)):
        if state is not None:
            state.view(num_layers, -1)[:, slots] = fresh


def fill_lists(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    fill_indptr: bool,
) -> None:
    """Write one layer's lists for a whole batch, in place."""
    batch, lines = rows.shape[0], read(table[rows])
    length = lines.length(seq_lens)[:, layer].to(torch.int64)
    if fill_indptr:
        indptr[0] = 0
        indptr[1 : batch + 1] = length.cumsum(0)
    width = int(length.amax()) if batch else 0
    lists = token_lists(req_to_token, rows, seq_lens, lines.prefix, lines.tail, lines.kept, lines.offset, blocks, width)
    begin, end = indptr[:batch].to(torch.int64).unsqueeze(1), indptr[1 : batch + 1].to(torch.int64).unsqueeze(1)
    j = torch.arange(width, device=rows.device).unsqueeze(0)
    fits = (j < length.unsqueeze(1)) & (begin + j < end) & (begin + j < indices.shape[0])
    indices[(begin + j)[fits]] = lists.cells[layer][fits].to(indices.dtype)


def score(
    rule: Accumulation,
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    first: torch.Tensor,
    decay: torch.Tensor,
    step: torch.Tensor,
    scores: torch.Tensor,
    memories: torch.Tensor | None,
    scaling: float,
    k_scale: float = 1.0,
    lse_base: Literal["e", "2"] = "e",
) -> None:
    """Apply a step's attention to the states of own cells, from its log-sum-exp."""
    batch, heads, dim = query.shape
    begin = indptr[:batch].to(torch.int64).unsqueeze(1)
    length = indptr[1 : batch + 1].to(torch.int64).unsqueeze(1) - begin
    j = torch.arange(int(length.max()) if batch else 0, device=query.device).unsqueeze(0)
    own = (j >= first.unsqueeze(1)) & (j < length)
    cells = torch.where(own, indices[torch.where(own, begin + j, 0)].to(torch.int64), 0)
    q = query.float().view(batch, keys.shape[1], -1, dim)
    logits = torch.einsum("bkgd,bnkd->bkgn", q, keys[cells].float()).reshape(batch, heads, -1) * (scaling * k_scale)
    natural = lse * (math.log(2) if lse_base == "2" else 1.0)
    attention = torch.exp(logits - natural.unsqueeze(2)).mean(1).masked_fill(~own, 0.0)
    accumulate(rule, scores, memories, cells, attention, decay, step)


def accumulate(
    rule: Accumulation,
    scores: torch.Tensor,
    memories: torch.Tensor | None,
    cells: torch.Tensor,
    attention: torch.Tensor,
    decay: torch.Tensor,
    step: torch.Tensor,
) -> None:
    """Update the states of cells in place; arguments are :func:`score`'s, but for these.

    Parameters
    ----------
    rule, scores, memories, decay, step
        See :func:`score`.
    cells
        int64 ``[B, n]``: cells to update; entries that must not be scored point to cell 0, which is padding.
    attention
        float32 ``[B, n]``: averaged over query heads.
    """
    index = cells.reshape(-1)
    score = scores.index_select(0, index).view_as(attention)
    memory = None
    if rule.rule == "recurrence":
        assert memories is not None
        memory = memories.index_select(0, index).view_as(attention)
    score, memory = update(rule, score, memory, attention, decay.unsqueeze(1), step.unsqueeze(1))
    scores.index_copy_(0, index, score.reshape(-1))
    if memory is not None:
        assert memories is not None
        memories.index_copy_(0, index, memory.reshape(-1))


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
        Output ``[B, Hq, D]`` in the query's dtype, and ``A = softmax(scaling * q k)``, float32 ``[B, Hq, n]`` (0 beyond
        a list's end); its mean over heads is the ``a`` of the scores.
    """
    batch, heads, dim = query.shape
    kv_heads, n = keys.shape[1], cells.shape[1]
    if kv_heads == 1:
        index = cells.reshape(-1)
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


# -- a round ----------------------------------------------------------------------------------------------------------


def select(rank: torch.Tensor, valid: torch.Tensor, pinned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Choose the ``count`` best candidates of every segment; ties go to the later one."""
    n = rank.shape[-1]
    key = rank.masked_fill(pinned, float("inf")).masked_fill(~valid, float("-inf"))
    order = key.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = (n - 1) - order
    chosen = torch.arange(n, device=rank.device) < count.unsqueeze(-1)
    return torch.zeros_like(valid).scatter_(-1, order, chosen.expand_as(valid))


def repack(buffers: Iterable[torch.Tensor], source: torch.Tensor, destination: torch.Tensor) -> None:
    """``buffer[destination] = buffer[source]`` for each buffer, as if all cells moved at once."""
    for buffer in buffers:
        buffer.index_copy_(0, destination, buffer.index_select(0, source))
