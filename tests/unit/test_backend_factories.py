"""The engine hands each backend what it needs: pool, ledger, the policy's rule, budgets, rows of the step."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from cache_model import MiniPool
from flashinfer_double import BUDGETS, LAYERS, SUM, Server, compare, ours, portable

from lethe_sglang.cache.phase import Phase
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels.table import NEVER, read
from lethe_sglang.policies.base import Accumulation

lifecycle = pytest.importorskip("lethe_sglang.engine.lifecycle")
runtime_module = pytest.importorskip("lethe_sglang.engine.runtime")


@pytest.fixture(params=["flashinfer", "triton", "torch_native", "fa3"])
def served(request, monkeypatch):
    """A server whose backend the engine's factory built, and its runtime; rows are named by the hook alone."""
    name, held = request.param, {}
    module = {"fa3": "flashattention"}.get(name, name)
    budgets = (11,) * LAYERS if name == "fa3" else BUDGETS
    monkeypatch.setitem(sys.modules, f"lethe_sglang.attention.{module}", getattr(ours, module))

    def attach(runner):
        return held["runtime"]

    monkeypatch.setattr(lifecycle, "attach", attach)

    def make(runner, world, rows):
        held["runtime"] = SimpleNamespace(
            pool=runner.token_to_kv_pool,
            ledger=world.ledger,
            policy=SimpleNamespace(accumulation=SUM),
            budgets=budgets,
            ranks=SimpleNamespace(size=1),
            config=SimpleNamespace(budget=SimpleNamespace(allocation="uniform")),
            step_rows=[],
            backends=[],
            length_classes=[],
            observers=[],
            monitor=SimpleNamespace(note=lambda batch: None),
        )
        monkeypatch.setattr(runtime_module, "_runtime", held["runtime"])
        return lifecycle.BACKENDS[name](runner)

    server = Server(make, budgets=budgets)
    run = server.run

    def through_the_hook(batch, inputs):
        name_rows(server.rows)
        return run(batch, inputs)

    server.run = through_the_hook
    return server, held["runtime"]


def name_rows(rows, decodes=True):
    mode = SimpleNamespace(is_decode=lambda: decodes)
    batch = SimpleNamespace(forward_mode=mode, req_pool_indices_cpu=torch.tensor(rows))
    result = SimpleNamespace(seq_lens_cpu=torch.tensor([7 + row for row in rows]))
    assert lifecycle.name_rows(result, object, batch, "a runner") is result


@pytest.mark.parametrize(
    ("config", "ranks", "says"),
    [
        ({"policy": "streaming"}, 1, []),
        ({"policy": "streaming"}, 2, ["--tp 1"]),
        ({"policy": "keydiff", "rounds": {"when": "pressure"}}, 1, ["rounds.when always"]),
        ({"policy": "h2o"}, 1, ["torch_native"]),
        ({"lethe": {"key_share": 0}}, 1, ["torch_native"]),
        ({}, 2, ["--tp 1", "lethe.key_share 0", "torch_native"]),
    ],
)
def test_only_what_no_gpu_has_run_is_warned_of(monkeypatch, caplog, config, ranks, says):
    config = from_mapping(config)
    ledger = SimpleNamespace(on_demand=config.rounds.when == "pressure")
    found = SimpleNamespace(ranks=SimpleNamespace(size=ranks), ledger=ledger, config=config, policy=config.built_policy)
    monkeypatch.setattr(lifecycle, "attach", lambda runner: found)
    with caplog.at_level("WARNING", "lethe_sglang"):
        assert lifecycle._attached_on_gpu("a runner") is found
    assert len(caplog.records) == bool(says)
    assert re.findall(r"\(([^()]*)\)", caplog.text.partition("run on a GPU")[2]) == [
        "--attention-backend torch_native" if part == "torch_native" else part for part in says
    ]


def test_a_backend_of_the_engine_decodes_as_the_portable_one(served):
    compare(served[0], Server(portable(), budgets=served[0].world.budgets), steps=18)


def test_a_backend_follows_the_policy(served):
    server, runtime = served
    rule = Accumulation(rule="max")
    assert runtime.backends == [server.backend]
    server.backend.accumulation = rule
    assert server.backend.accumulation is rule
    assert runtime.length_classes == ([] if server.backend.classes is None else [server.backend.classes])
    assert (server.backend.classes is None) == (type(server.backend).__name__ == "LetheTorchNativeBackend")


@pytest.mark.parametrize(("tree", "mode", "first"), [(0, "on", 8), (16, "on", 16), (16, "none", NEVER)])
def test_the_first_decode_step_scores_no_prefix(monkeypatch, tree, mode, first):
    """The ledger follows a request from its second step on; requests that share a prefix would all write its states."""
    runtime = runtime_module.Runtime(from_mapping({"budget": {"tokens": 64}}), (48,) * 3, 8, None)
    pool = MiniPool(page=8)
    runtime.ledger = pool.ledger
    monkeypatch.setattr(runtime_module, "_runtime", runtime)
    params = SimpleNamespace(custom_params={"kv_evict": "none"} if mode == "none" else None)
    req = SimpleNamespace(
        rid="r1",
        kv=SimpleNamespace(req_pool_idx=1, cache_protected_len=tree),
        origin_input_ids=[0] * 11,
        full_untruncated_fill_ids=[0] * 11,
        extend_len=11,
        extend_end=11,
        sampling_params=params,
        beam_group=None,
        skip_radix_cache_insert=False,
    )
    lifecycle.observe_prefill(SimpleNamespace(reqs=[req], tree_cache=SimpleNamespace(disable=False)))
    pool.ledger.flush()
    line = read(pool.ledger.table[1])
    assert int(line.score_from) == first
    assert int(pool.ledger.table[1].count_nonzero()) == 1, "the row is intact as before"
    pool.ledger.close([1, 2])
    pool.ledger.flush()
    assert not pool.ledger.table.any(), "the row's next request begins with nothing of this one"


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("policy", ["lethe", "gkv"])
def test_a_round_that_compiles_kernels_touches_nothing_that_anybody_reads(page, policy):
    config = from_mapping({"budget": {"tokens": 24}, "policy": policy})
    runtime, pool = runtime_module.Runtime(config, (16,) * 3, page, None), MiniPool(page=page)
    pool.admit(1, 50, 0, (9, 9, 9))
    runtime.ledger, runtime.req_to_token = pool.ledger, pool.req_to_token
    runtime.pool = SimpleNamespace(cells=pool.cells, scratch=None)
    rows = pool.req_to_token.clone()
    before = {name: buffer.clone() for name, buffer in pool.cells.buffers.items()}
    runtime.warm_up()
    assert torch.equal(pool.req_to_token, rows)
    for name, buffer in pool.cells.buffers.items():
        assert torch.equal(*(x.view(3, pool.cells.blocks, -1)[:, page:] for x in (buffer, before[name])))
    assert set(pool.ledger.requests) == {1} and runtime.counters.launches == 0
    assert not torch.equal(pool.cells.position, before["position"]), "nothing was run"


def test_prefills_are_observed_at_their_last_chunk_alone(monkeypatch):
    """Named on the host when the batch is prepared: a replayed prefill names its rows on the device only."""
    config = from_mapping({"budget": {"tokens": 64}, "retain": {"prompt": "evict"}})
    runtime = runtime_module.Runtime(config, (48,) * 3, 8, None)
    pool = MiniPool(page=8)
    runtime.ledger = pool.ledger
    monkeypatch.setattr(runtime_module, "_runtime", runtime)

    def request(row, prompt, done, now, private=True):
        return SimpleNamespace(
            rid=f"r{row}",
            kv=SimpleNamespace(req_pool_idx=row, cache_protected_len=8),
            origin_input_ids=[0] * prompt,
            full_untruncated_fill_ids=[0] * prompt,
            extend_len=now,
            extend_end=done + now,
            sampling_params=SimpleNamespace(custom_params=None),
            beam_group=None,
            skip_radix_cache_insert=private,
        )

    requests = [request(1, 60, 8, 20), request(2, 60, 40, 20), request(3, 30, 8, 22, False), request(4, 17, 8, 9)]
    lifecycle.observe_prefill(SimpleNamespace(reqs=requests, tree_cache=SimpleNamespace(disable=False)))
    assert pool.ledger.observed == [(2, 8, 60, 20, 40), (4, 8, 17, 62, 71)]
    lifecycle.observe_prefill(SimpleNamespace(reqs=requests[:1], tree_cache=SimpleNamespace(disable=False)))
    assert pool.ledger.observed == [], "one batch's prefills cost the next one nothing"


def test_rows_are_those_of_the_last_decode_batch(monkeypatch):
    steps = []
    phase = SimpleNamespace(by_length=True, advance=lambda lengths, new: steps.append((lengths, new)))
    runtime = SimpleNamespace(step_rows=[], ledger=SimpleNamespace(phase=phase, requests={2: "followed"}))
    noted = []
    runtime.monitor = SimpleNamespace(note=noted.append)
    monkeypatch.setattr(runtime_module, "_runtime", runtime)
    name_rows([4, 2])
    assert runtime.step_rows == [4, 2]
    name_rows([9], decodes=False)
    assert runtime.step_rows == [], "a prefill plans no lists"
    assert len(noted) == 2, "the quality signal sees the first token of a reply, too"
    name_rows([4, 1])
    assert steps == [([11, 9], False), ([11, 8], True)], "no prefill is counted, and a batch that nobody follows is new"


def test_steps_that_are_not_scored_have_graphs_of_their_own(monkeypatch):
    phase = Phase()
    monkeypatch.setattr(runtime_module, "_runtime", SimpleNamespace(ledger=SimpleNamespace(phase=phase)))
    assert lifecycle.graph_variants("stock's", "a configuration") == "stock's"
    phase.configure(2, by_length=False)
    variants = lifecycle.graph_variants(None, "a configuration")
    assert [*variants.capture_labels] == ["plain", "scored"]
    found = []
    for _ in range(3):
        found.append(variants.select("a batch"))
        phase.advance((), new=False)
    assert found == ["scored", "plain", "scored"]


@pytest.mark.parametrize(("section", "every"), [({"score_every": 3}, 3), ({}, 1)])
def test_the_runtime_starts_the_phase_of_its_policy(section, every):
    config = from_mapping({"lethe": section})
    runtime = runtime_module.Runtime(config, (1024,) * 2, 1, 4096, deterministic=True)
    runtime.attach(SimpleNamespace(cells=None, device="cpu"), torch.zeros(3, 8, dtype=torch.int32))
    assert (runtime.ledger.phase.every, runtime.ledger.phase.by_length) == (every, True)


def test_the_runtime_binds_to_a_pool_once(monkeypatch):
    """SGLang builds one backend for prefill and one for decode where they differ; both must see one ledger."""
    runtime = runtime_module.Runtime(from_mapping({}), (1024,) * 2, 1, 4096)
    pool, rows = SimpleNamespace(cells=None, device="cpu"), torch.zeros(3, 8, dtype=torch.int32)
    runtime.attach(pool, rows)
    ledger = runtime.ledger
    runtime.attach(pool, rows)
    assert runtime.ledger is ledger
    runtime.attach(SimpleNamespace(cells=None, device="cpu"), rows)
    assert runtime.ledger is not ledger
