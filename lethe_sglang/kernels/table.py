"""The device table: what decode has to know of a row of ``req_to_token``, a line each. Columns are named here only.

The ledger writes the lines, torch reads them with :func:`read`, and a Triton kernel takes :func:`column` as a constant.
A line of zeros describes an intact row, so rows that nobody has written yet (and padding) need no special case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

NEVER = 2**31 - 1
"""As the first scored list position, or as a length at which something is due: it does not happen."""

SINGLE = ("prefix", "packed", "tail", "score_from", "score_after")
PER_LAYER = ("kept", "excess", "holes")
"""The order of the columns: those of a request, then L columns of each of those that a request has in every layer."""


class Spans(NamedTuple):
    """Where the parts of rows lie; see :class:`Lines`. int ``[B]``, ``kept``, ``excess`` and ``holes`` ``[B, L]``."""

    prefix: torch.Tensor
    packed: torch.Tensor
    tail: torch.Tensor
    kept: torch.Tensor
    excess: torch.Tensor
    holes: torch.Tensor


class Lines(NamedTuple):
    """Lines of the table by name: int32 ``[...]``, those of every layer ``[..., L]``. Views, where it was a tensor.

    Attributes
    ----------
    prefix
        P: positions in front that are intact in every layer.
    packed
        m: packed blocks.
    tail
        T: first position of the intact tail.
    score_from
        First list position that is scored; ``NEVER`` for a request that is not evicted from.
    score_after
        Sequence length (tokens) after which steps are scored, for a policy with a window.
    kept
        k_l: packed cells of each layer.
    excess, holes
        E_l and H_l: numbers of each layer's first excess cell and first hole (``cache/layout.py``).
    """

    prefix: torch.Tensor
    packed: torch.Tensor
    tail: torch.Tensor
    score_from: torch.Tensor
    score_after: torch.Tensor
    kept: torch.Tensor
    excess: torch.Tensor
    holes: torch.Tensor

    @property
    def spans(self) -> Spans:
        """What a list follows from."""
        return Spans(self.prefix, self.packed, self.tail, self.kept, self.excess, self.holes)

    def length(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Return the tokens on each list, ``[..., L]``, of sequences of ``seq_lens`` tokens: ``P + k_l + seq - T``."""
        return (self.prefix + seq_lens - self.tail).unsqueeze(-1) + self.kept


def width(num_layers: int) -> int:
    """Return the columns of a table of L layers."""
    return len(SINGLE) + len(PER_LAYER) * num_layers


def layers_of(table: torch.Tensor) -> int:
    """Return L.

    Raises
    ------
    ValueError
        If no number of layers has as many columns.
    """
    columns = int(table.shape[-1])
    num_layers = (columns - len(SINGLE)) // len(PER_LAYER)
    if num_layers < 1 or columns != width(num_layers):
        raise ValueError(f"no table has {columns} columns: {len(SINGLE)} + {len(PER_LAYER)} a layer")
    return num_layers


def column(name: str, num_layers: int) -> int:
    """Return a column's number; of a column per layer, layer 0's."""
    if name in SINGLE:
        return SINGLE.index(name)
    return len(SINGLE) + PER_LAYER.index(name) * num_layers


def read(table: torch.Tensor) -> Lines:
    """Return the columns of the table, or of lines of it, ``[..., columns]``."""
    single, layers = table.split((len(SINGLE), table.shape[-1] - len(SINGLE)), -1)
    per_layer = layers.chunk(len(PER_LAYER), -1)
    return Lines(**dict(zip(SINGLE, single.unbind(-1), strict=True)), **dict(zip(PER_LAYER, per_layer, strict=True)))


def line(single: Mapping[str, int], per_layer: Mapping[str, Sequence[int]]) -> list[int]:
    """Return one line as host numbers, from its columns by name."""
    return [*(single[name] for name in SINGLE), *(number for name in PER_LAYER for number in per_layer[name])]
