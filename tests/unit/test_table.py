"""The device table is read by name: with its columns in another order, everything that reads or writes it agrees."""

from __future__ import annotations

import pytest
import torch
from cache_model import MiniPool
from flashinfer_double import BUDGETS, SUM, Server, ours, portable

from lethe_bench.observers.shadow import Shadow
from lethe_sglang.kernels import table
from lethe_sglang.policies.lethe import LethePolicy

RULE = SUM._replace(window=5)
PERMUTED = (("score_after", "packed", "prefix", "tail", "score_from"), ("holes", "kept", "excess"))


@pytest.fixture
def permuted(monkeypatch):
    def permute():
        monkeypatch.setattr(table.DECODE, "single", PERMUTED[0])
        monkeypatch.setattr(table.DECODE, "per_layer", PERMUTED[1])
        monkeypatch.setattr(table.ROUND, "single", table.ROUND.single[::-1])
        monkeypatch.setattr(table.ROUND, "per_layer", table.ROUND.per_layer[::-1])

    return permute


def flashinfer(single):
    def make(runner, world, rows):
        pool = runner.token_to_kv_pool
        return ours.flashinfer.LetheFlashInferBackend(
            runner, pool, world.ledger, RULE, BUDGETS, rows, single_plan=single
        )

    return make


def triton(runner, world, rows):
    return ours.triton.LetheTritonBackend(runner, runner.token_to_kv_pool, world.ledger, RULE, BUDGETS)


def drive(make, graph=False):
    """Outputs, scores and rows of some steps, rounds in between."""
    server = Server(make, window=RULE.window)
    if graph:
        server.capture()
    server.admit()
    outputs = [server.step([(1, 2, 3, 4, 5, 6), (2, 3, 5)][n % 2], LethePolicy()) for n in range(12)]
    assert sum(s.rounds for s in server.world.ledger.requests.values()) >= 4
    scores = server.world.cells.score.view(len(BUDGETS), -1)[:, 1:]
    return [*(layer for step in outputs for layer in step), scores, server.world.req_to_token]


def test_every_column_has_one_place():
    single, per_layer = table.DECODE.single, table.DECODE.per_layer
    assert sorted(PERMUTED[0]) == sorted(single) and sorted(PERMUTED[1]) == sorted(per_layer)
    for columns in (table.DECODE, table.ROUND):
        assert {*columns.single, *columns.per_layer} == {*columns.lines._fields}
    single = {name: n for n, name in enumerate(single, 10)}
    per_layer = {"kept": (1, 2, 3), "excess": (4, 5, 6), "holes": (7, 8, 9)}
    columns = {name: [value] for name, value in (single | per_layer).items()}
    line = torch.from_numpy(table.numbers(columns)[0])
    assert len(line) == table.width(3) and table.layers_of(line) == 3
    read = table.read(line)
    assert {name: int(getattr(read, name)) for name in single} == single
    assert {name: tuple(getattr(read, name).tolist()) for name in per_layer} == per_layer
    for name in (*single, *per_layer):
        assert int(line[table.column(name, 3)]) == int(getattr(read, name).flatten()[0])


def test_a_table_of_no_number_of_layers_is_refused():
    for columns in (table.width(0), table.width(2) + 1):
        with pytest.raises(ValueError, match=f"no table has {columns} columns"):
            table.layers_of(torch.zeros(3, columns))


@pytest.mark.parametrize(
    ("make", "graph"),
    [
        (portable(RULE), False),
        (triton, False),
        (triton, True),
        (flashinfer(False), True),
        (flashinfer(True), True),
    ],
    ids=["portable", "triton", "triton-graph", "flashinfer-classes", "flashinfer-single"],
)
def test_backends_decode_alike_whatever_the_order_of_the_columns(make, graph, permuted):
    expected = drive(make, graph)
    permuted()
    assert all(torch.equal(a, b) for a, b in zip(drive(make, graph), expected, strict=True))


def test_the_shadow_finds_its_cells_whatever_the_order_of_the_columns(permuted):
    permuted()
    pool = MiniPool()
    shadow = Shadow(pool.cells, pool.ledger, pool.req_to_token)
    state = pool.admit(1, 50, 8, (9, 4, 14))
    batch = type("Batch", (), {"req_pool_indices": torch.tensor([1]), "seq_lens": torch.tensor([50])})
    for layer in range(3):
        shadow.on_extend_layer(layer, batch)
    pool.round([state], LethePolicy())
    pool.append(1)
    batch.seq_lens = torch.tensor([51])
    lists = pool.lists([1])
    for layer in range(3):
        shadow.on_decode_layer(layer, batch, lists.cells[layer], lists.length[layer], torch.empty(0))
    assert shadow.checks == 3
