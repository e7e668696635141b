"""What the ledger is told when a request arrives: when its first round comes, and what its prefill scores."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STAGGER_BY = 64
"""Last tokens of a prompt that say when its first round comes: that may not depend on what else is served."""


def stagger_of(prompt: Sequence[int]) -> int:
    """Return the stagger of a request from its prompt, token ids in any kind of sequence."""
    return zlib.crc32(np.asarray(prompt[-STAGGER_BY:], dtype=np.int64).tobytes())


class Observed(NamedTuple):
    """A request whose prefill ends in the batch that is being run and initialises its scores.

    Attributes
    ----------
    row
        Of ``req_to_token``.
    first
        First position that is scored.
    length
        Tokens of the sequence.
    start, end
        Its queries among the batch's tokens.
    """

    row: int
    first: int
    length: int
    start: int
    end: int
