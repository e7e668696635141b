"""Packed blocks: pure index arithmetic on the host, no tensors.

Vocabulary (docs/vocabulary.md): SGLang's slot ``b`` is a *block* of L cells, one a layer; *cell* ``(l, b)`` has the
flat index ``l * blocks + b``. The row of a request (its line of ``req_to_token``) is divided into

    [0 .. P)         prefix: intact in every layer, never moved. The radix tree owns its head; what the tree does not
                     own (a kept prompt after a retraction, or without a tree) is the request's until it ends
    [P .. P+m)       packed blocks: kept cells of all layers
    [P+m .. T)       dead: entries are 0, blocks are free
    [T .. seq)       tail: recent tokens, intact in every layer, appended by SGLang's decode

P, m and T are multiples of the page size. Before its first round a request has m = 0 and T = P.

A layer's kept cells lie in its own buffer first: cell q of layer l, ``q < min(k_l, m)``, in the block at ``P + q``.
What a layer keeps above m is its *excess*; it lies in *holes*, the cells at ``[k_l', m)`` of layers that keep less.
Both are numbered through the layers, ascending, and excess cell g lies in hole g. A layer without excess reads one list
of blocks, which depends on k_l alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

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


def packed_blocks(kept: Sequence[int], page_size: int, narrow: Sequence[bool]) -> int:
    """Return m: blocks that hold k_l cells of every layer, and all cells of a narrow layer in its own buffer.

    That is the mean of k_l, and no less than a narrow layer keeps, in whole pages.
    """
    largest = max((k for k, own in zip(kept, narrow, strict=True) if own), default=0)
    return page_ceil(max(ceil_div(sum(kept), len(kept)), largest), page_size)


def narrow_layers(budgets: Sequence[int]) -> tuple[bool, ...]:
    """Say which layers have at most the mean budget, rounded up: room for the mean holds all that they keep."""
    return tuple(budget <= ceil_div(sum(budgets), len(budgets)) for budget in budgets)


def offsets(kept: ArrayLike, packed: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``E_l`` and ``H_l``: excess cells, and holes, of the layers below l.

    Kept cell ``m + x`` of layer l is excess cell number ``E_l + x``; place ``k_l + y`` of its packed blocks is hole
    number ``H_l + y``.

    Parameters
    ----------
    kept
        k_l, int ``[..., L]``: of one request, or of several.
    packed
        m, int ``[...]``.

    Returns
    -------
    tuple
        Both int64 ``[..., L]``.
    """
    above = np.asarray(kept) - np.asarray(packed)[..., None]
    excess, holes = np.maximum(above, 0), np.maximum(-above, 0)
    return excess.cumsum(-1) - excess, holes.cumsum(-1) - holes


def packed_cell(kept: Sequence[int], packed: int, layer: int, cell: int) -> tuple[int, int]:
    """Return where kept cell q of a layer lies: the layer whose buffer holds it, and its place among the packed blocks.

    Lists and moves resolve the same for tensors: ``kernels/common.py``, ``kernels/triton/indices.py``.
    """
    if cell < packed:
        return layer, cell
    excess, holes = (numbers.tolist() for numbers in offsets(kept, packed))
    number = excess[layer] + cell - packed
    owner = bisect_right(holes, number) - 1
    return owner, kept[owner] + number - holes[owner]


@lru_cache(maxsize=1024)
def survivors(
    kept: tuple[int, ...],
    leaving: int,
    budgets: tuple[int, ...],
    packed: int,
    narrow: tuple[bool, ...],
    page_size: int,
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Count what a round does to one request; requests in step ask for the same.

    Parameters
    ----------
    kept, packed
        k_l and m before it.
    leaving
        Tokens that leave the recent window.
    budgets
        Most cells each layer keeps.
    narrow
        Layers that never have excess.
    page_size
        Tokens.

    Returns
    -------
    tuple
        The candidates of each layer; k_l and m after it.
    """
    candidates = tuple(k + leaving for k in kept)
    remain = tuple(map(min, budgets, candidates))
    # A layer that has excess from a configuration before may come to be narrow: there may be no room for it.
    own = [is_narrow and k <= packed for is_narrow, k in zip(narrow, kept, strict=True)]
    return candidates, remain, packed_blocks(remain, page_size, own)


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


def first_round(budgets: Sequence[int], recent: int, interval: int, page_size: int, prompt: int) -> int:
    """Return the least length at which a request may lose something (tokens): its first round, if nothing delays it.

    Parameters
    ----------
    budgets
        k_l of every layer.
    recent, interval, page_size
        R, the interval between rounds, and SGLang's page size (tokens).
    prompt
        Tokens of its prompt that are kept.
    """
    prefix, rest = protected(0, prompt, page_size)
    leaving = max(page_ceil(interval, page_size), min(budgets) + rest + 1)
    return prefix + page_ceil(leaving, page_size) + recent


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


class RoundPlan(NamedTuple):
    """What one round will do to one request. Host numbers only.

    ``candidates[l]`` of layer l's own cells are ranked and ``kept[l]`` (k_l) survive, the first ``pinned`` among them;
    ``packed`` and ``tail`` are m and T before the round (old) and after it (new).
    """

    committed: int
    row: int
    prefix: int
    old_packed: int
    old_tail: int
    new_packed: int
    new_tail: int
    old_kept: tuple[int, ...]
    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    pinned: int
