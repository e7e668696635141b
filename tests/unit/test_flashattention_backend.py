"""FlashAttention decode equals the portable backend's, in outputs and scores; pages and addresses are as they must.

The kernel is a double that reads page table and lengths when it runs (``flashattention_on_cpu``); all around it, its
call included, is SGLang's own.
"""

from __future__ import annotations

import pytest
import torch
from flashinfer_double import (
    BASE,
    CONTEXT,
    FLASHATTENTION,
    LAYERS,
    SUM,
    GraphRunner,
    Mode,
    Server,
    attributes,
    compare,
    compare_scaled,
    forward_batch,
    launches_of_a_step,
    make_layer,
    meta,
    ours,
    paged,
    parameters,
    portable,
)

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.cache.layout import page_ceil, request_bound
from lethe_sglang.kernels.table import read
from lethe_sglang.policies.base import Accumulation
from lethe_sglang.policies.lethe import LethePolicy

ALIKE = (11,) * LAYERS
GRAPH = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
PAGES = pytest.mark.parametrize("page", [1, 8, 16])
KERNEL = "flash_attn_with_kvcache"


def flash(accumulation=SUM, budgets=ALIKE):
    def make(runner, world, rows):
        pool = runner.token_to_kv_pool
        return ours.flashattention.LetheFlashAttentionBackend(runner, pool, world.ledger, accumulation, budgets)

    return make


def server(accumulation=SUM, graph=False, **options):
    made = Server(flash(accumulation), budgets=ALIKE, **options)
    if graph:
        made.capture()
    return made


def reference(accumulation=SUM, **options):
    return Server(portable(accumulation), budgets=ALIKE, **options)


@GRAPH
@PAGES
def test_outputs_and_scores_equal_the_portable_backend(graph, page):
    mine = server(graph=graph, page=page)
    assert mine.world.ledger.multiple == page
    compare(mine, reference(page=page), steps=70 if page == 16 else 38)


@pytest.mark.parametrize(
    "rule",
    [SUM._replace(every=3), SUM._replace(window=5), Accumulation(rule="recurrence", threshold=0.03)],
    ids=["every", "window", "recurrence"],
)
@GRAPH
def test_every_rule_scores_as_the_portable_backend(rule, graph):
    options = {"window": rule.window, "page": 8}
    compare(server(rule, graph, **options), reference(rule, **options), steps=26)


@GRAPH
def test_a_policy_that_scores_nothing_fills_pages_alone(graph, monkeypatch):
    asked, kernel = [], paged.flash_attn_with_kvcache
    monkeypatch.setattr(paged, KERNEL, lambda *a, **o: asked.append(o["return_softmax_lse"]) or kernel(*a, **o))
    mine = server(None, graph)
    monkeypatch.setattr(mine.backend.scored.kernels.kernels, "fill_lists", None)
    compare(mine, reference(None), steps=18)
    assert asked and not any(asked) and len(mine.backend._graph_indices) == 0


def test_deterministic_mode_does_not_split():
    splits, kernel = [], paged.flash_attn_with_kvcache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, KERNEL, lambda *a, **o: splits.append(o["num_splits"]) or kernel(*a, **o))
        for graph in (False, True):
            compare(server(graph=graph, deterministic=True), reference(), steps=18)
    assert set(splits) == {1}


# -- pages ------------------------------------------------------------------------------------------------------------


def driven(page, graph=True, steps=21):
    made = server(graph=graph, page=page)
    made.admit()
    for _ in range(steps):
        made.step((1, 2, 3, 4, 5, 6), LethePolicy())
    return made


@GRAPH
@PAGES
def test_pages_are_those_of_the_packed_row(page, graph):
    made = driven(page, graph)
    metadata, world = made.backend.forward_metadata, made.world
    lists = world.lists([1, 2, 3, 4, 5, 6])
    lengths = lists.length[0].tolist()
    assert metadata.cache_seqlens_int32.tolist() == lengths + [1, 1] * graph
    assert lengths[0] < world.seq[1] - 5, "nothing is evicted: the test says nothing"
    for b, length in enumerate(lengths):
        first = lists.cells[0, b, :length:page]
        assert metadata.page_table[b, : -(-length // page)].tolist() == (first // page).tolist()
    assert metadata.page_table[6:, 0].tolist() == [0, 0] * graph, "padded rows read the padding page"
    assert graph or metadata.page_table.shape[1] == -(-max(world.seq.values()) // page)


def test_captured_addresses_stay_and_batches_share_them():
    made = server(graph=True, page=8)
    sizes = (2, 4, 8)
    at = [made.backend.decode_cuda_graph_metadata[size] for size in sizes]
    before = [(m.page_table.data_ptr(), m.cache_seqlens_int32.data_ptr(), m.page_table.shape[1]) for m in at]
    seen, kernel = set(), paged.flash_attn_with_kvcache

    def note(*args, page_table, cache_seqlens, scheduler_metadata, **options):
        seen.add((page_table.data_ptr(), cache_seqlens.data_ptr(), page_table.shape[1]))
        assert scheduler_metadata.data_ptr() == made.backend._sched_meta_buf.data_ptr()
        assert int(scheduler_metadata[0]) == CONTEXT, "a replay is bounded by the context, whatever was captured"
        return kernel(
            *args, page_table=page_table, cache_seqlens=cache_seqlens, scheduler_metadata=scheduler_metadata, **options
        )

    made.admit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, KERNEL, note)
        for number in range(12):
            made.step([(1, 2, 3, 4, 5, 6), (2, 3, 5), (1,)][number % 3], LethePolicy())
    assert seen == set(before) and before[0][2] == CONTEXT // 8


@PAGES
def test_kept_cells_are_whole_pages_at_no_more_blocks(page):
    made = server(page=page)
    made.admit()
    world, bound = made.world, request_bound(ALIKE[0] + world_recent(made), 8, page)
    rounds = 0
    for _ in range(60):
        rounds += len(world.due())
        made.step((1, 2, 3), LethePolicy())
        for row in (1, 2, 3):
            state = world.ledger.requests[row]
            assert set(state.kept) <= {min(page_ceil(ALIKE[0], page), state.layout.packed)}
            assert state.layout.packed in (0, page_ceil(ALIKE[0], page)), "as many blocks as without whole pages"
            held = page_ceil(world.seq[row], page) - state.layout.prefix - state.layout.dead_len
            assert state.rounds == 0 or held <= bound
    assert rounds >= 9


def world_recent(made):
    return made.world.ledger.recent


def test_first_rounds_and_renewed_budgets_keep_whole_pages_and_the_bound():
    """Prompts that are kept end inside a page; a budget changes while the request runs."""
    made = server(page=16)
    world, ledger = made.world, made.world.ledger
    for position in range(5):
        world.write(1, position)
    state = ledger.open("r1", 1, 0, ALIKE, 5, rest=5, pinned=5)
    assert state.budgets == (16,) * LAYERS, "11 and the 5 tokens of the prompt"
    most = {ALIKE[0]: 0, 23: 0}
    for budget in most:
        if budget != ALIKE[0]:
            ledger.configure(ledger.recent, ledger.interval, False, None, ledger.narrow)
            ledger.renew(state, (budget,) * LAYERS, world.seq[1])
            assert state.budgets == (32,) * LAYERS
        for _ in range(60):
            if world.due():
                world.round(world.due(), LethePolicy(), sinks=0)
                assert {k % 16 for k in state.kept} == {0} and state.kept[0] <= state.budgets[0]
            world.allocate(1)
            most[budget] = max(most[budget], page_ceil(world.seq[1], 16) - state.layout.dead_len)
    assert state.kept == (32,) * LAYERS
    for budget, held in most.items():
        assert held <= request_bound(budget + ledger.recent + 5, ledger.interval, 16)


def test_a_round_that_would_leave_part_of_a_page_is_refused():
    made = server(page=8)
    made.admit()
    state = made.world.ledger.requests[1]
    plan = made.world.ledger.plan(state, 60, state.budgets)
    made.backend.classes.check(plan)
    with pytest.raises(RuntimeError, match=r"keep \[11\] cells in 16 \(in multiples of 8\)"):
        made.backend.classes.check(plan._replace(kept=ALIKE))
    with pytest.raises(RuntimeError, match="keep \\[8, 16\\] cells"):
        made.backend.classes.check(plan._replace(kept=(8, *plan.kept[1:])))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_budgets_that_differ_are_refused_at_start_and_on_a_live_server():
    with pytest.raises(ValueError, match=r"set --attention-backend to flashinfer or triton, or budget\.alloc"):
        Server(flash(budgets=(5, 12, 5, 20, 12)))
    classes = server().backend.classes
    assert isinstance(classes, LengthClasses) and classes.serve((7,) * LAYERS)
    assert not classes.serve((7, 7, 8, 7, 7)), "what a live change is checked by"


@pytest.mark.parametrize(
    "what",
    [{"use_mla": True}, {"has_swa": True}, {"local_attn_builder": object()}, {"is_encoder_decoder": True}],
    ids=lambda what: next(iter(what)),
)
def test_attention_that_is_not_full_is_refused(what, monkeypatch):
    stock = ours.flashattention.LetheFlashAttentionBackend.__mro__[2]
    init = stock.__init__

    def other(self, runner):
        init(self, runner)
        self.__dict__.update(what)

    monkeypatch.setattr(stock, "__init__", other)
    with pytest.raises(ValueError, match="needs full attention in every layer on fa3; use --kv-evict none"):
        server()


def test_sinks_and_modifiers_are_refused():
    mine = server()
    with pytest.raises(ValueError, match="layer 2 uses sinks"):
        mine.backend.forward_decode(None, None, None, make_layer(2), None, sinks=torch.ones(6), score_mod=None)
    with pytest.raises(ValueError, match="layer 2 uses return_lse"):
        mine.backend.forward_decode(None, None, None, make_layer(2), None, return_lse=True, rel_bias=None)


@pytest.mark.parametrize("what", [{"logit_cap": 30.0}, {"xai_temperature_len": 8}])
def test_logits_that_the_score_does_not_know_are_refused(what, monkeypatch):
    mine, kernel = server(), paged.flash_attn_with_kvcache
    monkeypatch.setattr(paged, KERNEL, lambda *args, softcap, **options: kernel(*args, softcap=0.0, **options))
    mine.admit()
    mine.layers[1] = make_layer(1, **what)
    with pytest.raises(ValueError, match=r"layer 1 .* its logits"):
        mine.step((1,), LethePolicy())


def test_a_step_without_host_lengths_is_refused():
    with pytest.raises(RuntimeError, match="host lengths"):
        server().backend.init_forward_metadata(forward_batch([1], [3], [2], seq_lens_cpu=None))


# -- the seams --------------------------------------------------------------------------------------------------------


@GRAPH
def test_scaled_keys_and_values_reach_attention_and_score(graph):
    mine = server(page=8)
    mine.backend.kv_cache_dtype_str = "scaled"  # the kernel is given scales where the cache's type is named
    compare_scaled(mine, graph, budgets=ALIKE, page=8)


@GRAPH
@pytest.mark.proves("fp8 KV cache")
def test_an_fp8_cache_is_scored_by_the_query_as_the_kernel_takes_it(graph):
    dtype = torch.float8_e4m3fn
    mine, other = server(graph=graph, stored=dtype), reference(rounded=dtype)
    run = other.run
    other.run = lambda batch, inputs: run(batch, [(q.to(dtype).float(), k, v) for q, k, v in inputs])
    compare(mine, other)


def test_an_eager_prefill_is_stock(monkeypatch):
    mine = server()
    stock = type(mine.backend).__mro__[2]
    seen = []
    monkeypatch.setattr(stock, "init_forward_metadata", lambda self, batch: seen.append(batch), raising=False)
    mine.backend.scored.begin = seen.append
    batch = forward_batch([1], [3], [2], forward_mode=Mode.EXTEND)
    mine.backend.init_forward_metadata(batch)
    assert seen == [batch, batch], "stock's metadata, then ours"


def test_shared_reads_end_at_the_graphs_head():
    backend, ends = server().backend, ours.scored.SharedReadEnds
    assert backend.shared_read_ends(Mode.DECODE) is ends.IN_REPLAY
    assert backend.shared_read_ends(Mode.EXTEND) is ends.UNKNOWN


@pytest.mark.parametrize(
    ("rule", "every", "head", "per_layer"),
    [
        (SUM, 1, ["start_states", "schedule", "fill_slots with indptr"], ["store", "score"]),
        (SUM, 3, [], ["store"]),
        (None, 1, ["start_states"], ["store"]),
    ],
    ids=["scored", "plain", "never scored"],
)
def test_a_step_launches_no_more_than_it_must_and_reads_nothing_back(rule, every, head, per_layer, monkeypatch):
    backend = server(rule, every=every).backend
    GraphRunner(backend, backend.scored.ledger)
    backend.forward_metadata.__dict__.update(meta(vars(backend.forward_metadata)))
    backend.__dict__.update(meta(vars(backend)))

    def kernel(q, *args, return_softmax_lse, **options):
        return (q, q.new_empty(q.shape[1::-1])) if return_softmax_lse else q

    monkeypatch.setattr(paged, KERNEL, kernel)
    backend.scored.ledger.phase.advance((), True)
    assert launches_of_a_step(backend, monkeypatch) == head + per_layer * LAYERS


def test_pages_are_filled_by_device_numbers_alone(monkeypatch):
    """Out of the graph, once a step, for all layers; nothing of the host's is looked at."""
    made = driven(8)
    launched, kernels = [], made.backend.scored.kernels
    fill = kernels.kernels.fill_pages
    monkeypatch.setattr(kernels.kernels, "fill_pages", lambda *args: launched.append(args) or fill(*args))
    made.step((1, 2, 3, 4, 5, 6), LethePolicy())
    ((batch, page, lengths, pages),) = launched
    assert page == 8 and pages.shape == (8, CONTEXT // 8) and len(lengths) == len(batch.rows) == 8
    assert batch.table is made.world.ledger.table and batch.req_to_token is made.world.req_to_token
    assert batch.rows.data_ptr() == made.graphs.static["req_pool_indices"].data_ptr()
    assert int(read(batch.table[1]).kept[0]) == 16


def test_overrides_take_what_sglang_passes_and_its_double_sets_what_it_sets():
    def takes(function):
        code = function.__code__
        return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    backend, name = ours.flashattention.LetheFlashAttentionBackend, "FlashAttentionBackend"
    for method in ("_set_decode_page_metadata", "init_cuda_graph_state"):
        assert takes(getattr(backend, method)) == parameters("sglang", FLASHATTENTION, f"{name}.{method}")
    decode = parameters("sglang", FLASHATTENTION, f"{name}.forward_decode")
    assert takes(backend.forward_decode) == decode[: len(takes(backend.forward_decode))] and "return_lse" in decode
    for method in ("init_forward_metadata", "init_forward_metadata_out_graph"):
        assert takes(getattr(backend, method)) == parameters("sglang", BASE, f"AttentionBackend.{method}")
    path = "kernels/ops/attention/flash_attention_v3.py"
    known = {*parameters("sglang", path, KERNEL), "ver"}
    assert set(takes(paged.flash_attn_with_kvcache)) <= known
    stock, instance = backend.__mro__[2], server().backend
    assert stock.__name__ == name
    assert {n for n in stock.__init__.__code__.co_names if n in vars(instance)} <= attributes(FLASHATTENTION, name)
