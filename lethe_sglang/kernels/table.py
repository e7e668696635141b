"""Two tables of host numbers on the device, a line a request. Columns are named here only.

The *device table* says what decode has to know of a row of ``req_to_token``; the ledger writes its lines. The *round
table* says what a launch of rounds does to each of its requests. Torch reads columns with ``read``, and a Triton kernel
takes ``column`` as a constant. A line of zeros of the device table describes an intact row, so rows that nobody has
written yet (and padding) need no special case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NEVER = 2**31 - 1
"""As the first scored list position, or as a length at which something is due: it does not happen."""

Named = TypeVar("Named")


class Columns(Generic[Named]):
    """The columns of a table.

    Parameters
    ----------
    lines
        The named tuple of all columns that ``read`` returns.
    single, per_layer
        Their order: those of a request, then L columns of each of those that a request has in every layer.
    """

    def __init__(self, lines: type[Named], single: Sequence[str], per_layer: Sequence[str]) -> None:
        self.lines, self.single, self.per_layer = lines, tuple(single), tuple(per_layer)

    def width(self, num_layers: int) -> int:
        """Return the columns of a table of L layers."""
        return len(self.single) + len(self.per_layer) * num_layers

    def layers_of(self, table: torch.Tensor) -> int:
        """Return L.

        Raises
        ------
        ValueError
            If no number of layers has as many columns.
        """
        columns = int(table.shape[-1])
        num_layers = (columns - len(self.single)) // len(self.per_layer)
        if num_layers < 1 or columns != self.width(num_layers):
            raise ValueError(f"no table has {columns} columns: {len(self.single)} + {len(self.per_layer)} a layer")
        return num_layers

    def column(self, name: str, num_layers: int) -> int:
        """Return a column's number; of a column per layer, layer 0's."""
        if name in self.single:
            return self.single.index(name)
        return len(self.single) + self.per_layer.index(name) * num_layers

    def read(self, table: torch.Tensor) -> Named:
        """Return the columns of the table, or of lines of it, ``[..., columns]``."""
        single, layers = table.split((len(self.single), table.shape[-1] - len(self.single)), -1)
        values = dict(zip(self.single, single.unbind(-1), strict=True))
        return self.lines(**values, **dict(zip(self.per_layer, layers.chunk(len(self.per_layer), -1), strict=True)))

    def numbers(self, columns: Mapping[str, ArrayLike]) -> NDArray[np.int64]:
        """Return lines as host numbers, ``[B, columns]``, from columns by name, ``[B]`` and ``[B, L]``."""
        single = np.transpose([columns[name] for name in self.single])
        return np.concatenate((single, *(np.asarray(columns[name]) for name in self.per_layer)), axis=1)


class Spans(NamedTuple):
    """Where the parts of rows lie; see :class:`Lines`. int ``[B]``, ``kept``, ``excess`` and ``holes`` ``[B, L]``."""

    prefix: torch.Tensor
    packed: torch.Tensor
    tail: torch.Tensor
    kept: torch.Tensor
    excess: torch.Tensor
    holes: torch.Tensor


class Lines(NamedTuple):
    """Lines of the device table by name: int32 ``[...]``, those of every layer ``[..., L]``; views of a tensor's.

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


class Rounds(NamedTuple):
    """Lines of the round table by name: int32 ``[B]``, those of every layer ``[B, L]``.

    They are those of :class:`~lethe_sglang.cache.ledger.RoundPlan`, and these.

    Attributes
    ----------
    free_start
        Freed slots of the requests before this one.
    start
        Kept cells of the requests before this one, and of its layers before this one.
    old_excess, old_holes, excess, holes
        E_l and H_l before the round and after it.
    """

    row: torch.Tensor
    committed: torch.Tensor
    prefix: torch.Tensor
    pinned: torch.Tensor
    old_packed: torch.Tensor
    old_tail: torch.Tensor
    new_packed: torch.Tensor
    new_tail: torch.Tensor
    free_start: torch.Tensor
    old_kept: torch.Tensor
    old_excess: torch.Tensor
    old_holes: torch.Tensor
    kept: torch.Tensor
    excess: torch.Tensor
    holes: torch.Tensor
    start: torch.Tensor


DECODE = Columns(Lines, ("prefix", "packed", "tail", "score_from", "score_after"), ("kept", "excess", "holes"))
"""The device table."""

ROUND = Columns(Rounds, Rounds._fields[:9], Rounds._fields[9:])
"""The round table."""

width, layers_of, column, read, numbers = DECODE.width, DECODE.layers_of, DECODE.column, DECODE.read, DECODE.numbers
