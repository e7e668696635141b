"""Test aid (``debug.shadow``): an uncompressed copy of every request, compared with what decode gathers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.rounds import Cells


class ShadowMismatch(AssertionError):
    """A gathered cell differs from the uncompressed cell at its logical position."""


class Shadow:
    """Per row, the keys and values of all logical positions: ``[2, L, capacity, H, D]``.

    Only own tokens are compared: the radix tree may replace a prefix by an equal one that another batch computed.

    Attributes
    ----------
    checks
        Comparisons of one layer of one request at one step so far.
    cells
        Cells compared so far.
    """

    def __init__(self, cells: Cells, ledger: Ledger, req_to_token: torch.Tensor) -> None:
        if cells.position is None:
            raise ValueError("debug.shadow needs positions to be tracked")
        self.store, self.ledger, self.req_to_token = cells, ledger, req_to_token
        self.rows: dict[int, torch.Tensor] = {}
        self.checks = 0
        self.cells = 0

    def _ensure(self, row: int, length: int) -> torch.Tensor:
        held = self.rows.get(row)
        if held is None or held.shape[2] < length:
            key = self.store.key
            grown = torch.zeros((2, self.store.num_layers, max(2 * length, 256), *key.shape[1:]), dtype=key.dtype)
            if held is not None:
                grown[:, :, : held.shape[2]] = held
            self.rows[row] = held = grown
        return held

    def _copy(self, layer: int, row: int, lo: int, hi: int) -> None:
        cells = layer * self.store.blocks + self.req_to_token[row, lo:hi].to(torch.int64)
        shadow = self._ensure(row, hi)
        shadow[0, layer, lo:hi] = self.store.key[cells]
        shadow[1, layer, lo:hi] = self.store.value[cells]

    def write_extend(self, layer: int, forward_batch: Any) -> None:
        """Copy what a prefill (or one chunk of it) has written; rows are intact then."""
        for row, seq_len in zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), strict=True):
            self._copy(layer, row, 0, seq_len)

    def check_decode(self, layer: int, forward_batch: Any, cells: torch.Tensor, length: torch.Tensor) -> None:
        """Copy the newest token, then compare all own cells of every request's token list.

        Raises
        ------
        ShadowMismatch
            Naming the request's row, layer and logical position.
        """
        assert self.store.position is not None
        rows, seq_lens = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
        for i, (row, seq_len) in enumerate(zip(rows, seq_lens, strict=True)):
            if row == 0:
                continue
            self._copy(layer, row, seq_len - 1, seq_len)
            if row not in self.ledger.requests:  # first decode step: the tree may have replaced part of the prefix
                continue
            prefix, tail = self.ledger.table[row, :2].tolist()
            kept = int(self.ledger.kept_of(self.ledger.table[row])[layer])
            own = cells[i, prefix : int(length[i])]
            position = torch.cat([self.store.position[own[:kept]].to(torch.int64), torch.arange(tail, seq_len)])
            if position.numel() != own.numel() or bool((position[1:] <= position[:-1]).any()):
                raise ShadowMismatch(f"row {row} layer {layer}: list is not ascending or has the wrong length")
            shadow = self.rows[row][:, layer, position]
            for name, expected, buffer in (("key", shadow[0], self.store.key), ("value", shadow[1], self.store.value)):
                wrong = (buffer[own] != expected).flatten(1).any(1)
                if bool(wrong.any()):
                    where = position[wrong][:4].tolist()
                    raise ShadowMismatch(f"row {row} layer {layer} {name}: cells of positions {where} differ")
            self.checks += 1
            self.cells += own.numel()
