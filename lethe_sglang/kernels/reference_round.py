"""The torch reference of a round's kernels, as ``reference.py`` is that of the others; ``kernels/triton/rounds.py``."""

from __future__ import annotations

import torch

from lethe_sglang.kernels.common import Candidate, Cells, Extent, holes_of, token_lists
from lethe_sglang.kernels.table import ROUND, Rounds, Spans
from lethe_sglang.policies import features


def _read(table: torch.Tensor) -> Rounds:
    return ROUND.read(table.to(torch.int64))


def gather(req_to_token: torch.Tensor, table: torch.Tensor, cells: Cells, extent: Extent) -> Candidate:
    """Resolve the candidates of a launch and gather their states."""
    n = _read(table)
    own = token_lists(
        req_to_token,
        n.row,
        n.new_tail,
        Spans(n.prefix, n.old_packed, n.old_tail, n.old_kept, n.old_excess, n.old_holes),
        cells.blocks,
        extent.candidates,
        skip_prefix=True,
        excess=extent.old_excess,
    )
    j = torch.arange(extent.candidates, device=table.device)
    position = None
    if cells.position is not None:
        in_tail = j - n.old_kept.t().unsqueeze(2)
        written = (n.old_tail.view(1, -1, 1) + in_tail).to(torch.int32)
        position = torch.where(in_tail >= 0, written, cells.position[own.cells])
    score, memory = (None if state is None else state[own.cells] for state in cells.states)
    return Candidate(own.cells, j < own.length.unsqueeze(2), position, score, memory)


def likeness(keys: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compare each candidate's key with the mean normalised key of its layer's candidates."""
    return features.by_layer(features.likeness, keys, cells, valid)


def better_place(score: torch.Tensor, likeness: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Rank candidates by the better of two places."""
    return features.better_place(score, likeness, valid, share)


def rewrite_rows(req_to_token: torch.Tensor, table: torch.Tensor, extent: Extent) -> torch.Tensor:
    """Rewrite the row entries and return the slots that are not in use any more."""
    n = _read(table)

    def spread(lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (request, place) of ``lengths[b]`` entries of every request b."""
        requests = torch.arange(len(lengths), device=lengths.device)
        request = torch.repeat_interleave(requests, lengths, output_size=total)
        return request, torch.arange(total, device=lengths.device) - (lengths.cumsum(0) - lengths)[request]

    def slots_of(request: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Return the slot of a request's own block, counted from 0."""
        behind = block - n.old_packed[request]
        position = torch.where(behind < 0, n.prefix[request] + block, n.old_tail[request] + behind)
        return req_to_token[n.row[request], position]

    request, block = spread(n.old_packed + n.new_tail - n.old_tail - n.new_packed, extent.freed)
    freed = slots_of(request, n.new_packed[request] + block).to(torch.int64)
    request, block = spread(n.new_packed, extent.packed)
    req_to_token[n.row[request], n.prefix[request] + block] = slots_of(request, block)
    request, place = spread(n.new_tail - n.prefix - n.new_packed, extent.dead)
    req_to_token[n.row[request], n.prefix[request] + n.new_packed[request] + place] = 0
    return freed


def place(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    candidate: Candidate,
    keep: torch.Tensor,
    cells: Cells,
    extent: Extent,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Say where kept cells lie and where they go; write the states that are made anew; sum scores, all and kept."""
    n = _read(table)
    owner, block = destinations(n, keep, extent)
    number = torch.where(keep, n.start.t().unsqueeze(2) + keep.cumsum(-1) - 1, extent.kept).reshape(-1)

    def compact(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty(extent.kept + 1, dtype=values.dtype, device=values.device)
        out.index_copy_(0, number, values.expand_as(keep).reshape(-1))
        return out[: extent.kept]

    position = torch.where(keep, n.prefix.view(1, -1, 1) + block, 0)
    slot = req_to_token[n.row.view(1, -1, 1), position].to(torch.int64)
    source, destination = compact(candidate.cells), compact(owner * cells.blocks + slot)
    written = None
    for store, values in ((cells.position, candidate.position), (cells.memory, candidate.memory)):
        if store is not None and values is not None:
            chosen = compact(values)
            store.index_copy_(0, destination, chosen)
            written = chosen if store is cells.position else written
    mass = None
    if candidate.score is not None:
        mass = torch.stack([(candidate.score * counted).sum(-1) for counted in (candidate.valid, keep)], -1)
    return source, destination, written, mass


def destinations(n: Rounds, keep: torch.Tensor, extent: Extent) -> tuple[torch.Tensor, torch.Tensor]:
    """Say where kept cells go: the layer whose buffer takes them, and the place among its packed blocks.

    Both int64, broadcastable to ``[L, B, n]``, and nothing where ``keep`` is false.
    """
    j = torch.arange(keep.shape[2], device=keep.device)
    room = torch.minimum(n.kept, n.new_packed.unsqueeze(1)).t().unsqueeze(2)  # places of a layer's own
    old_kept, old_packed = n.old_kept.t().unsqueeze(2), n.old_packed.view(1, -1, 1)
    # Own block of a cell: a packed one's is its place unless it is excess, and blocks of the old tail follow.
    home = torch.where(j < old_kept, j, old_packed + j - old_kept)
    stays = keep & (home < room) & ((j < old_packed) | (j >= old_kept))
    # The same the other way round: which cell a block holds.
    i = torch.arange(extent.most_packed, device=keep.device)
    cell = torch.where(i < old_packed, i, old_kept + i - old_packed)
    holds = ((i < old_kept) | (i >= old_packed)) & (cell < keep.shape[2])
    taken = holds & stays.gather(-1, torch.where(holds, cell, 0))
    vacant = (i < room) & ~taken
    number = torch.where(vacant, vacant.cumsum(-1) - 1, len(i))
    gaps = torch.zeros((*keep.shape[:2], len(i) + 1), dtype=torch.int64, device=keep.device)
    gaps.scatter_(-1, number, i.expand_as(number))
    turn = (keep & ~stays).cumsum(-1) - 1
    block = torch.where(stays, home, gaps.gather(-1, turn.clamp(0, len(i))))
    owner = torch.arange(keep.shape[0], device=keep.device).view(-1, 1, 1)
    if not extent.excess:
        return owner, block
    excess = turn - vacant.sum(-1, keepdim=True)
    elsewhere = keep & ~stays & (excess >= 0)
    hole, at = holes_of(torch.where(elsewhere, n.excess.t().unsqueeze(2) + excess, 0), n.kept, n.holes)
    return torch.where(elsewhere, hole, owner), torch.where(elsewhere, at, block)
