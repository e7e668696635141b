"""One function per kernel: Triton for tensors on a CUDA device, the torch twin for all others.

The functions take what the Triton launchers take; ``kernels/triton/`` documents shapes, dtypes and errors, which the
twins do not check.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from lethe_sglang.kernels import repack as twin_repack
from lethe_sglang.kernels.indices import token_lists
from lethe_sglang.kernels.score import accumulate

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation

NEVER = 2**31 - 1


def schedule(
    table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulation: Accumulation,
    first: torch.Tensor,
    decay: torch.Tensor,
) -> None:
    """Resolve which own tokens a step scores and with which decay: ``triton.score.schedule``."""
    if table.is_cuda:
        from lethe_sglang.kernels.triton.score import schedule as launch

        return launch(table, rows, seq_lens, accumulation, first, decay)
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
    if query.is_cuda:
        from lethe_sglang.kernels.triton.score import score as launch

        return launch(
            rule, query, keys, lse, indptr, indices, first, decay, step, scores, memories, scaling, k_scale, lse_base
        )
    batch, heads, dim = query.shape
    begin = indptr[:batch].to(torch.int64).unsqueeze(1)
    length = indptr[1 : batch + 1].to(torch.int64).unsqueeze(1) - begin
    j = torch.arange(int(length.max()) if batch else 0).unsqueeze(0)
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
    if req_to_token.is_cuda:
        from lethe_sglang.kernels.triton.indices import fill_lists as launch

        return launch(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices)
    _fill(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices, fill_indptr=True)


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
    if req_to_token.is_cuda:
        from lethe_sglang.kernels.triton.indices import fill_indices as launch

        return launch(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices)
    _fill(req_to_token, table, rows, seq_lens, layer, blocks, indptr, indices, fill_indptr=False)


def _fill(
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
    batch, num_layers = rows.shape[0], (table.shape[1] - 4) // 2
    lines = table[rows]
    kept, offset = lines[:, 4 : 4 + num_layers], lines[:, 4 + num_layers :]
    width = int((lines[:, 0] + kept[:, layer] + seq_lens - lines[:, 1]).amax()) if batch else 0
    lists = token_lists(req_to_token, rows, seq_lens, lines[:, 0], lines[:, 1], kept, offset, blocks, width)
    length = lists.length[layer]
    if fill_indptr:
        indptr[0] = 0
        indptr[1 : batch + 1] = length.cumsum(0)
    begin, end = indptr[:batch].to(torch.int64).unsqueeze(1), indptr[1 : batch + 1].to(torch.int64).unsqueeze(1)
    j = torch.arange(width).unsqueeze(0)
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
    if slots.is_cuda:
        from lethe_sglang.kernels.triton.zero import start_states as launch

        return launch(score, memory, slots, positions, num_layers)
    for state, fresh in ((score, 0.0 if positions is None else positions.float()), (memory, 0.0)):
        if state is not None:
            state.view(num_layers, -1)[:, slots] = fresh


def repack(buffers: Iterable[torch.Tensor], source: torch.Tensor, destination: torch.Tensor) -> None:
    """Move cells as if all at once: ``triton.repack.repack``."""
    if source.is_cuda:
        from lethe_sglang.kernels.triton.repack import repack as launch

        return launch(buffers, source, destination)
    twin_repack.repack(buffers, source, destination)


def select(rank: torch.Tensor, valid: torch.Tensor, pinned: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Choose the best candidates of every segment: ``triton.select.select``."""
    if rank.is_cuda:
        from lethe_sglang.kernels.triton.select import select as launch

        return launch(rank, valid, pinned, count)
    return twin_repack.select(rank, valid, pinned, count)
