"""The share of a full pool: pure arithmetic on the host.

A round takes a request's own blocks down to what its layers may keep. Under pressure that is its *share*, one number T
for all running requests, but never less than the request's own budget, its floor (water-filling)::

    the largest T such that  sum_i gain_i(T) >= needed,
    gain_i(T) = max(0, most_i - page_ceil(max(T, floor_i) + rest_i))

so that whoever holds most gives, and a request below the share gives nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lethe_sglang.cache.layout import RoundPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Claim(NamedTuple):
    """What a request holds that a round could take, and what it may keep.

    Attributes
    ----------
    most
        Blocks that a round which keeps nothing would free: packed ones, and those that have left the recent window.
    floor
        K of its own budget: mean tokens that a layer keeps besides the recent window.
    rest
        Tokens of the kept prompt behind the prefix, which come on top of any share.
    """

    most: int
    floor: int
    rest: int


def gains(claims: Sequence[Claim], share: int, page_size: int) -> NDArray[np.int64]:
    """Return the blocks that each request gives at a share of ``share`` tokens besides the recent window.

    It is what a round frees where all layers keep alike; layers that differ may keep less by what their budgets are
    rounded down by, or more where one that shares its list keeps more than the mean.
    """
    most, floor, rest = np.array(claims, dtype=np.int64).reshape(-1, 3).T
    keep = -(-(np.maximum(floor, share) + rest) // page_size) * page_size
    given: NDArray[np.int64] = np.maximum(most - keep, 0)
    return given


def share_of(claims: Sequence[Claim], needed: int, page_size: int) -> int:
    """Return the largest share, in tokens besides the recent window, at which ``needed`` blocks are given; 0 if none.

    Parameters
    ----------
    claims
        The running requests that can give.
    needed
        Blocks.
    page_size
        Tokens.
    """
    low, high = 0, max((claim.most for claim in claims), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if gains(claims, middle, page_size).sum() >= needed:
            low = middle
        else:
            high = middle - 1
    return low


def freed(plan: RoundPlan) -> int:
    """Blocks that a planned round gives back."""
    return plan.old_packed + plan.new_tail - plan.old_tail - plan.new_packed
