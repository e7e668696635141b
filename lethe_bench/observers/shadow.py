"""Test aid (``debug.shadow``): an uncompressed copy of every request, compared with what decode gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from lethe_sglang.kernels.table import read
from lethe_sglang.observers.base import Observer

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.kernels.common import Cells


class ShadowMismatch(AssertionError):
    """A gathered cell differs from the uncompressed cell at its logical position."""


class Step(NamedTuple):
    """What all layers of a decode step share, on the host, by request ``[B]`` or ``[B, 1]``, and their token lists.

    ``real`` numbers requests that are no padding; ``kept`` is ``[L, B, 1]``; ``there`` ``[B, P]`` says which positions
    of the longest prefix still lie where the prefill left them. ``lists`` has each layer's cells ``[B, P]`` and lengths
    ``[B]``.
    """

    real: torch.Tensor
    rows: np.ndarray
    seq_lens: np.ndarray
    place: np.ndarray
    prefix: np.ndarray
    tail: np.ndarray
    kept: np.ndarray
    followed: np.ndarray
    there: np.ndarray
    newest: torch.Tensor
    lists: list[tuple[torch.Tensor, torch.Tensor]]


def _host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as integers on the host, where an operation on a few of them is ten times cheaper."""
    found: np.ndarray = tensor.cpu().numpy().astype(np.int64, copy=False)
    return found


class Shadow(Observer):
    """The keys and values of all logical positions of every row in use: ``[2, L, S, capacity, H, D]``.

    A prefix is compared where it lies in the slots that the prefill has read or written: the radix tree may replace it
    by an equal one that another batch computed.

    Attributes
    ----------
    checks
        Comparisons of one layer of one request at one step so far.
    cells
        Cells compared so far.
    """

    sees_attention: ClassVar[bool] = True

    def __init__(self, cells: Cells, ledger: Ledger, req_to_token: torch.Tensor) -> None:
        if cells.position is None:
            raise ValueError("debug.shadow needs positions to be tracked")
        self.store, self.ledger, self.req_to_token = cells, ledger, req_to_token
        self.places: dict[int, int] = {}
        self.free: list[int] = []
        self.copy = cells.key.new_zeros((2, cells.num_layers, 0, 0, *cells.key.shape[1:]))
        self.slots = req_to_token.new_zeros((0, 0))  # of every position at the row's prefill
        self.step: Step | None = None
        self.checks = 0
        self.cells = 0

    def on_close(self, rows: Sequence[int]) -> None:
        """Give back the places of rows that SGLang frees."""
        self.free += [self.places.pop(row) for row in rows if row in self.places]

    def _place(self, rows: list[int], length: int) -> torch.Tensor:
        """Return the places of rows, int64 ``[B]``, with room for ``length`` positions each."""
        missing = [row for row in rows if row not in self.places]
        _, _, places, capacity, *cell = self.copy.shape
        if len(missing) > len(self.free) or length > capacity:
            more = max(2 * places, places + len(missing) - len(self.free)) if len(missing) > len(self.free) else places
            grown = self.copy.new_zeros((2, self.store.num_layers, more, max(2 * length, capacity), *cell))
            grown[:, :, :places, :capacity] = self.copy
            self.copy = grown
            self.slots = torch.nn.functional.pad(self.slots, (0, grown.shape[3] - capacity, 0, more - places))
            self.free += range(places, more)
        for row in missing:
            self.places[row] = self.free.pop()
        return torch.tensor([self.places[row] for row in rows], device=self.copy.device)

    def on_extend_layer(self, layer: int, forward_batch: Any) -> None:
        """Copy what a prefill (or one chunk of it) has written; rows are intact then."""
        rows, lengths = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
        for row, place, length in zip(rows, self._place(rows, max(lengths)).tolist(), lengths, strict=True):
            self.slots[place, :length] = self.req_to_token[row, :length]
            cells = layer * self.store.blocks + self.req_to_token[row, :length].to(torch.int64)
            self.copy[0, layer, place, :length] = self.store.key[cells]
            self.copy[1, layer, place, :length] = self.store.value[cells]

    def _begin(self, forward_batch: Any) -> Step | None:
        """Return what the layers of a decode step share; None if it has padding only."""
        real = forward_batch.req_pool_indices.nonzero().squeeze(1)
        rows, seq_lens = forward_batch.req_pool_indices[real].to(torch.int64), forward_batch.seq_lens[real]
        numbers = rows.tolist()
        if not numbers:
            return None
        place = self._place(numbers, int(seq_lens.max()))
        line = read(self.ledger.table[rows].to(torch.int64))
        # First decode step: the tree may have replaced part of the prefix, and the row is not followed yet.
        followed = np.array([[row in self.ledger.requests] for row in numbers])
        front = int(line.prefix.max())
        there = self.req_to_token[rows, :front] == self.slots[place, :front]
        newest = self.req_to_token[rows, seq_lens - 1].to(torch.int64)
        lengths, places, prefix, tail = (_host(values)[:, None] for values in (seq_lens, place, line.prefix, line.tail))
        kept, found = _host(line.kept).T[:, :, None], there.cpu().numpy()
        return Step(real, _host(rows), lengths, places, prefix, tail, kept, followed, found, newest, [])

    def on_decode_layer(
        self, layer: int, forward_batch: Any, cells: torch.Tensor, length: torch.Tensor, attention: torch.Tensor | None
    ) -> None:
        """Note a layer's token lists; behind the last layer, compare the cells of all of them.

        They may wait for it: no round comes in between, and no later layer writes this one's cells. Together they take
        a fraction of the operations, which on a CPU are most of the time.

        Raises
        ------
        ShadowMismatch
            Naming the request's row, layer and logical positions.
        """
        if layer == 0:
            self.step = self._begin(forward_batch)
        if self.step is None:
            return
        real = self.step.real
        self.step.lists.append((cells[real], length[real]))  # copies: the next layer's may lie there
        if layer == self.store.num_layers - 1:
            self._compare(self.step)

    def _compare(self, step: Step) -> None:
        """Copy the newest tokens, then compare the cells of every layer's and request's token list ``[L, B, P]``."""
        assert self.store.position is not None
        widest = max(cells.shape[1] for cells, _ in step.lists)
        pad = torch.nn.functional.pad
        cells = torch.stack([pad(cells, (0, widest - cells.shape[1])) for cells, _ in step.lists])
        length = _host(torch.stack([length for _, length in step.lists]))[:, :, None]
        packed, listed = _host(self.store.position[cells]), _host(cells)
        layers = np.arange(len(step.lists))[:, None, None]
        _, _, places, capacity, *_ = self.copy.shape
        copy, base = self.copy.flatten(1, 3), (layers * places + step.place) * capacity
        at = torch.from_numpy((base + step.seq_lens - 1).ravel()).to(copy.device)
        written = (step.newest + torch.from_numpy(layers[:, 0] * self.store.blocks).to(copy.device)).flatten()
        copy[0, at], copy[1, at] = self.store.key[written], self.store.value[written]

        j, prefix = np.arange(widest), step.prefix
        own = (j >= prefix) & (j < length) & step.followed
        position = np.where(own, np.where(j < prefix + step.kept, packed, step.tail + j - prefix - step.kept), 0)
        ranked = np.sort(np.where(own, position, -1), axis=2)
        once = ((ranked[..., 1:] > ranked[..., :-1]) | (ranked[..., 1:] < 0)).all(2)
        whole = (own.sum(2) == (length - prefix)[..., 0]) & (position.max(2) == step.seq_lens[:, 0] - 1)
        good = once & (whole | ~step.followed[:, 0])
        if not good.all():
            layer = int(good.all(1).argmin())
            at_fault = step.rows[~good[layer]].tolist()
            raise ShadowMismatch(f"rows {at_fault} layer {layer}: a position twice, or the wrong length")
        there = np.pad(step.there, ((0, 0), (0, max(widest - step.there.shape[1], 0))))[:, :widest]
        compared = own | ((j < prefix) & step.followed & there)
        position = np.where(own, position, j)
        where = torch.from_numpy(listed[compared]).to(copy.device)
        at = torch.from_numpy((base + position)[compared]).to(copy.device)
        for name, half, buffer in (("key", copy[0], self.store.key), ("value", copy[1], self.store.value)):
            # ``index_select`` gathers whole rows several times as fast as an index does.
            if not torch.equal(half.index_select(0, at), buffer.index_select(0, where)):
                wrong = np.argwhere(compared)[(half[at] != buffer[where]).flatten(1).any(1).cpu().numpy()]
                wrong = wrong[wrong[:, 0] == wrong[0, 0]][:4]
                row, at_fault = step.rows[wrong[:, 1]].tolist(), position[tuple(wrong.T)].tolist()
                raise ShadowMismatch(f"rows {row} layer {wrong[0, 0]} {name}: positions {at_fault} differ")
        self.checks += len(step.lists) * int(step.followed.sum())
        self.cells += int(compared.sum())

    def report(self) -> dict[str, Any]:
        """Return how much was compared."""
        return {"shadow": {"checks": self.checks, "cells": self.cells}}
