"""``debug.kept_hash``: ranks that keep different tokens stop the server instead of drifting apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lethe_bench.observers.kept import KeptSets


@pytest.fixture
def record():
    """Record one round on rank 0 of two, the other of which has kept ``theirs`` in layer 1."""

    def run(theirs):
        state, plan = SimpleNamespace(rid="r", rounds=1, rest=0), SimpleNamespace(kept=(2, 2), new_tail=9, prefix=0)
        other = KeptSets(log=False, compare=True, gather=lambda mine: [mine])
        other.on_round([state], [plan], SimpleNamespace(kept_position=torch.tensor([3, 5, *theirs])))
        digest = torch.tensor(list(other.hash.digest()[:8]), dtype=torch.uint8)
        mine = KeptSets(log=False, compare=True, gather=lambda mine: [mine, digest])
        mine.on_round([state], [plan], SimpleNamespace(kept_position=torch.tensor([3, 5, 4, 6])))

    return run


def test_ranks_that_agree_go_on(record):
    record([4, 6])


def test_ranks_that_differ_stop_and_name_their_hashes(record):
    with pytest.raises(RuntimeError, match=r"ranks kept different tokens in launch 1: hashes (\w{16}), (?!\1)\w{16}"):
        record([4, 7])
