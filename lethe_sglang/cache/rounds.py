"""One pruning round, for all due requests at once.

Rank, gather, repack, return blocks. The host supplies counts; which tokens survive is decided and stays on the device,
so nothing here synchronises. Every step is one operation over all layers and all due requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lethe_sglang.cache.layout import packed_offsets
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.indices import token_lists
from lethe_sglang.policies.base import Candidates

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import RoundPlan
    from lethe_sglang.policies.base import Policy


class Cells(NamedTuple):
    """The flat pool and the states that travel with a cell.

    Attributes
    ----------
    key, value
        ``[L * blocks, H, D]`` as they are stored and moved: fp8 as bytes.
    score
        float32 ``[L * blocks]`` or None.
    position
        int32 ``[L * blocks]`` or None: logical position of *packed* cells (a tail cell's follows from its row).
    memory
        float32 ``[L * blocks]`` or None: the policy's second state.
    num_layers, blocks
        L and the blocks of the pool, padding included.
    dtype
        Type of keys and values where they are stored as another (fp8), else None.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor | None
    position: torch.Tensor | None
    memory: torch.Tensor | None
    num_layers: int
    blocks: int
    dtype: torch.dtype | None = None

    @property
    def keys(self) -> torch.Tensor:
        """``key`` as attention reads it."""
        return self.key if self.dtype is None else self.key.view(self.dtype)

    @property
    def values(self) -> torch.Tensor:
        """``value`` as attention reads it."""
        return self.value if self.dtype is None else self.value.view(self.dtype)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What a round moves."""
        return [b for b in (self.key, self.value, self.score, self.position, self.memory) if b is not None]


class RoundResult(NamedTuple):
    """What a round leaves on the device.

    Attributes
    ----------
    freed
        int64 ``[f]``: slots that go back to the allocator, whole pages in row order.
    rank
        float32 ``[L, B, n]``: the policy's ranks; ``-inf`` beyond a layer's candidates.
    pinned
        bool ``[L, B, n]``: what is kept whatever its rank.
    kept_position
        int32 ``[sum k]``: logical positions kept (request-major, then layer), or None if positions are not tracked.
    kept_cells
        int64 ``[sum k]``: the packed cells in the same order.
    """

    freed: torch.Tensor
    rank: torch.Tensor
    pinned: torch.Tensor
    kept_position: torch.Tensor | None
    kept_cells: torch.Tensor


def run_round(
    plans: Sequence[RoundPlan],
    cells: Cells,
    req_to_token: torch.Tensor,
    policy: Policy,
    reduce_scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> RoundResult:
    """Carry out the planned rounds.

    Parameters
    ----------
    plans
        One per due request.
    cells
        The pool.
    req_to_token
        int32 ``[R, C]``; entries of packed, dead and tail positions are rewritten.
    policy
        Ranks the candidates.
    reduce_scores
        Averages scores over tensor-parallel ranks in a fixed order.

    Returns
    -------
    RoundResult
        The caller frees ``freed``.
    """
    device = req_to_token.device

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    def matrix(values: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    rows, prefix = column([p.row for p in plans]), column([p.prefix for p in plans])
    old_kept = matrix([p.old_kept for p in plans])
    old_tail, new_tail = column([p.old_tail for p in plans]), column([p.new_tail for p in plans])
    count = matrix([p.kept for p in plans]).t()
    width = max(max(p.candidates) for p in plans)

    own = token_lists(
        req_to_token,
        rows,
        new_tail,
        prefix,
        old_tail,
        old_kept,
        matrix([packed_offsets(p.old_kept) for p in plans]),
        cells.blocks,
        width,
        skip_prefix=True,
    )
    j = torch.arange(width, device=device).view(1, 1, -1)
    valid = j < own.length.unsqueeze(2)
    pinned = (j < column([p.pinned for p in plans]).view(1, -1, 1)).expand_as(valid)

    position = None
    if cells.position is not None:
        in_tail = j - old_kept.t().unsqueeze(2)
        stored = cells.position[own.cells].to(torch.int64)
        position = torch.where(in_tail >= 0, old_tail.view(1, -1, 1) + in_tail, stored).to(torch.int32)
    score = None
    if cells.score is not None:
        score = cells.score[own.cells]
        if reduce_scores is not None:
            score = reduce_scores(score)
    memory = None
    if cells.memory is not None:
        memory = cells.memory[own.cells]
        if reduce_scores is not None:
            memory = reduce_scores(memory)
    feature = None
    if policy.uses_keys:  # one layer at a time: a policy may compare every key with every other
        feature = torch.stack(
            [policy.key_feature(cells.keys[c].float(), v) for c, v in zip(own.cells, valid, strict=True)]
        )
        if reduce_scores is not None:
            feature = reduce_scores(feature)
    candidates = Candidates(score, position, memory, feature, valid, column([p.committed for p in plans]))
    remembered = policy.remember(candidates) if policy.uses_memory else None
    if remembered is not None:
        candidates = candidates._replace(memory=remembered)
    rank = policy.rank(candidates).nan_to_num()  # finite: only sinks are above all, only invalid entries below
    kernels = kernels_for(device)
    keep = kernels.select(rank, valid, pinned, count)

    # States that follow from the candidates are written anew; all others move with their cell.
    renewed = [(cells.position, position), (cells.memory, remembered)]
    written = [(buffer, values) for buffer, values in renewed if buffer is not None and values is not None]
    source, destination, freed, flat = _move(
        plans, cells, req_to_token, own.cells, keep, [values for _, values in written], column
    )
    anew = {id(buffer) for buffer, _ in written}
    kernels.repack([b for b in cells.buffers if id(b) not in anew], source, destination)
    for (buffer, _), values in zip(written, flat, strict=True):
        buffer.index_copy_(0, destination, values)
    kept_position = flat[0] if position is not None else None
    return RoundResult(freed, rank.masked_fill(~valid, float("-inf")), pinned, kept_position, destination)


def _move(
    plans: Sequence[RoundPlan],
    cells: Cells,
    req_to_token: torch.Tensor,
    own_cells: torch.Tensor,
    keep: torch.Tensor,
    states: list[torch.Tensor],
    column: Callable[[list[int]], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rewrite the rows and resolve where every kept cell goes; returns source, destination, freed slots, states."""
    device, num_layers = req_to_token.device, cells.num_layers
    # Row entries: the head of the old tail becomes packed blocks, the rest is dead. Freed: what is not in use any more.
    moved_from = _ranges([(p.row, p.old_tail, p.moved_pages) for p in plans], column)
    moved_to = _ranges([(p.row, p.prefix + p.old_packed, p.moved_pages) for p in plans], column)
    shrunk = [(p.row, p.prefix + p.new_packed, max(p.old_packed - p.new_packed, 0)) for p in plans]
    left = [(p.row, p.old_tail + p.moved_pages, p.new_tail - p.old_tail - p.moved_pages) for p in plans]
    freed = req_to_token[_ranges(shrunk + left, column)].to(torch.int64)
    req_to_token[moved_to] = req_to_token[moved_from]
    dead = [(p.row, p.prefix + p.new_packed, p.new_tail - p.prefix - p.new_packed) for p in plans]
    req_to_token[_ranges(dead, column)] = 0

    # Number of each kept cell within the request (off_l + its place in the layer) and within the whole round.
    total = sum(sum(p.kept) for p in plans)
    offsets = [packed_offsets(p.kept) for p in plans]
    start, base = [], 0
    for plan in plans:
        start.append(base)
        base += sum(plan.kept)
    off = torch.tensor(offsets, dtype=torch.int64).t().unsqueeze(2).to(device, non_blocking=True)
    number = off + keep.cumsum(-1) - 1
    block_position = column([p.prefix for p in plans]).view(1, -1, 1) + number // num_layers
    rows = column([p.row for p in plans]).view(1, -1, 1)
    slot = req_to_token[rows, torch.where(keep, block_position, 0)].to(torch.int64)
    target = (number % num_layers) * cells.blocks + slot
    place = torch.where(keep, column(start).view(1, -1, 1) + number, total).reshape(-1)

    def compact(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty(total + 1, dtype=values.dtype, device=device)
        out.index_copy_(0, place, values.expand_as(keep).reshape(-1))
        return out[:total]

    return compact(own_cells), compact(target), freed, [compact(state) for state in states]


def _ranges(
    pieces: list[tuple[int, int, int]], column: Callable[[list[int]], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, start, length) pieces -> index tensors (rows, positions) of all their entries, in order."""
    total = sum(length for _, _, length in pieces)
    lengths = column([length for _, _, length in pieces])

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(values, lengths, output_size=total)

    within = torch.arange(total, device=lengths.device) - spread(lengths.cumsum(0) - lengths)
    return spread(column([row for row, _, _ in pieces])), spread(column([start for _, start, _ in pieces])) + within
