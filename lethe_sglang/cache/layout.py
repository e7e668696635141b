"""Packed blocks: pure index arithmetic, no tensors.

Vocabulary (docs/vocabulary.md): SGLang's slot ``b`` is a *block* of L cells, one a layer; *cell* ``(l, b)`` has the
flat index ``l * blocks + b``. The row of a request (its line of ``req_to_token``) is divided into

    [0 .. P)         prefix: intact in every layer, never moved. The radix tree owns its head; what the tree does not
                     own (a kept prompt after a retraction, or without a tree) is the request's until it ends
    [P .. P+m)       packed blocks: kept cells of all layers, densely
    [P+m .. T)       dead: entries are 0, blocks are free
    [T .. seq)       tail: recent tokens, intact in every layer, appended by SGLang's decode

P, m and T are multiples of the page size. Before its first round a request has m = 0 and T = P.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, "torch.Tensor")
Range = tuple[int, int]


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor`` rounded up."""
    return -(-value // divisor)


def page_ceil(length: int, page_size: int) -> int:
    """``length`` rounded up to whole pages."""
    return ceil_div(length, page_size) * page_size


def page_floor(length: int, page_size: int) -> int:
    """``length`` rounded down to whole pages."""
    return length // page_size * page_size


def packed_blocks(kept: Sequence[int], page_size: int) -> int:
    """Blocks that hold ``sum(kept)`` cells when packed densely over all layers, in whole pages."""
    return page_ceil(ceil_div(sum(kept), len(kept)), page_size)


def packed_offsets(kept: Sequence[int]) -> tuple[int, ...]:
    """``off_l``: packed cells of the layers below l. Cell q of layer l is number ``off_l + q``."""
    return (0, *accumulate(kept))[: len(kept)]


def packed_cell(number: Number, num_layers: int) -> tuple[Number, Number]:
    """Packed cell number -> (layer whose buffer holds it, block's position among the packed blocks).

    The numbering is also resolved where lists are made: ``kernels/common.py`` and ``kernels/triton/indices.py``.
    """
    return number % num_layers, number // num_layers


def protected(tree: int, prompt: int, page_size: int) -> tuple[int, int]:
    """Divide a request's protected positions into whole pages and the rest.

    Parameters
    ----------
    tree
        Positions whose blocks the radix tree owns (tokens, whole pages).
    prompt
        Positions that are kept as prompt, whoever owns their blocks; 0 where a prompt may be evicted (tokens).
    page_size
        Tokens.

    Returns
    -------
    tuple[int, int]
        P, which stays intact in every layer, and the kept tokens behind it, which are packed like other cells.
    """
    prefix = max(tree, page_floor(prompt, page_size))
    return prefix, max(prompt - prefix, 0)


def pinned_cells(prefix: int, rest: int, sinks: int, own_sinks: int) -> int:
    """First own cells that no round evicts: the prompt's rest, own sinks behind it, sinks that P does not cover."""
    return max(sinks - prefix, rest + own_sinks)


def request_bound(budget: int, interval: int, page_size: int) -> int:
    """Most blocks behind its prefix that a decoding request ever holds: mean budget + interval + 2 pages."""
    return budget + page_ceil(interval, page_size) + 2 * page_size


@dataclass(slots=True)
class RowLayout:
    """Who owns which positions of one row.

    Attributes
    ----------
    prefix
        P, protected positions: never candidates of a round, whoever owns their blocks.
    packed
        m, packed blocks (a page multiple).
    tail
        T, first position of the intact tail.
    """

    prefix: int
    packed: int
    tail: int

    @property
    def dead(self) -> Range:
        """Positions whose blocks went back to the allocator."""
        return self.prefix + self.packed, self.tail

    @property
    def dead_len(self) -> int:
        """Number of dead positions."""
        return self.tail - self.prefix - self.packed

    def live(self, ranges: Iterable[Range]) -> list[Range]:
        """``ranges`` less the dead positions; empty pieces are dropped."""
        start, end = self.dead
        if start < end:
            ranges = [piece for lo, hi in ranges for piece in ((lo, min(hi, start)), (max(lo, end), hi))]
        return [(lo, hi) for lo, hi in ranges if lo < hi]

    def check(self, page_size: int, num_layers: int, kept: Sequence[int], committed: int) -> None:
        """Raise if the layout contradicts itself.

        Raises
        ------
        AssertionError
            With the numbers.
        """
        where = f"{self} {kept=} {committed=} {page_size=}"
        assert all(x % page_size == 0 for x in (self.prefix, self.packed, self.tail)), f"not page multiples: {where}"
        assert self.prefix >= 0 and self.packed >= 0 and self.prefix + self.packed <= self.tail <= committed, where
        assert sum(kept) <= num_layers * self.packed, f"packed cells do not fit their blocks: {where}"
