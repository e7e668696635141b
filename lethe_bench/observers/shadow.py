"""Test aid (``debug.shadow``): an uncompressed copy of every request, compared with what decode gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from lethe_sglang.kernels.table import Lines, read
from lethe_sglang.observers.base import Observer

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.kernels.common import Cells


class ShadowMismatch(AssertionError):
    """A gathered cell differs from the uncompressed cell at its logical position."""


class Step(NamedTuple):
    """What all layers of a decode step share, by request ``[B]``; ``real`` numbers those that are no padding."""

    real: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    place: torch.Tensor
    line: Lines
    followed: torch.Tensor


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
        # First decode step: the tree may have replaced part of the prefix, and the row is not followed yet.
        followed = torch.tensor([row in self.ledger.requests for row in numbers], device=rows.device).unsqueeze(1)
        return Step(real, rows, seq_lens, place, read(self.ledger.table[rows].to(torch.int64)), followed)

    def on_decode_layer(
        self, layer: int, forward_batch: Any, cells: torch.Tensor, length: torch.Tensor, attention: torch.Tensor | None
    ) -> None:
        """Copy the newest tokens, then compare the cells of every request's token list.

        Raises
        ------
        ShadowMismatch
            Naming the request's row, layer and logical positions.
        """
        assert self.store.position is not None
        if layer == 0:
            self.step = self._begin(forward_batch)
        if self.step is None:
            return
        real, rows, seq_lens, place, line, followed = self.step
        cells, length = cells[real], length[real]
        newest = layer * self.store.blocks + self.req_to_token[rows, seq_lens - 1].to(torch.int64)
        self.copy[0, layer, place, seq_lens - 1] = self.store.key[newest]
        self.copy[1, layer, place, seq_lens - 1] = self.store.value[newest]

        prefix, tail, kept = line.prefix.unsqueeze(1), line.tail.unsqueeze(1), line.kept[:, layer : layer + 1]
        j = torch.arange(cells.shape[1], device=cells.device).unsqueeze(0)
        own = (j >= prefix) & (j < length.unsqueeze(1)) & followed
        packed = self.store.position[cells].to(torch.int64)
        position = torch.where(j < prefix + kept, packed, tail + j - prefix - kept).masked_fill(~own, 0)
        ranked = position.masked_fill(~own, -1).sort(1).values
        once = ((ranked[:, 1:] > ranked[:, :-1]) | (ranked[:, 1:] < 0)).all(1)
        whole = (own.sum(1) == length - prefix.squeeze(1)) & (position.amax(1) == seq_lens - 1)
        good = once & (whole | ~followed.squeeze(1))
        if not bool(good.all()):
            raise ShadowMismatch(f"rows {rows[~good].tolist()} layer {layer}: a position twice, or the wrong length")
        front = torch.where(j < prefix, j, 0)
        there = self.req_to_token[rows.unsqueeze(1), front] == self.slots[place.unsqueeze(1), front]
        compared, position = own | ((j < prefix) & followed & there), torch.where(own, position, j)
        where = cells[compared]
        at = place.unsqueeze(1).expand_as(cells)[compared], position[compared]
        for name, copy, buffer in (("key", self.copy[0], self.store.key), ("value", self.copy[1], self.store.value)):
            if not torch.equal(copy[layer][at], buffer[where]):
                wrong = (copy[layer][at] != buffer[where]).flatten(1).any(1)
                row = rows.unsqueeze(1).expand_as(cells)[compared][wrong][:4].tolist()
                raise ShadowMismatch(f"rows {row} layer {layer} {name}: positions {at[1][wrong][:4].tolist()} differ")
        self.checks += int(followed.sum())
        self.cells += int(compared.sum())

    def report(self) -> dict[str, Any]:
        """Return how much was compared."""
        return {"shadow": {"checks": self.checks, "cells": self.cells}}
