"""Length classes: layers whose lists are equally long, for every request and at every step.

A FlashInfer plan depends on lengths only, so one plan serves a class. That lengths agree within a class follows from
budgets: a request's k_l is ``min(budget, candidates)``, layers of one budget start with the same candidates, and a
request's own budget gives equal shares to equal layers (``allocation.budgets.scale``). A class at or under the mean
budget is *narrow*: its layers never have excess (``cache/layout.py``), so they also share one list, of slots. Layers of
other classes have a list each, of flat cells. The map is fixed when the server starts, because a CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lethe_sglang.cache.layout import narrow_layers

if TYPE_CHECKING:
    from lethe_sglang.cache.layout import RoundPlan, RowLayout
    from lethe_sglang.cache.ledger import Ledger, RequestState


SHARED_LISTS = 3
"""Most lists that layers share: each takes a buffer for the longest sequences of the largest batch."""


class LengthClasses:
    """The server's map from layers to classes, and the lists' lengths by host numbers.

    Parameters
    ----------
    budgets
        k_l of every layer at the server's start; layers of one budget share a class.
    ledger
        What the host knows of every request.

    Attributes
    ----------
    of_layer
        Class of each layer; classes are numbered by ascending budget.
    layers
        Layers of each class, ascending.
    narrow
        Which classes share lists: the narrow ones, but for the smallest if they are more than ``SHARED_LISTS``.
    buffer_of
        Per class, the number of the buffer its lists lie in. A narrow class has one of its own, filled when a step
        begins; all others share the last, which every layer fills for itself.
    """

    def __init__(self, budgets: Sequence[int], ledger: Ledger) -> None:
        distinct = sorted(set(budgets))
        self.of_layer = tuple(distinct.index(budget) for budget in budgets)
        self.layers = tuple(
            tuple(layer for layer, owner in enumerate(self.of_layer) if owner == number)
            for number in range(len(distinct))
        )
        narrow = narrow_layers(budgets)
        largest = sorted((layers for layers in self.layers if narrow[layers[0]]), key=len, reverse=True)[:SHARED_LISTS]
        self.narrow = tuple(layers in largest for layers in self.layers)
        shared = [number for number, shares in enumerate(self.narrow) if shares]
        self.buffer_of = tuple(shared.index(n) if n in shared else len(shared) for n in range(len(distinct)))
        self.ledger = ledger
        self._intact = (0,) * len(distinct)
        self._known: dict[int, tuple[RowLayout, tuple[int, ...]]] = {}

    def serve(self, budgets: Sequence[int]) -> bool:
        """Whether the layers of each class have one budget among ``budgets`` too, and narrow ones remain narrow."""
        narrow = narrow_layers(budgets)
        return all(
            len({budgets[layer] for layer in layers}) == 1 and (narrow[layers[0]] or not shares)
            for layers, shares in zip(self.layers, self.narrow, strict=True)
        )

    def narrow_layers(self) -> tuple[bool, ...]:
        """Return whether each layer shares its list."""
        return tuple(self.narrow[number] for number in self.of_layer)

    def check(self, plan: RoundPlan) -> None:
        """Check that a round leaves lists that the layers of a class can share.

        Raises
        ------
        RuntimeError
            With the layers: decoding would read cells of others.
        """
        for layers, shares in zip(self.layers, self.narrow, strict=True):
            kept = {plan.kept[layer] for layer in layers}
            if shares and (len(kept) > 1 or max(kept) > plan.new_packed or max(kept) % self.ledger.multiple):
                where = f"{plan.new_packed} (in multiples of {self.ledger.multiple})"
                raise RuntimeError(f"layers {layers} share a list and keep {sorted(kept)} cells in {where}")

    def lengths(self, rows: Sequence[int], seq_lens: torch.Tensor) -> torch.Tensor:
        """Resolve the lengths of a decode batch's lists: ``P + k_l + seq - T``.

        Parameters
        ----------
        rows
            The requests' rows. May be shorter than the batch: the rest are padded rows of a CUDA graph.
        seq_lens
            int ``[B]`` on the host: sequence lengths (tokens), the newest token included.

        Returns
        -------
        torch.Tensor
            int64 ``[classes, B]`` on the host.

        Raises
        ------
        RuntimeError
            If rows and lengths cannot belong together: there are more rows than lengths, or a list would be empty.
        ValueError
            If the layers of a class have kept different numbers of cells (see :meth:`_shift`).
        """
        batch = seq_lens.shape[0]
        if len(rows) > batch:
            raise RuntimeError(f"{len(rows)} requests do not fit a decode batch of {batch}")
        shifts = [self._shift_of(row) for row in rows] + [self._intact] * (batch - len(rows))
        lengths = torch.tensor(shifts, dtype=torch.int64).view(batch, len(self.layers)).t() + seq_lens
        if batch and int(lengths.min()) < 1:
            raise RuntimeError(
                f"rows {list(rows)} with lengths {seq_lens.tolist()} are no batch of the ledger's requests"
            )
        return lengths

    def _shift_of(self, row: int) -> tuple[int, ...]:
        state = self.ledger.requests.get(row)
        if state is None:
            return self._intact
        known = self._known.get(row)
        if known is None or known[0] is not state.layout:  # a round, and a new request, makes a new layout
            known = self._known[row] = (state.layout, self._shift(state))
        return known[1]

    def _shift(self, state: RequestState) -> tuple[int, ...]:
        """Return, per class, by how much a list is longer than its sequence (never positive)."""
        base = state.layout.prefix - state.layout.tail
        for layers in self.layers:
            kept = {state.kept[layer] for layer in layers}
            if len(kept) > 1:
                raise ValueError(
                    f"layers {layers} share a length class, but request {state.rid} keeps {sorted(kept)} cells there; "
                    "lengths that differ per layer need the single-plan variant or the Triton backend"
                )
        return tuple(base + state.kept[layers[0]] for layers in self.layers)
