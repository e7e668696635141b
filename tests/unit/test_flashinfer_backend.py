"""FlashInfer decode equals the portable backend's, in outputs and scores; plans, lists and addresses are as they must.

FlashInfer is a double with its plan/run contract (``flashinfer_double.py``); no kernel of it runs here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flashinfer_double import (
    BASE,
    BUDGETS,
    CONTEXT,
    FLASHINFER,
    LAYERS,
    STREAM,
    SUM,
    BatchDecodeWithPagedKVCacheWrapper,
    Event,
    GraphRunner,
    Mode,
    Server,
    World,
    attributes,
    compare,
    compare_scaled,
    drain,
    fast_decode_plan,
    forward_batch,
    launches_of_a_step,
    make_layer,
    meta,
    ours,
    parameters,
    portable,
    same_states,
    step_inputs,
)

from lethe_sglang.allocation.budgets import scale
from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.cache.arrivals import Observed
from lethe_sglang.config import from_mapping
from lethe_sglang.policies.base import Accumulation
from lethe_sglang.policies.lethe import LethePolicy

CLASSES = (0, 1, 0, 2, 1)
NARROW = (0, 2)
"""Layers of ``BUDGETS`` at or under its mean."""
VARIANTS = [(graph, single) for graph in (False, True) for single in (False, True)]
NAMES = [f"{'graph' if graph else 'eager'}-{'single' if single else 'classes'}" for graph, single in VARIANTS]


def flashinfer(accumulation=SUM, budgets=BUDGETS, single=False):
    def make(runner, world, rows):
        pool = runner.token_to_kv_pool
        return ours.flashinfer.LetheFlashInferBackend(
            runner, pool, world.ledger, accumulation, budgets, rows, single_plan=single
        )

    return make


@pytest.mark.parametrize(("graph", "single"), VARIANTS, ids=NAMES)
@pytest.mark.parametrize("page", [1, 8])
def test_outputs_and_scores_equal_the_portable_backend(graph, single, page):
    mine, reference = Server(flashinfer(single=single), page=page), Server(portable(), page=page)
    if graph:
        mine.capture()
    compare(mine, reference)


@pytest.mark.parametrize(
    "rule",
    [
        SUM._replace(every=3),
        SUM._replace(window=5),
        SUM._replace(rule="max"),
        Accumulation(rule="recurrence", threshold=0.03),
    ],
    ids=["every", "window", "max", "recurrence"],
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_every_rule_scores_as_the_portable_backend(rule, graph):
    options = {"window": rule.window}
    mine, reference = Server(flashinfer(rule), **options), Server(portable(rule), **options)
    if graph:
        mine.capture()
    compare(mine, reference, steps=18)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_policy_that_scores_nothing_asks_for_no_log_sum_exp(graph):
    mine, reference = Server(flashinfer(None)), Server(portable(None))
    if graph:
        mine.capture()
    compare(mine, reference, steps=18)
    assert not any(wrapper.with_lse for wrapper in mine.backend.forward_metadata.decode_wrappers)


def test_deterministic_mode_plans_as_stock_does():
    mine, reference = Server(flashinfer(), deterministic=True), Server(portable())
    compare(mine, reference, steps=18)  # eager: fixed splits, on tensor cores
    assert all(wrapper.use_tensor_cores for wrapper in mine.backend.decode_wrappers)
    mine = Server(flashinfer(), deterministic=True)
    mine.capture()
    mine.admit()
    mine.step((1, 2), LethePolicy())
    words = [w._int_workspace_buffer.view(torch.int32) for w in mine.backend.decode_cuda_graph_metadata[2]]
    assert all(int(word[2]) == 1 for word in words), "captured graphs must not split"


# -- plans and lists --------------------------------------------------------------------------------------------------


def driven(single=False, steps=9):
    server = Server(flashinfer(single=single))
    server.capture()
    server.admit()
    for _ in range(steps):
        server.step((1, 2, 3, 4, 5, 6), LethePolicy())
    return server


def test_one_plan_a_class_and_step_with_the_lists_own_lengths():
    server = driven()
    wrappers = server.backend.decode_cuda_graph_metadata[8]
    assert len(wrappers) == 3 and server.backend.classes.of_layer == CLASSES
    before = [len(wrapper.planned) for wrapper in wrappers]
    server.step((1, 2, 3, 4, 5, 6), LethePolicy())
    assert [len(wrapper.planned) for wrapper in wrappers] == [n + 1 for n in before]
    for layer, number in enumerate(CLASSES):
        lists = server.world.lists([1, 2, 3, 4, 5, 6])
        planned = torch.tensor(wrappers[number].planned[-1]).diff()
        assert planned.tolist() == [*lists.length[layer].tolist(), 1, 1], "padded rows have one token"
        assert wrappers[number]._paged_kv_indptr_buf.tolist() == wrappers[number].planned[-1]
    lengths = [tuple(wrapper.planned[-1]) for wrapper in wrappers]
    assert len(set(lengths)) == 3, "the budgets do not bite: the test says nothing"


def test_the_single_plan_never_splits_and_needs_no_lengths_of_ours():
    server = driven(single=True)
    (wrapper,) = server.backend.decode_cuda_graph_metadata[8]
    assert wrapper.use_tensor_cores
    assert wrapper._int_workspace_buffer.view(torch.int32)[2] == 1
    lists = server.world.lists([1, 2, 3, 4, 5, 6])
    last = lists.length[LAYERS - 1].tolist()
    assert wrapper._paged_kv_indptr_buf.diff().tolist() == [*last, 1, 1], "the last layer's own indptr"


def test_lists_are_filled_for_the_layer_that_runs():
    server, seen = driven(), []
    run = BatchDecodeWithPagedKVCacheWrapper.run

    def note(self, *args):
        seen.append(self._paged_kv_indices_buf[: int(self._paged_kv_indptr_buf[-1])].clone())
        return run(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchDecodeWithPagedKVCacheWrapper, "run", note)
        server.step((1, 2, 3, 4, 5, 6), LethePolicy())
    lists, blocks = server.world.lists([1, 2, 3, 4, 5, 6]), server.world.cells.blocks
    for layer, indices in enumerate(seen):
        cells = [lists.cells[layer, b, : int(n)] for b, n in enumerate(lists.length[layer])]
        padding = torch.full((2,), layer * blocks)
        base = layer * blocks if layer in NARROW else 0
        assert torch.equal(indices.long() + base, torch.cat([*cells, padding])), f"layer {layer}"


@pytest.mark.parametrize("single", [False, True], ids=["classes", "single"])
def test_captured_addresses_stay_and_classes_share_only_what_they_may(single):
    server = Server(flashinfer(single=single))
    server.capture()
    captured = server.backend.decode_cuda_graph_metadata
    before = {size: [w.addresses() for w in wrappers] for size, wrappers in captured.items()}
    server.admit()
    for number in range(12):
        server.step([(1, 2, 3, 4, 5, 6), (2, 3, 5), (1,)][number % 3], LethePolicy())
    assert {size: [w.addresses() for w in wrappers] for size, wrappers in captured.items()} == before
    for addresses in before.values():
        indptr, indices, _, workspace, floats = zip(*addresses, strict=True)
        assert [indices.index(i) for i in indices] == ([0] if single else [0, 1, 1]) and len(set(floats)) == 1
        assert len(set(indptr)) == len(set(workspace)) == len(addresses), "classes do not share lengths or plans"
    by_class = zip(*before.values(), strict=True)
    assert all(len({addresses[3] for addresses in sizes}) == 1 for sizes in by_class), "sizes share a class's workspace"


def test_rows_of_indptr_are_aligned_alike():
    backend = Server(flashinfer()).backend
    assert {row.data_ptr() % 16 for row in backend.class_indptr} == {0} and backend.class_indptr.shape[1] >= 17


def test_integer_workspaces_are_small_and_staged_apart():
    backend = Server(flashinfer()).backend
    assert all(w._int_workspace_buffer.numel() == 2**20 for w in backend.decode_wrappers)
    staging = [buffer for one in backend.planner.staging for buffer in one.buffers]
    assert len({buffer.data_ptr() for buffer in staging}) == 9, "plans under way must not overwrite each other"
    assert all(buffer.numel() == 2**20 for buffer in staging)


@pytest.mark.parametrize("ahead", [2, 3, 7])
def test_a_plan_is_not_overwritten_before_the_device_has_it(ahead):
    """Under overlap the host plans on, while copies wait behind what runs on the device."""
    server = Server(flashinfer())
    for staging in server.backend.planner.staging:
        staging.module = SimpleNamespace(Event=Event)
    server.capture(sizes=(4,))
    server.admit()
    for _ in range(9):
        server.step((1, 2, 3), LethePolicy())
    drain()
    for _ in range(ahead):
        seq_lens = server.world.decode_batch(server.rows).seq_lens.tolist()
        server.backend.init_forward_metadata_out_graph(forward_batch([*server.rows, 0], [*seq_lens, 1], [0] * 4))
    assert len(STREAM) >= 2 * len(server.backend.planner.staging), "the device is not behind: the test says nothing"
    drain()


def test_a_capture_plans_its_dummy_batch_whatever_is_running():
    server = Server(flashinfer())
    server.admit()
    for _ in range(6):
        server.step((1, 2, 3), LethePolicy())
    server.capture()
    assert server.backend.decode_cuda_graph_metadata[4][0].planned == [[0, 1, 2, 3, 4]]


def test_classes_are_the_same_for_every_request_and_say_what_they_can_serve():
    world = World()
    classes = LengthClasses((4, 4, 8, 9), world.ledger)
    assert classes.of_layer == (0, 0, 1, 2) and classes.layers == ((0, 1), (2,), (3,))
    assert classes.narrow == (True, False, False) and classes.buffer_of == (0, 1, 1)
    assert LengthClasses((3, 4, 5, 20), world.ledger).buffer_of == (0, 1, 2, 3)
    assert LengthClasses((5, 5, 5, 5), world.ledger).buffer_of == (0,)
    assert LengthClasses((100, 100, 50, 150), world.ledger).serve((101, 101, 50, 151)), "rounding is no change"
    many = LengthClasses((1, 2, 2, 3, 4, 4, 5, 60, 60), world.ledger)
    assert many.narrow == (True, True, False, True, False, False), "buffers are few, for the classes of most layers"
    assert many.buffer_of == (0, 1, 3, 2, 3, 3)
    assert classes.serve((7, 7, 7, 7)) and classes.serve((3, 3, 9, 1)) and not classes.serve((4, 5, 8, 9))
    assert not classes.serve((9, 9, 3, 1)), "a narrow class above the mean would have excess, and its list cannot"
    for mean in range(4, 40):
        other = scale(BUDGETS, mean, 3)
        owned = [{other[layer] for layer in layers} for layers in LengthClasses(BUDGETS, world.ledger).layers]
        assert all(len(kept) == 1 for kept in owned)


def test_a_round_that_layers_could_not_share_a_list_after_is_refused():
    world = World()
    classes, state = LengthClasses((4, 4, 8, 9), world.ledger), world.admit(1, 40, 0, (4, 4, 8, 9, 9))
    plan = world.ledger.plan(state, 40, state.budgets)
    classes.check(plan._replace(kept=(4, 4, 8, 9)))
    for kept, packed in (((4, 5, 8, 9), 20), ((7, 7, 8, 9), 6)):
        with pytest.raises(RuntimeError, match=r"layers \(0, 1\) share a list and keep"):
            classes.check(plan._replace(kept=kept, new_packed=packed))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_lengths_that_differ_within_a_class_are_refused_but_by_the_single_plan():
    def run(single):
        server = Server(flashinfer(single=single))
        server.world.admit(1, 40, 0, BUDGETS)
        state = server.world.ledger.requests[1]
        server.world.round([state], LethePolicy(), budgets={1: (5, 12, 6, 20, 12)})  # as breakpoint allocation does
        return server.step((1,), LethePolicy())

    run(single=True)
    with pytest.raises(ValueError, match=r"layers \(0, 2\) share a length class, but request r1 keeps \[5, 6\]"):
        run(single=False)


def test_rows_that_are_not_the_batch_are_refused():
    server = Server(flashinfer())
    server.admit()
    for _ in range(6):
        server.step((1, 2), LethePolicy())
    batch = forward_batch([4, 1], [3, 4], [0, 0])  # lengths of others than the rows named
    server.rows = [1, 2]
    with pytest.raises(RuntimeError, match="no batch of the ledger's requests"):
        server.backend.init_forward_metadata(batch)
    server.rows = [1, 2, 3]
    with pytest.raises(RuntimeError, match="3 requests do not fit a decode batch of 2"):
        server.backend.init_forward_metadata(batch)
    batch.seq_lens_cpu = None
    with pytest.raises(RuntimeError, match="host lengths"):
        server.backend.init_forward_metadata(batch)


@pytest.mark.parametrize("what", [{"logit_cap": 30.0}, {"xai_temperature_len": 8}])
def test_logits_that_the_score_does_not_know_are_refused(what):
    server = Server(flashinfer())
    server.admit()
    server.layers[1] = make_layer(1, **what)
    with pytest.raises(ValueError, match=r"layer 1 .* its logits"):
        server.step((1,), LethePolicy())


def test_attention_that_is_not_full_is_refused():
    stock = ours.flashinfer.LetheFlashInferBackend.__mro__[2]
    for name, value in (("num_wrappers", 2), ("decode_uses_dequant_workspace", True)):
        init = stock.__init__

        def windowed(self, runner, init=init, name=name, value=value):
            init(self, runner)
            setattr(self, name, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock, "__init__", windowed)
            with pytest.raises(ValueError, match="needs full attention"):
                Server(flashinfer())


# -- the seams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_scaled_keys_and_values_reach_attention_and_score(graph):
    compare_scaled(Server(flashinfer()), graph)


@pytest.mark.parametrize(
    ("make", "dtype", "policy"),
    [(flashinfer(), torch.float8_e5m2, "lethe"), (portable(), torch.float8_e4m3fn, "keydiff")],
    ids=["flashinfer", "portable"],
)
@pytest.mark.proves("fp8 KV cache")
def test_an_fp8_cache_is_moved_as_bytes_and_read_in_its_type(make, dtype, policy):
    mine, reference = Server(make, stored=dtype), Server(portable(), rounded=dtype)
    compare(mine, reference, policy=from_mapping({"policy": policy}).built_policy)


def test_prefill_starts_states_and_observed_prompts_are_scored():
    servers = [Server(flashinfer()), Server(portable())]
    for server in servers:
        world = server.world
        for row in (6, 7):
            for position in range(20):
                world.write(row, position)
        world.ledger.observed = [Observed(row=7, first=4, length=20, start=15, end=27)]
        slots = torch.cat([world.req_to_token[6, 5:20], world.req_to_token[7, 8:20]]).long()
        batch = forward_batch(
            [6, 7],
            [20, 20],
            [],
            forward_mode=Mode.EXTEND,
            out_cache_loc=slots,
            positions=torch.arange(27),
        )
        begin = server.backend.scored.begin if server is servers[0] else server.backend.init_forward_metadata
        begin(batch)
        assert bool((world.cells.score.view(LAYERS, -1)[:, slots] == 0).all())
        assert bool((world.cells.memory.view(LAYERS, -1)[:, slots] == 0).all())
        for layer, (q, _, _) in zip(server.layers, step_inputs([7] * 27, range(27)), strict=True):
            assert server.backend.forward_extend(q, None, None, layer, batch) == "stock extend"
    same_states(servers[0].world, servers[1].world)
    scored = servers[0].world.cells.score.view(LAYERS, -1)[:, servers[0].world.req_to_token[7, :20].long()]
    assert bool((scored[:, 4:] > 0).all())


def test_a_replayed_prefill_starts_states_out_of_its_graph():
    server = Server(flashinfer())
    seen = []
    server.backend.scored.begin = lambda batch: seen.append(batch.forward_mode)
    stock = type(server.backend).__mro__[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "init_forward_metadata_out_graph", lambda self, batch, in_capture=False: None)
        for mode in (Mode.EXTEND, Mode.DECODE, Mode.IDLE):
            server.backend.init_forward_metadata_out_graph(forward_batch([1], [3], [0], forward_mode=mode))
    assert seen == [Mode.EXTEND]


def test_shared_reads_end_at_the_graphs_head_unless_a_layer_has_its_own_list():
    backend = Server(flashinfer()).backend
    ends = ours.scored.SharedReadEnds
    assert backend.shared_read_ends(Mode.DECODE) is ends.POST_REPLAY
    assert backend.shared_read_ends(Mode.EXTEND) is ends.UNKNOWN
    uniform = Server(flashinfer(budgets=(9,) * LAYERS)).backend
    assert uniform.shared_read_ends(Mode.DECODE) is ends.IN_REPLAY
    assert Server(flashinfer(single=True)).backend.shared_read_ends(Mode.DECODE) is ends.POST_REPLAY


def test_another_policy_reaches_the_score():
    backend = Server(flashinfer()).backend
    rule = Accumulation(decay=0.5)
    backend.accumulation = rule
    assert backend.accumulation is rule and backend.scored.accumulation is rule


@pytest.mark.parametrize(
    ("budgets", "single", "wide"),
    [((9,) * LAYERS, False, ()), (BUDGETS, False, (1, 3, 4)), (BUDGETS, True, range(LAYERS))],
    ids=["uniform", "classes", "single"],
)
def test_a_step_launches_no_more_than_it_must_and_reads_nothing_back(budgets, single, wide, monkeypatch):
    backend = Server(flashinfer(budgets=budgets, single=single)).backend
    GraphRunner(backend, backend.scored.ledger)
    for wrapper in backend.forward_metadata.decode_wrappers:
        wrapper.__dict__.update(meta(vars(wrapper)))
        wrapper.run = lambda q, *args: (q, q.new_empty(q.shape[:2]))
    expected = ["start_states", "schedule", *(() if single else ["fill_slots"])]
    for layer in range(LAYERS):
        fill = ["fill_cells with indptr" if single else "fill_cells"] * (layer in wide)
        expected += ["store", *fill, "score"]
    assert launches_of_a_step(backend, monkeypatch) == expected


def takes(function):
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def test_the_doubles_take_what_the_installed_flashinfer_takes():
    wrapper = BatchDecodeWithPagedKVCacheWrapper
    name = wrapper.__name__
    pairs = [
        (wrapper.__init__, f"{name}.__init__"),
        (wrapper.plan, f"{name}._plan_impl"),
        (wrapper.forward, f"{name}.forward"),
        (wrapper.forward_return_lse, f"{name}.forward_return_lse"),
        (wrapper.reset_workspace_buffer, f"{name}.reset_workspace_buffer"),
        (fast_decode_plan, "fast_decode_plan"),
    ]
    for double, real in pairs:
        assert set(takes(double)) <= set(parameters("flashinfer", "decode.py", real)), real


def test_overrides_take_what_sglang_passes_and_its_double_sets_what_it_sets():
    update = "FlashInferIndicesUpdaterDecode.update"
    assert set(takes(ours.flashinfer.ClassPlanner.update)) == set(parameters("sglang", FLASHINFER, update))
    backend, name = ours.flashinfer.LetheFlashInferBackend, "FlashInferAttnBackend"
    for method in ("forward_decode", "_create_decode_wrappers"):
        assert takes(getattr(backend, method)) == parameters("sglang", FLASHINFER, f"{name}.{method}")
    for method in ("init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"):
        assert takes(getattr(backend, method)) == parameters("sglang", BASE, f"AttentionBackend.{method}")
    stock, instance = backend.__mro__[2], Server(flashinfer()).backend
    assert stock.__name__ == name
    assert {n for n in stock.__init__.__code__.co_names if n in vars(instance)} <= attributes(FLASHINFER, name)


def test_lists_never_outgrow_stocks_index_buffer():
    server = driven(steps=14)
    for wrapper in server.backend.decode_cuda_graph_metadata[8]:
        assert all(end <= 8 * CONTEXT for *_, end in wrapper.planned)
    for state in server.world.ledger.requests.values():
        assert max(state.kept) <= state.layout.tail - state.layout.prefix, "a list may not outgrow its sequence"
