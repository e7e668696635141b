"""The CPU reference of every kernel: what the Triton launchers do, with their signatures.

Shapes, dtypes and errors are documented at the launcher of the same name in ``kernels/triton/``; nothing is checked
here. Only :func:`attend` and :func:`accumulate` have no launcher: a CPU's attention yields its weights, so its score
needs no second pass over the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lethe_sglang.kernels.common import (
    Attention,
    Batch,
    Lists,
    Schedule,
    States,
    slot_lists,
    token_lists,
    update,
)
from lethe_sglang.kernels.reference_round import ascending, better_place, gather, likeness, place, rewrite_rows
from lethe_sglang.kernels.table import NEVER, read

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

__all__ = [
    "better_place",
    "fill_lists",
    "fill_pages",
    "gather",
    "likeness",
    "place",
    "repack",
    "rewrite_rows",
    "schedule",
    "score",
    "select",
    "start_states",
]


# -- a decode step ----------------------------------------------------------------------------------------------------


def schedule(batch: Batch, accumulation: Accumulation, first: torch.Tensor, decay: torch.Tensor) -> None:
    """Resolve which own tokens a step scores and with which decay."""
    _, table, rows, seq_lens = batch
    lines, scored = read(table[rows]), rows != 0
    if accumulation.every > 1:
        scored &= seq_lens % accumulation.every == 0
    decay.fill_(accumulation.step_decay)
    if accumulation.window is not None:
        scored &= seq_lens > lines.score_after
        decay.masked_fill_(seq_lens == lines.score_after + 1, 0.0)
    first.copy_(torch.where(scored, lines.score_from, NEVER))


def start_states(states: States, slots: torch.Tensor, positions: torch.Tensor | None, num_layers: int) -> None:
    """Start the states of slots just allocated, in all layers."""
    for state, fresh in zip(states, (0.0 if positions is None else positions.float(), 0.0), strict=True):
        if state is not None:
            state.view(num_layers, -1)[:, slots] = fresh


def fill_lists(batch: Batch, layer: int, blocks: int | None, lists: Lists, fill_indptr: bool) -> None:
    """Write one layer's lists for a whole batch, in place."""
    req_to_token, table, rows, seq_lens = batch
    indptr, indices = lists
    lines = read(table[rows])
    length = lines.length(seq_lens)[:, layer].to(torch.int64)
    if fill_indptr:
        indptr[0] = 0
        indptr[1 : len(rows) + 1] = length.cumsum(0)
    width = int(length.amax()) if len(rows) else 0
    if blocks is None:
        spans = lines.spans._replace(kept=lines.kept[:, layer : layer + 1])
        cells = slot_lists(req_to_token, rows, seq_lens, spans, width).cells[0]
    else:
        only = torch.full((1,), layer, dtype=torch.int64, device=rows.device)
        cells = token_lists(req_to_token, rows, seq_lens, lines.spans, blocks, width, layers=only).cells[0]
    begin, end = _ends(indptr, len(rows))
    j = torch.arange(width, device=rows.device).unsqueeze(0)
    fits = (j < length.unsqueeze(1)) & (begin + j < end) & (begin + j < indices.shape[0])
    indices[(begin + j)[fits]] = cells[fits].to(indices.dtype)


def fill_pages(batch: Batch, page_size: int, lengths: torch.Tensor, pages: torch.Tensor) -> None:
    """Write a whole batch's packed rows as page tables, in place."""
    req_to_token, table, rows, seq_lens = batch
    lines = read(table[rows])
    lengths.copy_(lines.length(seq_lens)[:, 0])
    used = ceil_div(lengths, page_size).unsqueeze(1)
    first = torch.arange(pages.shape[1], device=rows.device).unsqueeze(0) * page_size  # of each page, as list positions
    front, tail = (lines.prefix + lines.kept[:, 0]).unsqueeze(1), lines.tail.unsqueeze(1)
    live = first < used * page_size
    position = torch.where(first < front, first, tail + first - front)
    slots = req_to_token[rows.unsqueeze(1), torch.where(live, position, 0)]
    pages.copy_(torch.where(live, slots // page_size, pages))


def ceil_div(value: torch.Tensor, divisor: torch.Tensor | int) -> torch.Tensor:
    """``value / divisor`` rounded up."""
    return -torch.div(-value, divisor, rounding_mode="floor")


def _ends(indptr: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where lists begin and end, int64 ``[B, 1]``."""
    ends = indptr[: batch + 1].to(torch.int64).unsqueeze(1)
    return ends[:-1], ends[1:]


class Pages(NamedTuple):
    """Packed rows as page tables, the same for every layer; all int32 tensors.

    Attributes
    ----------
    lengths
        ``[B]``: tokens of each row.
    table
        ``[B, W]``: its pages, as numbers of a layer's buffer in pages.
    size
        Tokens of a page.
    """

    lengths: torch.Tensor
    table: torch.Tensor
    size: int


def padded(lists: Lists | Pages, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lists as int64 ``[B, n]``, 0 beyond their ends, and how long they are, int64 ``[B]``."""
    if isinstance(lists, Pages):
        length = lists.lengths.to(torch.int64)
        j = torch.arange(int(length.max()) if batch else 0, device=length.device)
        cells = lists.table[:, j // lists.size].to(torch.int64) * lists.size + j % lists.size
        return cells.masked_fill_(j >= length.unsqueeze(1), 0), length
    begin, end = _ends(lists.indptr, batch)
    length = end - begin
    j = torch.arange(int(length.max()) if batch else 0, device=length.device).unsqueeze(0)
    valid = j < length
    return torch.where(valid, lists.indices[torch.where(valid, begin + j, 0)].to(torch.int64), 0), length.squeeze(1)


def score(rule: Accumulation, attention: Attention, lists: Lists, schedule: Schedule, states: States) -> None:
    """Apply a step's attention to the states of own cells, from its log-sum-exp."""
    query, keys, lse, scaling, lse_base, parts = attention
    batch, heads, dim = query.shape
    cells, length = padded(lists, batch)
    length = length.unsqueeze(1)
    j = torch.arange(cells.shape[1], device=query.device).unsqueeze(0)
    own = (j >= schedule.first.unsqueeze(1)) & (j < length)
    cells = cells.masked_fill(~own, 0)
    q = query.float().view(batch, keys.shape[1], -1, dim)
    logits = torch.einsum("bkgd,bnkd->bkgn", q, keys[cells].float()).reshape(batch, heads, -1) * scaling
    natural = lse * (math.log(2) if lse_base == "2" else 1.0)
    if parts is not None:
        part = ceil_div(ceil_div(length, parts.count.clamp(min=1).unsqueeze(1)), parts.multiple) * parts.multiple
        used = torch.arange(lse.shape[2], device=lse.device) < ceil_div(length, part.clamp(min=1))
        natural = natural.masked_fill(~used.unsqueeze(1), float("-inf")).logsumexp(2)
    weights = torch.exp(logits - natural.unsqueeze(2)).mean(1).masked_fill(~own, 0.0)
    accumulate(rule, states, cells, weights, schedule)


def accumulate(
    rule: Accumulation, states: States, cells: torch.Tensor, attention: torch.Tensor, schedule: Schedule
) -> None:
    """Update the states of cells in place; arguments are :func:`score`'s, but for these.

    Parameters
    ----------
    rule, states, schedule
        See :func:`score`; ``first`` is not looked at.
    cells
        int64 ``[B, n]``: cells to update; entries that must not be scored point to cell 0, which is padding.
    attention
        float32 ``[B, n]``: averaged over query heads.
    """
    index = cells.reshape(-1)
    stores = (states.score, states.memory if rule.rule == "recurrence" else None)
    score, memory = (None if s is None else s.index_select(0, index).view_as(attention) for s in stores)
    assert score is not None
    renewed = update(rule, score, memory, attention, schedule.decay.unsqueeze(1), schedule.step.unsqueeze(1))
    for store, values in zip(stores, renewed, strict=True):
        if store is not None and values is not None:
            store.index_copy_(0, index, values.reshape(-1))


class Reading(NamedTuple):
    """What a batch's padded lists read of a cache, the same for every layer that has these lists.

    Attributes
    ----------
    index
        int64 ``[B * Hkv * n]``: rows of a cache viewed as ``[cells * Hkv, D]``.
    beyond
        bool ``[B, 1, n]``: behind a list's end.
    """

    index: torch.Tensor
    beyond: torch.Tensor

    @classmethod
    def of(cls, cells: torch.Tensor, length: torch.Tensor, kv_heads: int) -> Reading:
        """Resolve lists, int64 ``[B, n]``, of ``length`` valid entries, int64 ``[B]``."""
        heads = torch.arange(kv_heads, device=cells.device).view(1, -1, 1)
        beyond = torch.arange(cells.shape[1], device=cells.device).unsqueeze(0) >= length.unsqueeze(1)
        return cls((cells.unsqueeze(1) * kv_heads + heads).reshape(-1), beyond.unsqueeze(1))


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reading: Reading, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query per request to its padded token list.

    Parameters
    ----------
    query
        ``[B, Hq, D]``.
    keys, values
        ``[cells, Hkv, D]``: the flat pool, or a layer of it.
    reading
        The lists, of n entries with padding.
    scaling
        Softmax scale.

    Returns
    -------
    tuple
        Output ``[B, Hq, D]`` in the query's dtype, and ``A = softmax(scaling * q k)``, float32 ``[B, Hq, n]`` (0 beyond
        a list's end); its mean over heads is the ``a`` of the scores.
    """
    batch, heads, dim = query.shape
    kv_heads, n = keys.shape[1], reading.beyond.shape[2]
    k = keys.view(-1, dim).index_select(0, reading.index).view(batch * kv_heads, n, dim)
    v = values.view(-1, dim).index_select(0, reading.index).view(batch * kv_heads, n, dim)
    q = (query.float() * scaling).view(batch * kv_heads, heads // kv_heads, dim)
    logits = torch.bmm(q, k.float().transpose(1, 2)).view(batch, heads, n)
    attention = logits.masked_fill_(reading.beyond, float("-inf")).softmax(-1)
    out = torch.bmm(attention.view(batch * kv_heads, heads // kv_heads, n), v.float())
    return out.view(batch, heads, dim).to(query.dtype), attention


# -- a round ----------------------------------------------------------------------------------------------------------


def select(rank: torch.Tensor, valid: torch.Tensor, pinned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Choose the ``count`` best candidates of every segment; ties go to the later one."""
    place = np.arange(rank.shape[-1])
    key = np.where(place < pinned.unsqueeze(-1).numpy(), np.float32(np.inf), rank.float().nan_to_num().numpy())
    best_last = torch.from_numpy(ascending(np.where(valid.numpy(), key, np.float32(-np.inf))))
    chosen = torch.from_numpy(place[::-1] < count.unsqueeze(-1).numpy())
    return torch.zeros_like(valid).scatter_(-1, best_last, chosen.expand_as(valid))


def repack(
    buffers: Iterable[torch.Tensor],
    source: torch.Tensor,
    destination: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """``buffer[destination] = buffer[source]`` for each buffer, as if all cells moved at once; needs no scratch."""
    if source.device.type == "cpu":  # a mask has to be counted, which would make the host wait for a GPU
        moves = source != destination
        source, destination = source[moves], destination[moves]
    for buffer in buffers:
        buffer.index_copy_(0, destination, buffer.index_select(0, source))
