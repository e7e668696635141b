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

from lethe_sglang.cache.layout import excess_offsets, hole_offsets
from lethe_sglang.cache.ledger import RoundPlan
from lethe_sglang.cache.upload import upload
from lethe_sglang.kernels.common import States, TokenLists, holes_of, token_lists
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.table import NEVER, Spans
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

    def of_layer(self, layer: int) -> Cells:
        """Return views of one layer's cells, in which slot b is cell b."""
        start, end = layer * self.blocks, (layer + 1) * self.blocks
        views = {name: buffer[start:end] for name, buffer in self.buffers.items()}
        return self._replace(**views, num_layers=1)

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
        Kept cells of the requests before this one, and of its layers before this one.
    old_excess, old_holes, excess, holes
        E_l and H_l (``cache/layout.py``) before the round and after it.
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
    old_excess: torch.Tensor
    old_holes: torch.Tensor
    kept: torch.Tensor
    excess: torch.Tensor
    holes: torch.Tensor

    @classmethod
    def of(cls, plans: Sequence[RoundPlan], device: torch.device) -> Numbers:
        """Send what a launch needs of its plans."""
        shared = [name for name in RoundPlan._fields if name in cls._fields]
        numbers: dict[str, list[Any]] = {name: [getattr(plan, name) for plan in plans] for name in shared}
        starts = list(accumulate((k for plan in plans for k in plan.kept), initial=0))[:-1]
        layers = len(plans[0].kept)
        numbers["start"] = [starts[i : i + layers] for i in range(0, len(starts), layers)]
        numbers["old_excess"] = [excess_offsets(plan.old_kept, plan.old_packed) for plan in plans]
        numbers["old_holes"] = [hole_offsets(plan.old_kept, plan.old_packed) for plan in plans]
        numbers["excess"] = [excess_offsets(plan.kept, plan.new_packed) for plan in plans]
        numbers["holes"] = [hole_offsets(plan.kept, plan.new_packed) for plan in plans]
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
        int32 ``[sum k]``: logical positions kept (request-major, then layer; in no order within a layer), or None if
        positions are not tracked.
    """

    freed: torch.Tensor
    rank: torch.Tensor
    candidates: torch.Tensor
    pinned: torch.Tensor
    kept_position: torch.Tensor | None


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
    position = positions_of(numbers, own, cells)
    order = in_time(own, position) if policy.uses_position else None
    candidates, remembered = gather_candidates(numbers, own, position, order, cells, policy, reduce_scores)
    rank = policy.rank(candidates).nan_to_num()  # finite: only pinned cells are above all, only invalid ones below
    j = torch.arange(rank.shape[2], device=rank.device)
    pinned = (j < numbers.pinned.view(1, -1, 1)).expand_as(candidates.valid)
    keep = kernels_for(rank.device).select(rank, candidates.valid, pinned, numbers.kept.t())
    renewed = {} if position is None else {"position": position}
    if remembered is not None:
        renewed["memory"] = as_stored(remembered, order)
    freed = rewrite_rows(plans, numbers, req_to_token)
    kept_position = move_cells(plans, numbers, own, as_stored(keep, order), renewed, cells, req_to_token)
    rank = rank.masked_fill(~candidates.valid, float("-inf"))
    return RoundResult(freed, rank, own.length, pinned, kept_position)


def own_cells(plans: Sequence[RoundPlan], numbers: Numbers, cells: Cells, req_to_token: torch.Tensor) -> TokenLists:
    """Resolve the cells that a round may evict: packed ones, then those that have left the recent window."""
    n = numbers
    return token_lists(
        req_to_token,
        n.row,
        n.new_tail,
        Spans(n.prefix, n.old_packed, n.old_tail, n.old_kept, n.old_excess, n.old_holes),
        cells.blocks,
        max(max(p.candidates) for p in plans),
        skip_prefix=True,
        excess=any(max(p.old_kept) > p.old_packed for p in plans),
    )


def positions_of(numbers: Numbers, own: TokenLists, cells: Cells) -> torch.Tensor | None:
    """Return the candidates' logical positions, int32 ``[L, B, n]``, if they are tracked."""
    if cells.position is None:
        return None
    in_tail = torch.arange(own.cells.shape[2], device=own.cells.device) - numbers.old_kept.t().unsqueeze(2)
    stored = cells.position[own.cells]
    return torch.where(in_tail >= 0, (numbers.old_tail.view(1, -1, 1) + in_tail).to(torch.int32), stored)


def in_time(own: TokenLists, position: torch.Tensor | None) -> torch.Tensor:
    """Return the order in which candidates were written, int64 ``[L, B, n]``; those that are not valid come last.

    They are stored in another: a packed cell lies where there was room for it.
    """
    assert position is not None, "a policy that uses positions has them tracked"
    j = torch.arange(position.shape[2], device=position.device)
    return position.masked_fill(j >= own.length.unsqueeze(2), NEVER).argsort(dim=-1, stable=True)


def as_stored(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Bring what was computed in order of time, ``[L, B, n]``, back into the order of :func:`own_cells`."""
    return values if order is None else torch.empty_like(values).scatter_(-1, order, values)


def gather_candidates(
    numbers: Numbers,
    own: TokenLists,
    position: torch.Tensor | None,
    order: torch.Tensor | None,
    cells: Cells,
    policy: Policy,
    reduce_scores: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[Candidates, torch.Tensor | None]:
    """Gather what the policy sees, in ``order``, and the memory that it renews: that is written instead of moved."""
    valid = torch.arange(own.cells.shape[2], device=own.cells.device) < own.length.unsqueeze(2)
    seen = own.cells if order is None else own.cells.gather(-1, order)

    def over_ranks(values: torch.Tensor) -> torch.Tensor:
        return values if reduce_scores is None else reduce_scores(values)

    feature = None
    if policy.uses_keys:  # one layer at a time: a policy may compare every key with every other
        pairs = zip(seen, valid, strict=True)
        feature = over_ranks(torch.stack([policy.key_feature(cells.keys[c].float(), v) for c, v in pairs]))
    candidates = Candidates(
        score=None if cells.score is None else over_ranks(cells.score[seen]),
        position=None if position is None or order is None else position.gather(-1, order),
        memory=None if cells.memory is None else over_ranks(cells.memory[seen]),
        feature=feature,
        valid=valid,
        length=numbers.committed,
    )
    remembered = policy.remember(candidates) if policy.uses_memory else None
    return candidates if remembered is None else candidates._replace(memory=remembered), remembered


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
) -> torch.Tensor | None:
    """Move the kept cells to where they belong, all at once, and return the positions they hold if these are tracked.

    A kept cell that lies in its layer's own part of the packed blocks already stays where it is.
    """
    owner, block = destinations(plans, numbers, keep)
    total = sum(sum(p.kept) for p in plans)
    place = torch.where(keep, numbers.start.t().unsqueeze(2) + keep.cumsum(-1) - 1, total).reshape(-1)

    def compact(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty(total + 1, dtype=values.dtype, device=values.device)
        out.index_copy_(0, place, values.expand_as(keep).reshape(-1))
        return out[:total]

    position = torch.where(keep, numbers.prefix.view(1, -1, 1) + block, 0)
    slot = req_to_token[numbers.row.view(1, -1, 1), position].to(torch.int64)
    source, destination = compact(own.cells), compact(owner * cells.blocks + slot)
    moved = [buffer for name, buffer in cells.buffers.items() if name not in renewed]
    kernels_for(source.device).repack(moved, source, destination)
    written = {name: compact(values) for name, values in renewed.items()}
    for name, values in written.items():
        cells.buffers[name].index_copy_(0, destination, values)
    return written.get("position")


def destinations(plans: Sequence[RoundPlan], numbers: Numbers, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Say where kept cells go: the layer whose buffer takes them, and the place among its packed blocks.

    Places of a layer that no kept cell of its own holds are filled in ascending order by those that have to move, in
    the order of :func:`own_cells`; what is left of these goes into holes.

    Parameters
    ----------
    plans, numbers
        The launch.
    keep
        bool ``[L, B, n]``, in the order of :func:`own_cells`.

    Returns
    -------
    tuple
        int64, broadcastable to ``[L, B, n]``; nothing where ``keep`` is false.
    """
    n = numbers
    j = torch.arange(keep.shape[2], device=keep.device)
    room = torch.minimum(n.kept, n.new_packed.unsqueeze(1)).t().unsqueeze(2)  # places of a layer's own
    old_kept, old_packed = n.old_kept.t().unsqueeze(2), n.old_packed.view(1, -1, 1)
    # Own block of a cell: a packed one's is its place unless it is excess, and blocks of the old tail follow.
    home = torch.where(j < old_kept, j, old_packed + j - old_kept)
    stays = keep & (home < room) & ((j < old_packed) | (j >= old_kept))
    # The same the other way round: which cell a block holds.
    i = torch.arange(max(max(plan.new_packed for plan in plans), 1), device=keep.device)
    cell = torch.where(i < old_packed, i, old_kept + i - old_packed)
    holds = ((i < old_kept) | (i >= old_packed)) & (cell < keep.shape[2])
    taken = holds & stays.gather(-1, torch.where(holds, cell, 0))
    vacant = (i < room) & ~taken
    number = torch.where(vacant, vacant.cumsum(-1) - 1, len(i))
    gaps = torch.zeros((*keep.shape[:2], len(i) + 1), dtype=torch.int64, device=keep.device)
    gaps.scatter_(-1, number, i.expand_as(number))
    turn = (keep & ~stays).cumsum(-1) - 1
    filled = gaps.gather(-1, turn.clamp(0, len(i)))
    block = torch.where(stays, home, filled)
    owner = torch.arange(keep.shape[0], device=keep.device).view(-1, 1, 1)
    if all(max(plan.kept) <= plan.new_packed for plan in plans):
        return owner, block
    excess = turn - vacant.sum(-1, keepdim=True)
    elsewhere = keep & ~stays & (excess >= 0)
    hole, at = holes_of(torch.where(elsewhere, n.excess.t().unsqueeze(2) + excess, 0), n.kept, n.holes)
    return torch.where(elsewhere, hole, owner), torch.where(elsewhere, at, block)
