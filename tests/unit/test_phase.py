"""Every n-th step is scored: when, with what, and what the other steps cost."""

from __future__ import annotations

import pytest
import torch
from flashinfer_double import (
    BUDGETS,
    LAYERS,
    SUM,
    GraphRunner,
    Server,
    compare,
    launches_of_a_step,
    meta,
    ours,
)
from flashinfer_double import portable as portable_backend

from lethe_sglang.cache.phase import Phase
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.kernels.table import NEVER
from lethe_sglang.policies.base import Accumulation
from lethe_sglang.policies.lethe import LethePolicy

RECURRENCE = Accumulation(rule="recurrence", threshold=0.03, every=3)
ROWS = (1, 2, 3, 4, 5, 6)


def flashinfer(rule, single=False, budgets=BUDGETS):
    def make(runner, world, rows):
        pool, backend = runner.token_to_kv_pool, ours.flashinfer.LetheFlashInferBackend
        return backend(runner, pool, world.ledger, rule, budgets, rows, single_plan=single)

    return make


def triton(rule, budgets=BUDGETS):
    def make(runner, world, rows):
        return ours.triton.LetheTritonBackend(runner, runner.token_to_kv_pool, world.ledger, rule, budgets)

    return make


def flash(rule):
    def make(runner, world, rows):
        backend = ours.flashattention.LetheFlashAttentionBackend
        return backend(runner, runner.token_to_kv_pool, world.ledger, rule, world.budgets)

    return make


BACKENDS = {
    "fa3": flash,
    "flashinfer": flashinfer,
    "single plan": lambda rule: flashinfer(rule, single=True),
    "triton": triton,
    "triton apart": lambda rule: triton(rule, budgets=None),
}
UNIFORM = {"fa3": {"budgets": (11,) * LAYERS}}
"""What a server of some backends needs."""


# -- when -------------------------------------------------------------------------------------------------------------


def scored(phase, steps):
    found = []
    for lengths, new in steps:
        phase.advance(lengths, new)
        found.append(phase.scores)
    return found


def test_all_requests_of_a_batch_are_scored_at_each_nth_step_since_it_was_new():
    phase = Phase()
    phase.configure(3, by_length=False)
    assert phase.scores, "nothing is known before the first step"
    assert scored(phase, [((), True)] + [((), False)] * 7) == [False, False, True] * 2 + [False, False]
    assert scored(phase, [((), True)] + [((), False)] * 2) == [False, False, True], "a new batch has a phase of its own"


def test_a_live_change_of_something_else_leaves_the_phase_alone():
    """It would leave tokens unstarted for longer than n steps, with the scores of those who had their cells before."""
    server = Server(portable_backend(SUM._replace(every=4)), every=4)
    server.admit()
    for number in range(16):
        server.step((1,), LethePolicy())
        if number % 3 == 1:
            server.world.ledger.phase.configure(4, by_length=False)
    cells = server.world.lists([1]).cells[:, 0, : int(server.world.lists([1]).length[:, 0].min()) - 3]
    assert float(server.world.cells.score[cells.long()].max()) < 9, "scores of others"


def test_another_n_starts_a_phase():
    phase = Phase()
    phase.configure(3, by_length=False)
    phase.advance((), new=False)
    assert not phase.scores
    phase.configure(5, by_length=False)
    assert phase.scores and phase.every == 5


def test_every_step_is_scored_by_default():
    assert scored(Phase(), [((5,), True), ((6,), False), ((7, 1), False)]) == [True] * 3


def test_under_deterministic_inference_the_phase_is_that_of_each_length():
    phase = Phase()
    phase.configure(3, by_length=True)
    steps = [((7, 8), True), ((8, 9), False), ((9, 10), False), ((10, 11), False)]
    assert scored(phase, steps) == [False, True, True, False]


def test_a_window_is_never_in_phase():
    assert Accumulation(every=4).in_phase == 4
    assert Accumulation(every=4, window=8).in_phase == 1


def test_no_token_may_leave_the_recent_window_unscored():
    sections = {"budget": {"tokens": 20}, "retain": {"recent_ratio": 0.3}, "policy": "lethe"}
    assert from_mapping({**sections, "lethe": {"score_every": 6}}).recent == 6
    with pytest.raises(ConfigError, match=r"lethe.score_every: got 7, .*the largest legal value is 6 with these"):
        from_mapping({**sections, "lethe": {"score_every": 7}})


# -- with what --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_scored_step_counts_n_steps_of_decay_and_starts_what_was_written_since(ahead):
    """Equation 5 at each third step, by the attention of that step, which a decay of 0 leaves alone in S."""
    mine = Server(portable_backend(SUM._replace(every=3)), every=3)
    attention = Server(portable_backend(SUM._replace(decay=0.0)))
    for server in (mine, attention):
        server.world.admit(1, 30, 8, (99,) * LAYERS)
        server.prefilled()
        own = server.world.req_to_token[1, 8:30].long()
        server.world.cells.score.view(LAYERS, -1)[:, own] = 0.25
    expected = {position: torch.full((LAYERS,), 0.25) for position in range(8, 30)}
    for _ in range(ahead):
        mine.world.ledger.phase.advance((), new=False)
    for number in range(1 + ahead, 10 + ahead):
        for server in (mine, attention):
            server.step((1,), LethePolicy())
        if number % 3:
            continue
        length = mine.world.seq[1]
        slots = attention.world.req_to_token[1, :length].long()
        seen = attention.world.cells.score.view(LAYERS, -1)[:, slots]
        for position in range(8, length):
            expected[position] = 0.9**3 * expected.get(position, torch.zeros(LAYERS)) + seen[:, position]
        found = mine.world.cells.score.view(LAYERS, -1)[:, mine.world.req_to_token[1, 8:length].long()]
        torch.testing.assert_close(found, torch.stack([expected[p] for p in range(8, length)], 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by_length", [False, True], ids=["batch", "length"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rule", [SUM._replace(every=3), RECURRENCE], ids=["sum", "recurrence"])
def test_outputs_and_scores_equal_the_portable_backend(name, graph, by_length, rule):
    options = {"every": 3, "by_length": by_length, **UNIFORM.get(name, {})}
    mine, reference = Server(BACKENDS[name](rule), **options), Server(portable_backend(rule), **options)
    if graph:
        mine.capture()
    compare(mine, reference, steps=18)


def test_whatever_a_request_has_written_starts_before_its_own_next_scored_step():
    server = Server(portable_backend(SUM._replace(every=3)), every=3, by_length=True)
    for row, length in ((1, 30), (2, 31), (3, 32)):
        server.world.admit(row, length, 8, (99,) * LAYERS)
    server.prefilled()
    for _ in range(9):
        server.step((1, 2, 3), LethePolicy())
    for row in (1, 2, 3):
        slots = server.world.req_to_token[row, 30 : server.world.seq[row] // 3 * 3].long()
        assert float(server.world.cells.score.view(LAYERS, -1)[:, slots].max()) < 9, f"garbage of others in row {row}"


@pytest.mark.parametrize(("by_length", "equal"), [(True, True), (False, False)], ids=["length", "batch"])
def test_under_deterministic_inference_scores_do_not_depend_on_who_came_before(by_length, equal):
    def states(before):
        server = Server(portable_backend(SUM._replace(every=4)), every=4, by_length=by_length)
        server.admit()
        for number in range(before + 9):
            server.step((2, 5) if number < before else (1, 2, 5), LethePolicy())
        slots = server.world.req_to_token[1, :30].long()
        return server.world.cells.score.view(LAYERS, -1)[:, slots]

    assert torch.allclose(states(0), states(1), rtol=1e-5, atol=1e-7) is equal


# -- what the others cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fills"),
    [
        (lambda rule: flashinfer(rule, budgets=(9,) * LAYERS), {None: ["fill_slots"]}),
        (flashinfer, {None: ["fill_slots"], 1: ["fill_cells"], 3: ["fill_cells"], 4: ["fill_cells"]}),
        (lambda rule: triton(rule, (9,) * LAYERS), {None: ["fill_slots with indptr"]}),
    ],
    ids=["flashinfer uniform", "flashinfer classes", "triton uniform"],
)
def test_a_step_that_is_not_scored_launches_the_fill_of_lists_alone(make, fills, monkeypatch):
    server = Server(make(SUM._replace(every=3)), every=3)
    backend = server.backend
    GraphRunner(backend, backend.scored.ledger)
    metadata = backend.forward_metadata
    metadata.__dict__.update(meta(vars(metadata)))
    for wrapper in getattr(metadata, "decode_wrappers", ()):
        wrapper.__dict__.update(meta(vars(wrapper)))
        wrapper.run = lambda q, *args: q
    backend.decode_attention_fwd = lambda *args, **options: None
    backend.scored.ledger.phase.advance((), True)
    expected = list(fills[None])
    for layer in range(LAYERS):
        expected += ["store", *fills.get(layer, ())]
    assert launches_of_a_step(backend, monkeypatch) == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_size_has_a_graph_for_scored_steps_and_one_for_the_others(name):
    server = Server(BACKENDS[name](SUM._replace(every=3)), every=3, **UNIFORM.get(name, {}))
    server.capture(sizes=(2, 8))
    assert set(server.graphs.captured) == {(size, variant) for size in (2, 8) for variant in ("plain", "scored")}
    for size in (2, 8) * name.startswith(("flashinfer", "single")):
        plain, scored = (server.graphs.captured[size, variant][2].decode_wrappers for variant in ("plain", "scored"))
        assert plain == scored, "a step has one plan, whichever variant is replayed"
    server.admit()
    replayed, run = [], server.graphs.run
    server.graphs.run = lambda size, variant: replayed.append(variant) or run(size, variant)
    for _ in range(6):
        server.step(ROWS, LethePolicy())
    assert replayed == ["plain", "plain", "scored"] * 2 or replayed == ["scored", "plain", "plain"] * 2
    assert int(server.backend.scored.first.min()) < NEVER
