"""The torch twins: what the Triton launchers do, with their signatures, on any device.

``kernels/triton/`` documents shapes, dtypes and errors, which the twins do not check.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from lethe_sglang.kernels.indices import token_lists
from lethe_sglang.kernels.repack import repack, select
from lethe_sglang.kernels.score import accumulate

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

__all__ = ["NEVER", "fill_indices", "fill_lists", "repack", "schedule", "score", "select", "start_states"]

NEVER = 2**31 - 1
"""List position of the first scored token where a step is not scored."""


def schedule(
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulation: Accumulation,
    first: torch.Tensor,
    decay: torch.Tensor,
) -> None:
    """Resolve which own tokens a step scores and with which decay: ``triton.score.schedule``."""
    score_from, score_after = table[rows, 2], table[rows, 3]
    scored = (rows != 0) & (seq_lens % accumulation.every == 0)
    decay.fill_(accumulation.step_decay)
    if accumulation.window is not None:
        scored &= seq_lens > score_after
        decay.masked_fill_(seq_lens == score_after + 1, 0.0)
    first.copy_(torch.where(scored, score_from, NEVER))


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
    """Apply a step's attention to the states of own cells: ``triton.score.score``."""
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
    accumulate(rule, scores, memories, cells, attention, decay.unsqueeze(1), step.unsqueeze(1))


def fill_lists(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write one layer's lists and where each begins: ``triton.indices.fill_lists``."""
    batch, lines = rows.shape[0], table[rows]
    indptr[0] = 0
    indptr[1 : batch + 1] = (lines[:, 0] + lines[:, 4 + layer] + seq_lens - lines[:, 1]).cumsum(0)
    fill_indices(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices)


def fill_indices(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    blocks: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write one layer's lists where ``indptr`` says: ``triton.indices.fill_indices``."""
    batch, num_layers = rows.shape[0], (table.shape[1] - 4) // 2
    lines = table[rows]
    kept, offset = lines[:, 4 : 4 + num_layers], lines[:, 4 + num_layers :]
    width = int((lines[:, 0] + kept[:, layer] + seq_lens - lines[:, 1]).amax()) if batch else 0
    lists = token_lists(req_to_token, rows, seq_lens, lines[:, 0], lines[:, 1], kept, offset, blocks, width)
    length = lists.length[layer]
    begin, end = indptr[:batch].to(torch.int64).unsqueeze(1), indptr[1 : batch + 1].to(torch.int64).unsqueeze(1)
    j = torch.arange(width, device=rows.device).unsqueeze(0)
    fits = (j < length.unsqueeze(1)) & (begin + j < end) & (begin + j < indices.shape[0])
    indices[(begin + j)[fits]] = lists.cells[layer][fits].to(indices.dtype)


def start_states(
    score: torch.Tensor | None,
    memory: torch.Tensor | None,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    num_layers: int,
) -> None:
    """Start the states of slots just allocated: ``triton.zero.start_states``."""
    for state, fresh in ((score, 0.0 if positions is None else positions.float()), (memory, 0.0)):
        if state is not None:
            state.view(num_layers, -1)[:, slots] = fresh
