"""The CPU reference of a round's kernels, as ``reference.py`` is that of the others; ``kernels/triton/rounds.py``.

A launch on a CPU is mostly of one or two requests, whose numbers are few: NumPy starts an operation on them in a
fraction of the time that torch takes. Tensors are of a CPU and share their memory with the arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lethe_sglang.kernels.common import Candidate, Cells, Extent, holes_of
from lethe_sglang.kernels.table import ROUND, Rounds
from lethe_sglang.policies import features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]


def _read(table: torch.Tensor) -> Rounds:
    """Return the columns as int64 arrays, ``[B]`` and ``[B, L]``."""
    lines, first = table.numpy().astype(np.int64), len(ROUND.single)
    layers = lines[:, first:].reshape(len(lines), len(ROUND.per_layer), -1).swapaxes(0, 1)
    return Rounds(**dict(zip((*ROUND.single, *ROUND.per_layer), (*lines[:, :first].T, *layers), strict=True)))


def _holes(number: Numbers, kept: Numbers, holes: Numbers) -> tuple[Numbers, Numbers]:
    owner, place = holes_of(*(torch.from_numpy(values) for values in (number, kept, holes)))
    return owner.numpy(), place.numpy()


def gather(req_to_token: torch.Tensor, table: torch.Tensor, cells: Cells, extent: Extent) -> Candidate:
    """Resolve the candidates of a launch and gather their states."""
    n = _read(table)
    j, old_kept = np.arange(extent.candidates), n.old_kept.T[:, :, None]
    in_tail = j - old_kept
    valid = in_tail < (n.new_tail - n.old_tail)[:, None]
    written = n.old_tail[:, None] + in_tail
    position = np.where(in_tail >= 0, written, n.prefix[:, None] + j)
    owner = np.arange(cells.num_layers)[:, None, None]
    if extent.old_excess:
        place = j - n.old_packed[:, None]
        elsewhere = (place >= 0) & (in_tail < 0)
        hole, at = _holes(np.where(elsewhere, n.old_excess.T[:, :, None] + place, 0), n.old_kept, n.old_holes)
        owner, position = np.where(elsewhere, hole, owner), np.where(elsewhere, n.prefix[:, None] + at, position)
    slot = req_to_token.numpy()[n.row[:, None], np.where(valid, position, 0)]
    found = (owner * cells.blocks + slot) * valid
    if cells.position is None:
        positions = None
    else:
        positions = torch.from_numpy(np.where(in_tail >= 0, written.astype(np.int32), cells.position.numpy()[found]))
    score, memory = (None if state is None else torch.from_numpy(state.numpy()[found]) for state in cells.states)
    return Candidate(torch.from_numpy(found), torch.from_numpy(valid), positions, score, memory)


def likeness(keys: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compare each candidate's key with the mean normalised key of its layer's candidates.

    This is :func:`lethe_sglang.policies.features.likeness`, in which the length of the mean cancels, so a sum does. No
    product of matrices, whose rounding would depend on how long the lists of other requests are.
    """
    _, batch, n = cells.shape
    heads, dim = keys.shape[1:]
    layers = max(features.AT_ONCE // max(batch * n * heads * dim, 1), 1)
    head, rows, found = torch.arange(heads).view(1, 1, heads, 1), keys.view(-1, dim), []
    for some, own in zip(cells.split(layers), valid.split(layers), strict=True):
        lists = len(some) * batch
        index = (some.unsqueeze(2) * heads + head).reshape(-1)
        unit = rows.index_select(0, index).float().view(lists * heads, n, dim)
        if not own.all():
            absent = (~own).unsqueeze(2).expand(-1, -1, heads, -1).reshape(lists * heads, n, 1)
            unit.masked_fill_(absent, 0.0)  # whatever lies in that cell
        unit.div_(torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_(min=1e-12))
        total = unit.sum(1, keepdim=True)
        length = torch.linalg.vector_norm(total, dim=-1).clamp_(min=1e-12)
        cosine = unit.mul_(total).sum(-1).div_(length)
        found.append(cosine.view(len(some), batch, heads, n).mean(2))
    return torch.cat(found)


def ascending(values: NDArray[np.float32]) -> Numbers:
    """Return the stable ascending order of the last axis, NaN last.

    What is sorted are integers, which is faster: a float's bits, as a number that has the float's order, in front of
    its place.
    """
    alike = np.where(np.isnan(values), np.float32(np.nan), values) + np.float32(0)  # one NaN, one zero
    bits = alike.view(np.int32)
    ordered = (bits ^ ((bits >> 31) & np.int32(2**31 - 1))).astype(np.int64)
    numbers: Numbers = (ordered << 32) | np.arange(values.shape[-1])
    numbers.sort(-1)
    return numbers & (2**32 - 1)


def better_place(score: torch.Tensor, likeness: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Rank candidates by the better of two places: :func:`lethe_sglang.policies.features.better_place`."""
    lists = np.stack((score.numpy(), -likeness.numpy()))
    last_to_first = torch.from_numpy(ascending(np.where(valid.numpy(), lists, np.float32(-np.inf))))
    descending = torch.arange(lists.shape[-1] - 1, -1, -1, dtype=torch.float32)
    by_score, by_key = torch.empty(lists.shape).scatter_(-1, last_to_first, descending.expand(lists.shape))
    return by_score.div_(1 - share).minimum(by_key.add_(features.BEHIND).div_(share)).neg_()


def rewrite_rows(req_to_token: torch.Tensor, table: torch.Tensor, extent: Extent) -> torch.Tensor:
    """Rewrite the row entries and return the slots that are not in use any more."""
    n, rows, freed = _read(table), req_to_token.numpy(), []
    spans = zip(n.row, n.prefix, n.old_packed, n.old_tail, n.new_packed, n.new_tail, strict=True)
    for row, prefix, old_packed, old_tail, packed, tail in spans:
        entries = rows[row]
        blocks = np.concatenate((entries[prefix : prefix + old_packed], entries[old_tail:tail]))
        entries[prefix : prefix + packed] = blocks[:packed]
        entries[prefix + packed : tail] = 0
        freed.append(blocks[packed:])
    return torch.from_numpy(np.concatenate(freed).astype(np.int64))


def place(
    req_to_token: torch.Tensor,
    table: torch.Tensor,
    candidate: Candidate,
    keep: torch.Tensor,
    cells: Cells,
    extent: Extent,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Say where kept cells lie and where they go; write the states that are made anew; sum scores, all and kept."""
    n, kept = _read(table), keep.numpy()
    owner, block = destinations(n, kept, extent)
    slot = req_to_token.numpy()[n.row[:, None], np.where(kept, n.prefix[:, None] + block, 0)]
    of_kept = kept.transpose(1, 0, 2)

    def compact(values: NDArray[Any]) -> torch.Tensor:
        """Request by request, then layer by layer."""
        return torch.from_numpy(values.transpose(1, 0, 2)[of_kept])

    source, destination = compact(candidate.cells.numpy()), compact(owner * cells.blocks + slot)
    written = None
    for store, values in ((cells.position, candidate.position), (cells.memory, candidate.memory)):
        if store is not None and values is not None:
            chosen = compact(values.numpy())
            store.index_copy_(0, destination, chosen)
            written = chosen if store is cells.position else written
    mass = None
    if candidate.score is not None:
        score = candidate.score.numpy()
        counted = (np.where(those, score, np.float32(0)) for those in (candidate.valid.numpy(), kept))
        mass = torch.from_numpy(np.stack([values.sum(-1) for values in counted], -1))
    return source, destination, written, mass


def destinations(n: Rounds, keep: NDArray[np.bool_], extent: Extent) -> tuple[Numbers, Numbers]:
    """Say where kept cells go: the layer whose buffer takes them, and the place among its packed blocks.

    Both are broadcastable to ``[L, B, n]``, and nothing where ``keep`` is false.
    """
    layers, _, candidates = keep.shape
    j = np.arange(candidates)
    room = np.minimum(n.kept, n.new_packed[:, None]).T[:, :, None]  # places of a layer's own
    old_kept, old_packed = n.old_kept.T[:, :, None], n.old_packed[:, None]
    # Own block of a cell: a packed one's is its place unless it is excess, and blocks of the old tail follow.
    home = np.where(j < old_kept, j, old_packed + j - old_kept)
    stays = keep & (home < room) & ((j < old_packed) | (j >= old_kept))
    vacant = np.broadcast_to(np.arange(extent.most_packed) < room, (*keep.shape[:2], extent.most_packed)).copy()
    layer, request, cell = stays.nonzero()
    vacant[layer, request, home[layer, request, cell]] = False
    # The first of those that do not stay fill what is vacant, in order; any that are left over are excess.
    leaves = keep & ~stays
    turn = leaves.cumsum(-1) - 1
    excess = turn - vacant.sum(-1, keepdims=True)
    home[leaves & (excess < 0)] = vacant.nonzero()[2]
    owner = np.arange(layers)[:, None, None]
    if not extent.excess:
        return owner, home
    elsewhere = leaves & (excess >= 0)
    hole, at = _holes(np.where(elsewhere, n.excess.T[:, :, None] + excess, 0), n.kept, n.holes)
    return np.where(elsewhere, hole, owner), np.where(elsewhere, at, home)
