"""The shadow notices every cell that is not what was written at its position."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cache_model import MiniPool

from lethe_bench.observers.kept import KeptSets
from lethe_bench.observers.shadow import Shadow, ShadowMismatch
from lethe_sglang.config import ConfigError
from lethe_sglang.observers import base
from lethe_sglang.observers.base import installed
from lethe_sglang.policies.lethe import LethePolicy

PREFIX, PROMPT = 8, 50


class Watched:
    """Two requests over a few rounds, with a shadow that follows their prefill and every step."""

    def __init__(self, page):
        self.pool = MiniPool(page=page)
        self.shadow = Shadow(self.pool.cells, self.pool.ledger, self.pool.req_to_token)
        self.states = [self.pool.admit(row, PROMPT + row, PREFIX, (9, 4, 14)) for row in (1, 2)]
        for layer in range(self.pool.num_layers):
            self.shadow.on_extend_layer(layer, self.batch([1, 2]))

    def batch(self, rows):
        lengths = [self.pool.seq.get(row, 1) for row in rows]
        return SimpleNamespace(req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lengths))

    def step(self):
        due = [s for s in self.states if self.pool.seq[s.row] >= s.due_at]
        if due:
            self.pool.round(due, LethePolicy())
        for state in self.states:
            self.pool.append(state.row)
        self.check()

    def check(self):
        lists, pad = self.pool.lists([1, 2]), torch.nn.functional.pad  # the batch begins with a row of padding
        for layer in range(self.pool.num_layers):
            cells, length = pad(lists.cells[layer], (0, 0, 1, 0)), pad(lists.length[layer], (1, 0), value=1)
            self.shadow.on_decode_layer(layer, self.batch([0, 1, 2]), cells, length, torch.empty(0))


@pytest.fixture(params=[1, 8])
def watched(request):
    found = Watched(request.param)
    for _ in range(40):
        found.step()
    assert min(s.rounds for s in found.states) >= 2
    return found


def test_right_cells_pass_and_are_counted(watched):
    assert watched.shadow.checks == 2 * 3 * 40 and watched.shadow.cells > 4000


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("place", [PREFIX, -1], ids=["packed", "tail"])
def test_one_wrong_number_in_one_cell_is_noticed(watched, name, place):
    watched.pool.append(1)
    watched.pool.append(2)
    watched.check()
    lists = watched.pool.lists([1, 2])
    cells = lists.cells[1, 1, : int(lists.length[1, 1])]
    cell = cells[PREFIX] if place == PREFIX else cells[-2]  # the newest token is copied before it is compared
    getattr(watched.pool.cells, name)[cell, 0, 1] += 1
    with pytest.raises(ShadowMismatch, match=rf"rows \[2\] layer 1 {name}: positions \[\d+\] differ"):
        watched.check()


def test_a_cell_that_is_read_twice_is_noticed(watched):
    watched.pool.append(1)
    watched.pool.append(2)
    first, second = watched.pool.lists([1, 2]).cells[2, 0, PREFIX : PREFIX + 2]
    for buffer in watched.pool.cells.buffers.values():
        buffer[int(first)] = buffer[int(second)]
    with pytest.raises(ShadowMismatch, match=r"rows \[1\] layer 2: a position twice"):
        watched.check()


def test_a_row_that_is_freed_leaves_its_place_to_another(watched):
    places = set(watched.shadow.places.values())
    watched.shadow.on_close([1, 7])
    assert set(watched.shadow.places) == {2}
    assert len(places) == 2 and set(watched.shadow.free) >= places - set(watched.shadow.places.values())


@pytest.mark.parametrize(
    ("name", "option", "kind"), [("shadow", "debug.shadow", Shadow), ("kept", "debug.kept_hash", KeptSets)]
)
def test_a_server_finds_the_test_aids_by_name_and_says_which_option_asks_for_a_missing_one(
    name, option, kind, monkeypatch
):
    assert installed(name, option) is kind
    monkeypatch.setattr(base, "entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match=f"^{option}: the observer '{name}' .* is not installed; write false$"):
        installed(name, option)
