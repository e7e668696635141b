"""The score is the paper's equation 5, computed over the tokens a layer still has."""

from __future__ import annotations

import pytest
import torch

from lethe_sglang.attention import prefill
from lethe_sglang.attention.prefill import observation_attention, replay
from lethe_sglang.kernels.common import Schedule, States, update
from lethe_sglang.kernels.reference import Reading, accumulate, attend, repack, select
from lethe_sglang.policies import Accumulation


def dense(q, k, v, scale):
    groups = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    a = torch.softmax(torch.einsum("hd,nhd->hn", q, k) * scale, -1)
    return torch.einsum("hn,nhd->hd", a, v), a.mean(0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 4), (6, 2), (1, 1)])
def test_attend_equals_dense_attention_on_ragged_lists(heads, kv_heads):
    torch.manual_seed(0)
    k, v = torch.randn(50, kv_heads, 8), torch.randn(50, kv_heads, 8)
    lengths = torch.tensor([7, 1, 20])
    cells = torch.stack(
        [torch.cat([torch.randperm(49)[:n] + 1, torch.zeros(20 - n, dtype=torch.long)]) for n in lengths]
    )
    q = torch.randn(3, heads, 8)
    out, heads = attend(q, k, v, Reading.of(cells, lengths, kv_heads), 0.3)
    attention = heads.mean(1)
    for b, n in enumerate(lengths.tolist()):
        expected, a = dense(q[b], k[cells[b, :n]], v[cells[b, :n]], 0.3)
        torch.testing.assert_close(out[b], expected)
        torch.testing.assert_close(attention[b, :n], a)
        assert float(attention[b, n:].abs().sum()) == 0


def test_accumulate_is_the_decayed_sum_of_equation_5():
    torch.manual_seed(0)
    gamma, scores, expected = 0.9, torch.zeros(12), torch.zeros(12)
    cells = torch.arange(1, 12).unsqueeze(0)
    for _ in range(5):
        a = torch.rand(1, 11)
        schedule = Schedule(torch.tensor([0]), torch.tensor([gamma]), torch.tensor([1]))
        accumulate(Accumulation(gamma), States(scores, None), cells, a, schedule)
        expected[1:] = gamma * expected[1:] + a[0]
    torch.testing.assert_close(scores, expected)


def test_observation_scores_equal_the_same_queries_as_decode_steps():
    torch.manual_seed(0)
    n, w, gamma = 30, 6, 0.8
    keys, values = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    cells = torch.randperm(39)[:n] + 1
    queries = torch.randn(n, 4, 8)
    got, _ = replay(Accumulation(gamma), observation_attention(queries, keys, cells, 0.5, w))
    expected = torch.zeros(n)
    for t in range(n - w, n):
        _, a = dense(queries[t], keys[cells[: t + 1]], values[cells[: t + 1]], 0.5)
        expected *= gamma
        expected[: t + 1] += a
    torch.testing.assert_close(got, expected)


def test_a_long_sequence_is_observed_in_chunks(monkeypatch):
    torch.manual_seed(0)
    keys, cells, queries = torch.randn(90, 2, 8), torch.randperm(89)[:70] + 1, torch.randn(9, 4, 8)
    whole = observation_attention(queries, keys, cells, 0.5, 6)
    for chunk in (7, 32, 69):
        monkeypatch.setattr(prefill, "CHUNK", chunk)
        torch.testing.assert_close(observation_attention(queries, keys, cells, 0.5, 6), whole)


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("rule", ["sum", "max", "recurrence"])
def test_replayed_queries_are_decode_steps(rule, every):
    torch.manual_seed(0)
    attention, n, w = torch.rand(6, 20), 20, 6
    policy = Accumulation(decay=0.8, every=every, rule=rule, threshold=0.5)
    score = torch.arange(n).float().clamp(min=n - w) if rule == "recurrence" else torch.zeros(n)
    memory = torch.zeros(n) if rule == "recurrence" else None
    for i, length in enumerate(range(n - w + 1, n + 1)):
        if (n - length) % every == 0:  # back from the last query: a prompt has a score whatever its length
            score, memory = update(policy, score, memory, attention[i], policy.step_decay, length)
    found = replay(policy, attention)
    torch.testing.assert_close(found[0], score)
    assert (found[1] is None) == (memory is None)
    if memory is not None:
        torch.testing.assert_close(found[1], memory)


def test_observation_of_a_chunk_shorter_than_the_window_uses_its_queries():
    keys = torch.randn(20, 1, 8)
    got = observation_attention(torch.randn(3, 2, 8), keys, torch.arange(1, 11), 0.5, 32)
    assert got.shape == (3, 10) and float(got.sum()) == pytest.approx(3.0, abs=1e-5)


def test_repack_moves_all_cells_at_once():
    buffer = torch.arange(8.0).unsqueeze(1)
    repack([buffer], torch.tensor([3, 4, 5]), torch.tensor([4, 5, 3]))
    assert buffer.squeeze().tolist() == [0, 1, 2, 5, 3, 4, 6, 7]


def test_select_takes_exactly_the_count_pins_first_and_never_an_invalid_candidate():
    rank = torch.tensor([[5.0, 1.0, 9.0, 1.0, 7.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    keep = select(rank, valid, torch.tensor([2]), torch.tensor([3]))
    assert keep.tolist() == [[True, True, True, False, False]]
    assert select(rank, valid, torch.tensor([2]), torch.tensor([0])).sum() == 0
