"""The kernels of a round leave what their references leave: rows, freed slots, cells, states and kept positions."""

from __future__ import annotations

import pytest
import torch
from cache_model import MiniPool

from lethe_sglang.cache import rounds
from lethe_sglang.cache.layout import narrow_layers
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels import reference, table
from lethe_sglang.kernels.common import Candidate
from lethe_sglang.kernels.triton import config, launchers
from lethe_sglang.kernels.triton import rounds as kernels

BUDGETS = [(12, 12, 12), (5, 20, 11), (30, 3, 3), (2, 25, 26)]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for kernel in (kernels._GATHER, kernels._REWRITE, kernels._PLACE):
            patch.setattr(kernel, "configs", [config(BLOCK=32)])
        yield


class Recorded:
    """Kernels whose calls are kept with their results."""

    def __init__(self, module):
        self.module, self.results = module, []

    def __getattr__(self, name):
        kernel = getattr(self.module, name)

        def call(*args):
            result = kernel(*args)
            if name in ("gather", "rewrite_rows", "place", "select"):
                given = result if isinstance(result, tuple) else (result,)
                self.results.append((name, [x if x is None else x.cpu().clone() for x in given]))
            return result

        return call


class Pool(MiniPool):
    """Keys of a request are so far from alike that no rounding changes their order."""

    def write(self, row, position):
        super().write(row, position)
        slot = int(self.req_to_token[row, position])
        for layer in range(self.num_layers):
            self.cells.key[layer * self.cells.blocks + slot, 0, 3] = 100 * self.score(row, layer, position)


def drive(module, patch, device, page, budgets, policy, prompt=0, narrow=True, changed=None):
    """Rounds of three requests in two pools' worth of steps; returns everything they leave."""
    used = Recorded(module)
    patch.setattr(rounds, "kernels_for", lambda where: used)
    pool = Pool(page=page, narrow=narrow_layers(budgets) if narrow else None)
    pool.cells.score[0] = 9  # what lies behind a layer's candidates reads the padding's, which is anything
    if device.type != "cpu":
        pool.req_to_token = pool.req_to_token.to(device)
        tensors = {name: buffer.to(device) for name, buffer in pool.cells.buffers.items()}
        pool.cells = pool.cells._replace(**tensors)
        pool.ledger.table = pool.ledger.table.to(device)
    policy = from_mapping({"policy": policy}).built_policy
    states = [pool.admit(row, 37 + 9 * row, 8 * (row - 1), budgets, prompt=prompt) for row in (1, 2, 3)]
    left = []
    for _ in range(26):
        due = [s for s in states if pool.seq[s.row] >= s.due_at]
        if due:
            pool.round(due, policy, budgets=changed and {s.row: changed[s.rounds % 2] for s in states})
            left += [pool.req_to_token.cpu().clone(), *(x.cpu().clone() for x in pool.cells.buffers.values())]
        for state in states:
            pool.append(state.row)
    assert min(s.rounds for s in states) >= 2
    return used.results, left


def compare(device, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        expected, rows = drive(reference, patch, torch.device("cpu"), *args, **options)
        found, left = drive(launchers, patch, device, *args, **options)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, mine), (_, theirs) in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and name == "place" and b.is_floating_point():
                torch.testing.assert_close(a, b)  # sums
            elif a is not None:
                assert torch.equal(a.to(b.dtype), b), name
    assert all(torch.equal(a, b) for a, b in zip(left, rows, strict=True))


@pytest.mark.parametrize(
    ("page", "budgets", "policy"),
    [(1, BUDGETS[0], "h2o"), (1, BUDGETS[1], "h2o"), (1, BUDGETS[3], "h2o"), (8, BUDGETS[2], "lethe")],
)
def test_a_round_is_the_references(device, page, budgets, policy):
    compare(device, page, budgets, policy)


@pytest.mark.parametrize("policy", ["gkv", "streaming"])
def test_states_that_are_made_anew_are_written(device, policy):
    compare(device, 1, BUDGETS[1], policy)


def test_a_prompts_rest_is_pinned_and_budgets_may_change(device):
    compare(device, 8, BUDGETS[0], "h2o", prompt=29)
    compare(device, 1, BUDGETS[0], "h2o", narrow=False, changed=[(9, 4, 17), (20, 8, 3)])


def test_states_may_be_missing(device):
    """A pool without scores, positions or memory moves keys and values alone."""
    pool = MiniPool()
    state = pool.admit(1, 60, 0, (9, 9, 9))
    (plan,) = [pool.ledger.plan(state, 60, state.budgets)]
    cells = pool.cells._replace(score=None, position=None, memory=None)
    lines, extent = rounds.tables_of([plan], torch.device("cpu"))
    lines, rows = lines.to(device), pool.req_to_token.to(device)
    bare = cells._replace(key=cells.key.to(device), value=cells.value.to(device))
    candidate = launchers.gather(rows, lines, bare, extent)
    assert candidate[2:] == (None, None, None)
    keep = candidate.valid & (torch.arange(extent.candidates, device=device) % 6 == 0)
    assert int(keep.sum()) == extent.kept
    assert launchers.place(rows, lines, candidate, keep, bare, extent)[2:] == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, 9)}, "req_to_token must be int32"),
        ({"lines": torch.zeros(1, 9, dtype=torch.int32)}, "9 columns"),
        ({"lines": torch.zeros(1, table.ROUND.width(4), dtype=torch.int32)}, "4 layers, the pool 3"),
        ({"blocks": 2**30}, "32 bits"),
        ({"keep": torch.zeros(3, 1, 5, dtype=torch.bool)}, "keep must be bool of shape"),
        ({"cells": torch.zeros(3, 1, 5)}, "cells must be int32 or int64"),
    ],
)
def test_bad_shapes_are_named(change, message):
    pool = MiniPool()
    state = pool.admit(1, 60, 0, (9, 9, 9))
    lines, extent = rounds.tables_of([pool.ledger.plan(state, 60, state.budgets)], torch.device("cpu"))
    good = torch.zeros(3, 1, extent.candidates, dtype=torch.int32)
    candidate = Candidate(change.get("cells", good), good.bool(), None, None, None)
    cells = pool.cells._replace(blocks=change.get("blocks", pool.cells.blocks))
    rows, lines = change.get("rows", pool.req_to_token), change.get("lines", lines)
    with pytest.raises(ValueError, match=message):
        launchers.place(rows, lines, candidate, change.get("keep", good.bool()), cells, extent)
    with pytest.raises(ValueError, match=message if {"rows", "lines"} & {*change} else "."):
        launchers.gather(rows, lines, cells, extent)
        raise ValueError("gather takes what place does not look at")
