"""Observers are shown what each backend's attention reads, in every layer.

Steps that a graph replays are seen on whole servers only (``tests/engine``).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flashinfer_double import LAYERS, Server, portable
from test_flashattention_backend import ALIKE, flash
from test_flashinfer_backend import flashinfer
from test_triton_backend import triton

from lethe_bench.observers.shadow import Shadow, ShadowMismatch
from lethe_sglang.observers.base import Observer
from lethe_sglang.policies.lethe import LethePolicy

ROWS = (1, 2, 3, 4, 5, 6)
EQUAL = (9,) * LAYERS
MADE = {
    "flashinfer": flashinfer(),
    "flashinfer-equal": flashinfer(budgets=EQUAL),
    "flashinfer-single": flashinfer(single=True),
    "fa3": flash(),
    "triton": triton(),
    "triton-apart": triton(budgets=None),
    "torch_native": portable(),
}
KERNELS = [name for name in MADE if name not in ("fa3", "torch_native")]
"""Backends whose lists a kernel fills."""


def serve(name, page=1):
    server = Server(MADE[name], page=page, **({"budgets": ALIKE} if name == "fa3" else {}))
    if name == "flashinfer-equal":
        for row, length in zip(ROWS[:-1], (30, 33, 25, 21, 28), strict=True):
            server.world.admit(row, length, 8, EQUAL)
        server.world.write(6, 0)
    else:
        server.admit()
    return server


def watch(name, steps, page=1):
    """A server that has decoded with a shadow, which saw the prefills, and had rounds."""
    server = serve(name, page)
    world, rounds = server.world, 0
    shadow = Shadow(world.cells, world.ledger, world.req_to_token)
    server.backend.observers = [shadow]
    prefilled = torch.tensor([world.seq[row] for row in ROWS])
    for layer in range(LAYERS):
        shadow.on_extend_layer(layer, SimpleNamespace(req_pool_indices=torch.tensor(ROWS), seq_lens=prefilled))
    for _ in range(steps):
        rounds += len(world.due())
        server.step(ROWS, LethePolicy())
    assert rounds >= 3
    return server, shadow


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("page", [1, 8])
def test_all_cells_of_all_layers_are_compared(name, page):
    server, shadow = watch(name, 10, page)
    assert shadow.checks == 10 * LAYERS * 5
    before = shadow.cells
    server.step(ROWS[:5], LethePolicy())
    assert shadow.cells - before == int(server.world.lists(list(ROWS[:5])).length.sum()), "prefixes and own cells"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layer", [0, 1], ids=["narrow", "wide"])
@pytest.mark.parametrize("place", [2, 20], ids=["prefix", "own"])
def test_a_list_with_one_index_off_by_one_is_noticed(name, layer, place):
    server, _ = watch(name, 4)
    scored, fill = server.backend.scored, server.backend.scored.kernels.fill_lists

    def off(batch, which, blocks, lists, fill_indptr):
        fill(batch, which, blocks, lists, fill_indptr)
        if which == layer or name == "flashinfer-equal":
            lists.indices[int(lists.indptr[1]) + place] += 1

    scored.kernels = SimpleNamespace(**{**vars(scored.kernels.kernels), "fill_lists": off})
    with pytest.raises(ShadowMismatch, match=r"rows \[2\] layer \d"):
        server.step(ROWS, LethePolicy())


@pytest.mark.parametrize("page", [1, 8])
def test_a_page_table_with_one_page_off_by_one_is_noticed(page):
    server, _ = watch("fa3", 20, page)
    kernels = server.backend.scored.kernels.kernels

    def off(batch, page_size, lengths, pages):
        kernels.fill_pages(batch, page_size, lengths, pages)
        pages[1, 1] += 1

    server.backend.scored.kernels = SimpleNamespace(**{**vars(kernels), "fill_pages": off})
    with pytest.raises(ShadowMismatch, match=r"rows \[2.* layer \d"):
        server.step(ROWS, LethePolicy())


class Seen(Observer):
    def __init__(self):
        self.layers, self.weights = [], set()

    def on_decode_layer(self, layer, forward_batch, cells, length, attention):
        self.layers.append(layer)
        self.weights.add(None if attention is None else attention.shape[:2])


@pytest.mark.parametrize("name", MADE)
def test_every_observer_sees_every_layer_and_weights_where_there_are_some(name):
    server = serve(name)
    server.backend.observers = [Seen(), Seen()]
    server.step(ROWS[:3], LethePolicy())
    for seen in server.backend.observers:
        assert seen.layers == list(range(LAYERS))
        assert seen.weights == ({(3, 6)} if name == "torch_native" else {None})
