"""One pruning round, for all due requests at once.

Four nouns, one function each: the *own cells* of every layer, the *candidates* that the policy ranks, the *rows* whose
entries change and whose blocks go back, the *cells* that move. The host supplies counts, in one upload; which tokens
survive is decided and stays on the device, so nothing here synchronises. Every step is one operation over all layers
and all due requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from lethe_sglang.cache.layout import RoundPlan, offsets
from lethe_sglang.cache.upload import columns_of, upload
from lethe_sglang.kernels.common import Candidate, Cells, Extent
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.table import NEVER, ROUND
from lethe_sglang.policies.base import Candidates, Policy
from lethe_sglang.policies.features import by_layer


def tables_of(plans: Sequence[RoundPlan], device: torch.device) -> tuple[torch.Tensor, Extent]:
    """Send the round table of a launch (``kernels/table.py``), and say how much there is to do."""
    plan = columns_of(plans)
    kept, packed, tail, old_kept, old_packed = (
        plan[name] for name in ("kept", "new_packed", "new_tail", "old_kept", "old_packed")
    )
    freed = old_packed + tail - plan["old_tail"] - packed
    old_excess, old_holes = offsets(old_kept, old_packed)
    excess, holes = offsets(kept, packed)
    start = kept.cumsum().reshape(kept.shape) - kept
    follows = {"free_start": freed.cumsum() - freed, "start": start, "old_excess": old_excess, "old_holes": old_holes}
    lines = ROUND.numbers(plan | follows | {"excess": excess, "holes": holes})
    extent = Extent(
        candidates=int(plan["candidates"].max()),
        kept=int(kept.sum()),
        freed=int(freed.sum()),
        packed=int(packed.sum()),
        dead=int((tail - plan["prefix"] - packed).sum()),
        most_packed=max(int(packed.max()), 1),
        old_excess=bool((old_kept > old_packed[:, None]).any()),
        excess=bool((kept > packed[:, None]).any()),
    )
    return upload(lines, device), extent


class RoundResult(NamedTuple):
    """What a round leaves on the device.

    Attributes
    ----------
    freed
        int64 ``[f]``: slots that go back to the allocator, whole pages, request by request in row order.
    rank
        float32 ``[L, B, n]``: the policy's ranks, in the order it saw the candidates in.
    salience
        float32 ``[L, B, n]``: the attention that candidates have gathered, where the policy sums it or takes the
        largest; else the ranks.
    valid
        bool ``[L, B, n]``: false beyond a layer's candidates.
    pinned
        int32 ``[B]``: first candidates, which are kept whatever their rank.
    kept_position
        int32 ``[sum k]``: logical positions kept (request-major, then layer; in no order within a layer), or None if
        positions are not tracked.
    mass
        float32 ``[L, B, 2]``: the attention that all candidates have gathered (salience, of this rank's heads), and
        that of the kept ones; None of a policy that gathers none.
    """

    freed: torch.Tensor
    rank: torch.Tensor
    salience: torch.Tensor
    valid: torch.Tensor
    pinned: torch.Tensor
    kept_position: torch.Tensor | None
    mass: torch.Tensor | None


def run_round(
    plans: Sequence[RoundPlan],
    cells: Cells,
    req_to_token: torch.Tensor,
    policy: Policy,
    reduce_scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
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
    scratch
        uint8: for what moves; None, or too little for it, allocates.

    Returns
    -------
    RoundResult
        The caller frees ``freed``.
    """
    table, extent = tables_of(plans, req_to_token.device)
    kernels, n = kernels_for(req_to_token.device), ROUND.read(table)
    candidate = kernels.gather(req_to_token, table, cells, extent)
    order = in_time(candidate) if policy.uses_position else None
    candidates = shown(candidate, order, n.committed, cells, policy, reduce_scores)
    remembered = policy.remember(candidates) if policy.uses_memory else None
    if remembered is not None:
        candidates = candidates._replace(memory=remembered)
        remembered = as_stored(remembered, order)
    rank = policy.rank(candidates)
    keep = as_stored(kernels.select(rank, candidates.valid, n.pinned.expand(rank.shape[:2]), n.kept.t()), order)
    freed = kernels.rewrite_rows(req_to_token, table, extent)
    rule = policy.accumulation
    gathers = rule is not None and rule.rule != "recurrence"
    renewed = candidate._replace(memory=remembered)  # written anew instead of moved, like positions
    if not gathers:
        renewed = renewed._replace(score=None)
    source, destination, kept_position, mass = kernels.place(req_to_token, table, renewed, keep, cells, extent)
    made = {"position"} if remembered is None else {"position", "memory"}
    moved = [buffer for name, buffer in cells.buffers.items() if name not in made]
    kernels.repack(moved, source, destination, scratch)
    salience = candidates.score if gathers and candidates.score is not None else rank
    return RoundResult(freed, rank, salience, candidates.valid, n.pinned, kept_position, mass)


TEMPORARY_BYTES = 72
"""A candidate's share of what a launch computes: its cell, states, rank, order and what sorting it takes. A policy that
compares keys takes far more, a layer at a time."""


def groups(plans: Sequence[RoundPlan], cells: Cells, limit: int) -> list[int]:
    """Divide due rounds into launches that take at most ``limit`` bytes each, but for a request that alone takes more.

    A launch holds a copy of the cells that it moves, and numbers of all its candidates, padded to the most of any layer
    and request.

    Returns
    -------
    list[int]
        How many plans each launch takes, in their order.
    """
    a_cell, sizes, kept, most = cells.bytes // (cells.num_layers * cells.blocks), [0], 0, 0
    for plan in plans:
        kept, most = kept + sum(plan.kept), max(most, *plan.candidates)
        taken = kept * a_cell + (sizes[-1] + 1) * cells.num_layers * most * TEMPORARY_BYTES
        if sizes[-1] and taken > limit:
            sizes.append(0)
            kept, most = sum(plan.kept), max(plan.candidates)
        sizes[-1] += 1
    return sizes


def in_time(candidate: Candidate) -> torch.Tensor:
    """Return the order in which candidates were written, int64 ``[L, B, n]``; those that are not valid come last.

    They are stored in another: a packed cell lies where there was room for it.
    """
    assert candidate.position is not None, "a policy that uses positions has them tracked"
    return candidate.position.masked_fill(~candidate.valid, NEVER).argsort(dim=-1, stable=True)


def as_stored(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Bring what was computed in order of time, ``[L, B, n]``, back into the order of the lists."""
    return values if order is None else torch.empty_like(values).scatter_(-1, order, values)


def shown(
    candidate: Candidate,
    order: torch.Tensor | None,
    committed: torch.Tensor,
    cells: Cells,
    policy: Policy,
    reduce_scores: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Candidates:
    """Make what the policy sees of the candidates: in ``order``, and averaged over ranks."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return values if order is None else values.gather(-1, order)

    def over_ranks(values: torch.Tensor) -> torch.Tensor:
        return values if reduce_scores is None else reduce_scores(values)

    kernels, feature = kernels_for(cells.key.device), None
    if policy.uses_keys:
        usual = type(policy).key_feature is Policy.key_feature
        made = kernels.likeness if usual else partial(by_layer, policy.key_feature)
        feature = over_ranks(made(cells.keys, ordered(candidate.cells), candidate.valid))
    position, score, memory = candidate[2:]
    return Candidates(
        score=None if score is None else over_ranks(ordered(score)),
        position=None if position is None or order is None else ordered(position),
        memory=None if memory is None else over_ranks(ordered(memory)),
        feature=feature,
        valid=candidate.valid,  # whatever the order, what is not valid comes last
        length=committed,
        better_place=kernels.better_place,
    )
