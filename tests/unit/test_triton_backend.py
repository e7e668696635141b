"""Triton decode equals the portable backend's, in outputs and scores; lists, splits and addresses are as they must.

SGLang's decode kernel is a double with its contract (``flashinfer_double.py``); the kernel itself does not run here.
"""

from __future__ import annotations

import pytest
import torch
from flashinfer_double import (
    BUDGETS,
    GARBAGE,
    LAYERS,
    SUM,
    TRITON,
    GraphRunner,
    Mode,
    Server,
    attributes,
    compare,
    compare_scaled,
    decode_attention_fwd,
    launches_of_a_step,
    make_layer,
    meta,
    ours,
    parameters,
    portable,
)

from lethe_sglang.policies.base import Accumulation
from lethe_sglang.policies.lethe import LethePolicy

GRAPH = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
NARROW = (0, 2)
"""Layers of ``BUDGETS`` at or under its mean."""

KERNELS = "kernels/ops/attention/decode_attention.py"


def triton(accumulation=SUM, budgets=BUDGETS):
    def make(runner, world, rows):
        return ours.triton.LetheTritonBackend(runner, runner.token_to_kv_pool, world.ledger, accumulation, budgets)

    return make


def server(accumulation=SUM, graph=False, budgets=BUDGETS, **options):
    """A server whose unused splits hold garbage before every layer, as those of earlier steps do."""
    made = Server(triton(accumulation, budgets), **options)
    backend = made.backend
    attend = backend._attend

    def dirty(query, layer, metadata, *rest):
        metadata.attn_lse.fill_(GARBAGE)
        metadata.attn_logits.fill_(GARBAGE)
        return attend(query, layer, metadata, *rest)

    backend._attend = dirty
    if graph:
        made.capture()
    return made


@GRAPH
@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("budgets", [BUDGETS, None], ids=["classes", "apart"])
def test_outputs_and_scores_equal_the_portable_backend(graph, page, budgets):
    compare(server(graph=graph, budgets=budgets, page=page), Server(portable(), page=page))


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
@GRAPH
def test_every_rule_scores_as_the_portable_backend(rule, graph):
    options = {"window": rule.window}
    compare(server(rule, graph, **options), Server(portable(rule), **options), steps=18)


@GRAPH
def test_a_policy_that_scores_nothing_leaves_the_log_sum_exps_alone(graph):
    mine = server(None, graph)
    compare(mine, Server(portable(None)), steps=18)
    assert bool((mine.backend.forward_metadata.attn_lse == GARBAGE).any())


@GRAPH
def test_splits_follow_the_longest_list_replayed_or_not(graph):
    mine = server(graph=graph)
    mine.admit()
    for _ in range(9):
        mine.step((1, 2, 3, 4, 5, 6), LethePolicy())
    longest = mine.world.lists([1, 2, 3, 4, 5, 6]).length.amax(0)
    expected = [-(-int(n) // 16) for n in longest] + [1, 1] * graph
    splits = mine.backend.cuda_graph_num_kv_splits[:8] if graph else mine.backend.forward_metadata.num_kv_splits
    assert splits.tolist() == expected
    sequences = [-(-mine.world.seq[row] // 16) for row in (1, 2, 3, 4, 5, 6)]
    assert expected[:6] != sequences, "the lists are as long as the sequences: the test says nothing"


def test_lists_lie_at_captured_addresses_and_cover_the_flat_pool():
    mine = server(graph=True)
    backend, store = mine.backend, mine.world.cells
    narrow, wide = (backend.kv_indptr, backend.cuda_graph_kv_indices), (backend._indptrs[0], backend._graph_indices[0])
    seen = []

    def note(q, k, v, o, indptr, indices, *rest, **options):
        shared = len(seen) in NARROW
        at = narrow if shared else wide
        assert (indptr.data_ptr(), indices.data_ptr()) == tuple(buffer.data_ptr() for buffer in at)
        assert k.data_ptr() == (store.of_layer(len(seen)) if shared else store).key.data_ptr()
        assert k.shape[0] == v.shape[0] == (1 if shared else LAYERS) * store.blocks
        seen.append([indices[a:b].tolist() for a, b in zip(indptr.tolist(), indptr.tolist()[1:], strict=False)])
        decode_attention_fwd(q, k, v, o, indptr, indices, *rest, **options)

    backend.decode_attention_fwd = note
    mine.admit()
    for _ in range(9):
        seen.clear()
        mine.step((1, 2, 3, 4, 5), LethePolicy())
    lists = mine.world.lists([1, 2, 3, 4, 5])
    for layer, indices in enumerate(seen):
        base = layer * store.blocks if layer in NARROW else 0
        assert indices[5:] == [[layer * store.blocks - base]] * 3, "a padded row has the padding block's cell"
        for b, own in enumerate(indices[:5]):
            assert [base + cell for cell in own] == lists.cells[layer, b, : int(lists.length[layer, b])].tolist()


@GRAPH
def test_lengths_may_differ_in_every_layer(graph):
    """Breakpoint allocation: counts of a round are nobody's budgets."""
    servers = [server(graph=graph, budgets=None), Server(portable())]
    outputs = []
    for one in servers:
        one.world.admit(1, 40, 0, BUDGETS)
        one.world.round([one.world.ledger.requests[1]], LethePolicy(), budgets={1: (9, 4, 17, 5, 11)})
        outputs.append(one.step((1,), LethePolicy()))
    for output, right in zip(*outputs, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)


@GRAPH
def test_scaled_keys_and_values_reach_attention_and_score(graph):
    compare_scaled(server(), graph)


@pytest.mark.proves("fp8 KV cache")
def test_an_fp8_cache_is_moved_as_bytes_and_read_in_its_type():
    mine = server(graph=True, stored=torch.float8_e4m3fn)
    compare(mine, Server(portable(), rounded=torch.float8_e4m3fn))


@pytest.mark.parametrize("what", [{"logit_cap": 30.0}, {"xai_temperature_len": 8}])
def test_logits_that_the_score_does_not_know_are_refused(what):
    mine = server()
    mine.admit()
    mine.layers[1] = make_layer(1, **what)
    with pytest.raises(ValueError, match=r"layer 1 .* its logits"):
        mine.step((1,), LethePolicy())


def test_sinks_and_modifiers_are_refused():
    mine = server()
    with pytest.raises(ValueError, match="layer 2 uses sinks"):
        mine.backend.forward_decode(None, None, None, make_layer(2), None, sinks=torch.ones(6), score_mod=None)


def test_shared_reads_end_at_the_graphs_head_unless_a_layer_has_its_own_list():
    ends = ours.scored.SharedReadEnds
    for budgets, end in ((BUDGETS, ends.POST_REPLAY), (None, ends.POST_REPLAY), ((9,) * LAYERS, ends.IN_REPLAY)):
        backend = server(budgets=budgets).backend
        assert backend.shared_read_ends(Mode.DECODE) is end
        assert backend.shared_read_ends(Mode.EXTEND) is ends.UNKNOWN


@pytest.mark.parametrize(
    ("budgets", "head", "wide"),
    [((9,) * LAYERS, 1, ()), (BUDGETS, 1, (1, 3, 4)), ((3, 4, 4, 4, 20), 2, (4,)), (None, 0, range(LAYERS))],
    ids=["uniform", "classes", "two-narrow", "apart"],
)
def test_a_step_launches_no_more_than_it_must_and_reads_nothing_back(budgets, head, wide, monkeypatch):
    backend = Server(triton(budgets=budgets)).backend
    GraphRunner(backend, backend.scored.ledger)
    backend.forward_metadata.__dict__.update(meta(vars(backend.forward_metadata)))
    backend.decode_attention_fwd = lambda *args, **options: None
    expected = ["start_states", "schedule", *["fill_slots with indptr"] * head]
    for layer in range(LAYERS):
        expected += ["store", *["fill_cells with indptr"] * (layer in wide), "score"]
    assert launches_of_a_step(backend, monkeypatch) == expected


def test_the_doubles_take_what_the_installed_classes_take():
    def takes(function):
        code = function.__code__
        return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    assert set(takes(decode_attention_fwd)) == set(parameters("sglang", KERNELS, "decode_attention_fwd"))
    order = parameters("sglang", KERNELS, "decode_attention_fwd")
    assert takes(decode_attention_fwd)[: len(order)] == order
    backend, name = ours.triton.LetheTritonBackend, "TritonAttnBackend"
    method = "_update_decode_kv_buffers"
    assert takes(getattr(backend, method)) == parameters("sglang", TRITON, f"{name}.{method}")
    decode = parameters("sglang", TRITON, f"{name}.forward_decode")
    assert takes(backend.forward_decode) == decode[: len(takes(backend.forward_decode))]
    stock, instance = backend.__mro__[2], server().backend
    assert stock.__name__ == name
    assert {n for n in stock.__init__.__code__.co_names if n in vars(instance)} <= attributes(TRITON, name)
