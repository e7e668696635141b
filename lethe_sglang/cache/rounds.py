"""One pruning round, for all due requests at once.

Four nouns, one function each: the *own cells* of every layer, the *candidates* that the policy ranks, the *rows* whose
entries change and whose blocks go back, the *cells* that move. The host supplies counts, in one upload; which tokens
survive is decided and stays on the device, so nothing here synchronises. Every step is one operation over all layers
and all due requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lethe_sglang.cache.layout import packed_cell, packed_offsets
from lethe_sglang.cache.ledger import RoundPlan
from lethe_sglang.cache.upload import upload
from lethe_sglang.kernels.common import States, TokenLists, token_lists
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.table import Spans
from lethe_sglang.policies.base import Candidates

if TYPE_CHECKING:
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
    def states(self) -> States:
        """What decode accumulates."""
        return States(self.score, self.memory)

    @property
    def keys(self) -> torch.Tensor:
        """``key`` as attention reads it."""
        return self.key if self.dtype is None else self.key.view(self.dtype)

    @property
    def values(self) -> torch.Tensor:
        """``value`` as attention reads it."""
        return self.value if self.dtype is None else self.value.view(self.dtype)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a round moves, by name."""
        names = ("key", "value", "score", "position", "memory")
        return {name: buffer for name in names if (buffer := getattr(self, name)) is not None}


class Numbers(NamedTuple):
    """Host numbers of a launch on the device: int64 ``[B]``, or ``[B, L]`` for those of every layer.

    They are those of :class:`~lethe_sglang.cache.ledger.RoundPlan`, and these.

    Attributes
    ----------
    start
        Kept cells of the requests before this one.
    old_offset, offset
        off_l before the round and after it.
    """

    row: torch.Tensor
    committed: torch.Tensor
    prefix: torch.Tensor
    pinned: torch.Tensor
    old_packed: torch.Tensor
    old_tail: torch.Tensor
    new_packed: torch.Tensor
    new_tail: torch.Tensor
    start: torch.Tensor
    old_kept: torch.Tensor
    old_offset: torch.Tensor
    kept: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, plans: Sequence[RoundPlan], device: torch.device) -> Numbers:
        """Send what a launch needs of its plans."""
        shared = [name for name in RoundPlan._fields if name in cls._fields]
        numbers: dict[str, list[Any]] = {name: [getattr(plan, name) for plan in plans] for name in shared}
        numbers["start"] = list(accumulate((sum(p.kept) for p in plans), initial=0))[:-1]
        numbers["old_offset"] = [packed_offsets(p.old_kept) for p in plans]
        numbers["offset"] = [packed_offsets(p.kept) for p in plans]
        return cls(**dict(zip(numbers, upload(numbers.values(), device), strict=True)))


class RoundResult(NamedTuple):
    """What a round leaves on the device.

    Attributes
    ----------
    freed
        int64 ``[f]``: slots that go back to the allocator, whole pages, request by request in row order.
    rank
        float32 ``[L, B, n]``: the policy's ranks; ``-inf`` beyond a layer's candidates.
    candidates
        int64 ``[L, B]``: how many each layer had.
    pinned
        bool ``[L, B, n]``: what is kept whatever its rank.
    kept_position
        int32 ``[sum k]``: logical positions kept (request-major, then layer), or None if positions are not tracked.
    kept_cells
        int64 ``[sum k]``: the packed cells in the same order.
    """

    freed: torch.Tensor
    rank: torch.Tensor
    candidates: torch.Tensor
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
    numbers = Numbers.of(plans, req_to_token.device)
    own = own_cells(plans, numbers, cells, req_to_token)
    candidates, renewed = gather_candidates(numbers, own, cells, policy, reduce_scores)
    rank = policy.rank(candidates).nan_to_num()  # finite: only pinned cells are above all, only invalid ones below
    j = torch.arange(rank.shape[2], device=rank.device)
    pinned = (j < numbers.pinned.view(1, -1, 1)).expand_as(candidates.valid)
    keep = kernels_for(rank.device).select(rank, candidates.valid, pinned, numbers.kept.t())
    freed = rewrite_rows(plans, numbers, req_to_token)
    kept_cells, kept_position = move_cells(plans, numbers, own, keep, renewed, cells, req_to_token)
    rank = rank.masked_fill(~candidates.valid, float("-inf"))
    return RoundResult(freed, rank, own.length, pinned, kept_position, kept_cells)


def own_cells(plans: Sequence[RoundPlan], numbers: Numbers, cells: Cells, req_to_token: torch.Tensor) -> TokenLists:
    """Resolve the cells that a round may evict: packed ones, then those that have left the recent window."""
    return token_lists(
        req_to_token,
        numbers.row,
        numbers.new_tail,
        Spans(numbers.prefix, numbers.old_tail, numbers.old_kept, numbers.old_offset),
        cells.blocks,
        max(max(p.candidates) for p in plans),
        skip_prefix=True,
    )


def gather_candidates(
    numbers: Numbers,
    own: TokenLists,
    cells: Cells,
    policy: Policy,
    reduce_scores: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[Candidates, dict[str, torch.Tensor]]:
    """Gather what the policy sees, and the states that follow from it: these are written anew instead of moved."""
    j = torch.arange(own.cells.shape[2], device=own.cells.device)
    valid = j < own.length.unsqueeze(2)

    def over_ranks(values: torch.Tensor) -> torch.Tensor:
        return values if reduce_scores is None else reduce_scores(values)

    renewed = {}
    if cells.position is not None:
        in_tail = j - numbers.old_kept.t().unsqueeze(2)
        stored = cells.position[own.cells].to(torch.int64)
        position = torch.where(in_tail >= 0, numbers.old_tail.view(1, -1, 1) + in_tail, stored)
        renewed["position"] = position.to(torch.int32)
    feature = None
    if policy.uses_keys:  # one layer at a time: a policy may compare every key with every other
        pairs = zip(own.cells, valid, strict=True)
        feature = over_ranks(torch.stack([policy.key_feature(cells.keys[c].float(), v) for c, v in pairs]))
    candidates = Candidates(
        score=None if cells.score is None else over_ranks(cells.score[own.cells]),
        position=renewed.get("position"),
        memory=None if cells.memory is None else over_ranks(cells.memory[own.cells]),
        feature=feature,
        valid=valid,
        length=numbers.committed,
    )
    remembered = policy.remember(candidates) if policy.uses_memory else None
    if remembered is not None:
        renewed["memory"] = remembered
        candidates = candidates._replace(memory=remembered)
    return candidates, renewed


def rewrite_rows(plans: Sequence[RoundPlan], numbers: Numbers, req_to_token: torch.Tensor) -> torch.Tensor:
    """Rewrite the row entries and return the slots that are not in use any more.

    A request's own blocks are those of its packed cells and then those that have left the recent window. The first
    ``new_packed`` of them hold what is kept, whatever they held before; the rest is free, and its entries are dead.
    """
    n = numbers

    def spread(lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (request, place) of ``lengths[b]`` entries of every request b."""
        requests = torch.arange(len(plans), device=lengths.device)
        request = torch.repeat_interleave(requests, lengths, output_size=total)
        return request, torch.arange(total, device=lengths.device) - (lengths.cumsum(0) - lengths)[request]

    def slots_of(request: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Return the slot of a request's own block, counted from 0."""
        behind = block - n.old_packed[request]
        position = torch.where(behind < 0, n.prefix[request] + block, n.old_tail[request] + behind)
        return req_to_token[n.row[request], position]

    in_use = sum(p.new_packed for p in plans)
    own = sum(p.old_packed + p.new_tail - p.old_tail for p in plans)
    request, block = spread(n.old_packed + n.new_tail - n.old_tail - n.new_packed, own - in_use)
    freed = slots_of(request, n.new_packed[request] + block).to(torch.int64)
    request, block = spread(n.new_packed, in_use)
    req_to_token[n.row[request], n.prefix[request] + block] = slots_of(request, block)
    dead = sum(p.new_tail - p.prefix - p.new_packed for p in plans)
    request, place = spread(n.new_tail - n.prefix - n.new_packed, dead)
    req_to_token[n.row[request], n.prefix[request] + n.new_packed[request] + place] = 0
    return freed


def move_cells(
    plans: Sequence[RoundPlan],
    numbers: Numbers,
    own: TokenLists,
    keep: torch.Tensor,
    renewed: dict[str, torch.Tensor],
    cells: Cells,
    req_to_token: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move the kept cells to where their numbers say, all at once; return these cells and the positions they hold."""
    total = sum(sum(p.kept) for p in plans)
    # A kept cell's number within its request (off_l + its place in the layer), and its place within the whole round.
    number = numbers.offset.t().unsqueeze(2) + keep.cumsum(-1) - 1
    owner, block = packed_cell(number, cells.num_layers)
    position = torch.where(keep, numbers.prefix.view(1, -1, 1) + block, 0)
    slot = req_to_token[numbers.row.view(1, -1, 1), position].to(torch.int64)
    place = torch.where(keep, numbers.start.view(1, -1, 1) + number, total).reshape(-1)

    def compact(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty(total + 1, dtype=values.dtype, device=values.device)
        out.index_copy_(0, place, values.expand_as(keep).reshape(-1))
        return out[:total]

    source, destination = compact(own.cells), compact(owner * cells.blocks + slot)
    moved = [buffer for name, buffer in cells.buffers.items() if name not in renewed]
    kernels_for(source.device).repack(moved, source, destination)
    written = {name: compact(values) for name, values in renewed.items()}
    for name, values in written.items():
        cells.buffers[name].index_copy_(0, destination, values)
    return destination, written.get("position")
