"""Scores are those of the twin: softmax attention over the list, averaged over heads, accumulated by each rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lethe_sglang.kernels import reference
from lethe_sglang.kernels.common import Attention, Batch, Lists, Parts, Schedule, States
from lethe_sglang.kernels.reference import Reading, accumulate, attend
from lethe_sglang.kernels.table import NEVER, read, width
from lethe_sglang.kernels.triton import config, score
from lethe_sglang.policies.base import Accumulation

NAN, CELLS = float("nan"), 160
NAMES = ("query", "keys", "lse", "indptr", "indices", "first", "decay", "step", "scores", "memories")
RULES = {rule: Accumulation(decay=0.9, rule=rule, threshold=0.02) for rule in ("sum", "max", "recurrence")}
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
    (torch.float32, torch.bfloat16),
]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score._SCORE, "configs", [config(BLOCK_N=16)])
        patch.setattr(score._SCHEDULE, "configs", [config(BLOCK=4)])
        yield


def arguments(rule, query, keys, lse, indptr, indices, first, decay, step, scores, memories, scaling, **base):
    """Arguments of ``score`` from tensors by name."""
    return {
        "rule": rule,
        "attention": Attention(query, keys, lse, scaling, **base),
        "lists": Lists(indptr, indices),
        "schedule": Schedule(first, decay, step),
        "states": States(scores, memories),
    }


class Case:
    """One layer of a decode step; cells that are on no list hold NaN keys, so reading them shows."""

    def __init__(
        self,
        device,
        rule="sum",
        group=2,
        kv_heads=2,
        head_dim=64,
        dtypes=DTYPES[2],
        lengths=(40, 17),
        own_from=(5, 0),
        k_scale=1.0,
        lse_base="e",
        integer=torch.int32,
        seed=0,
    ):
        torch.manual_seed(seed)
        self.device, self.rule, self.lse_base, self.k_scale = device, RULES[rule], lse_base, k_scale
        batch, heads = len(lengths), group * kv_heads
        self.scaling = head_dim**-0.5
        free = torch.randperm(CELLS - 1) + 1
        self.cells = torch.zeros(batch, max(lengths), dtype=torch.int64)
        for b, n in enumerate(lengths):
            self.cells[b, :n], free = free[:n], free[n:]
        self.length = torch.tensor(lengths)
        self.query = (2 * torch.randn(batch, heads, head_dim)).to(dtypes[0])
        keys = torch.randn(CELLS, kv_heads, head_dim)
        keys[free] = NAN
        self.keys = keys.to(dtypes[1])
        self.first = torch.tensor(own_from, dtype=torch.int32)
        self.decay = torch.linspace(0.5, 1.0, batch)
        self.step = torch.tensor([1000 + 7 * b for b in range(batch)])
        self.scores = torch.rand(CELLS) * (990 if rule == "recurrence" else 0.1)
        self.memories = 20 * torch.rand(CELLS) if rule == "recurrence" else None
        self.indptr = torch.tensor([0, *lengths]).cumsum(0).to(integer)
        self.indices = torch.cat([self.cells[b, :n] for b, n in enumerate(lengths)]).to(integer)
        clean = torch.nan_to_num(self.keys.float()) * k_scale
        _, self.heads = attend(
            self.query.float(), clean, clean, Reading.of(self.cells, self.length, clean.shape[1]), self.scaling
        )
        listed = clean[self.cells].repeat_interleave(group, 2)
        logits = torch.einsum("bhd,bnhd->bhn", self.query.float(), listed) * self.scaling
        beyond = torch.arange(max(lengths)) >= self.length.unsqueeze(1)
        self.logits, self.parts = logits.masked_fill(beyond.unsqueeze(1), float("-inf")), None
        self.lse = self.logits.logsumexp(-1)
        if lse_base == "2":
            self.lse /= math.log(2)

    def expected(self):
        """Scores and memories by the twin."""
        j = torch.arange(self.cells.shape[1])
        own = (j >= self.first.unsqueeze(1)) & (j < self.length.unsqueeze(1))
        scores = self.scores.clone()
        memories = None if self.memories is None else self.memories.clone()
        schedule = Schedule(self.first, self.decay, self.step)
        accumulate(self.rule, States(scores, memories), torch.where(own, self.cells, 0), self.heads.mean(1), schedule)
        return scores, memories

    def run(self, function=score.score, device=None, **kwargs):
        """Scores and memories by ``function``."""
        device = device or self.device
        there = {n: None if getattr(self, n) is None else getattr(self, n).clone().to(device) for n in NAMES}
        parts = self.parts and self.parts._replace(count=self.parts.count.to(device))
        base = {"scaling": self.scaling * self.k_scale, "lse_base": self.lse_base, "parts": parts}
        function(**arguments(self.rule, **there, **base), **kwargs)
        return there["scores"].cpu(), None if self.memories is None else there["memories"].cpu()

    def check(self, **kwargs):
        """Compare all but the padding cell, which the twin uses as its waste bin."""
        for name, got, want in zip(("score", "memory"), self.run(**kwargs), self.expected(), strict=True):
            if want is not None:
                torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("function", [score.score, reference.score])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_log_sum_exps_of_a_lists_parts_are_merged_and_unused_ones_are_not_read(device, function, integer):
    lengths, counts, multiple = (40, 17, 1, 9, 33), (3, 8, 5, 2, 1), 4
    case = Case(device, lengths=lengths, own_from=(5, 0, 0, 2, 1))
    case.parts = Parts(torch.tensor(counts, dtype=integer), multiple)
    case.lse = torch.full((*case.lse.shape, 8), 1e3)
    unused = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        part = math.ceil(math.ceil(length / count) / multiple) * multiple
        starts = range(0, length, part)
        unused += count - len(starts)
        for number, start in enumerate(starts):
            case.lse[b, :, number] = case.logits[b, :, start : start + part].logsumexp(-1)
    assert unused >= 3, "every part is used: the test says nothing"
    case.check(function=function, **({} if function is score.score else {"device": torch.device("cpu")}))


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=20)
@given(
    group=st.sampled_from([1, 2, 3, 7, 8, 16]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    dtypes=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    own=st.sampled_from([0, 3, 16]),
    k_scale=st.sampled_from([1.0, 0.5]),
    lse_base=st.sampled_from(["e", "2"]),
    integer=st.sampled_from([torch.int32, torch.int64]),
    splits=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_scores_are_the_twins(device, rule, lengths, own, splits, **options):
    case = Case(device, rule, lengths=lengths, own_from=[own] * len(lengths), **options)
    case.check(splits=splits)
    for got, want in zip(case.run(reference.score, "cpu"), case.expected(), strict=True):
        if want is not None:
            torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_every_key_dtype(device, dtypes):
    Case(device, dtypes=dtypes, k_scale=0.7).check()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_head_dim_reads_its_own_lanes_only(device, head_dim):
    Case(device, head_dim=head_dim, kv_heads=1, lengths=(30, 30)).check()


@pytest.mark.parametrize("group", [1, 5, 16])
def test_groups_are_averaged_over_their_heads_only(device, group):
    Case(device, group=group, kv_heads=2).check()


def test_the_result_does_not_depend_on_the_split(device):
    case = Case(device, "recurrence", lengths=(70, 33, 1))
    case.first = torch.tensor([5, 0, 0], dtype=torch.int32)
    case.decay, whole = torch.full((3,), 0.9), None
    for splits in (1, 2, 7):
        got = case.run(splits=splits)
        whole = whole or got
        assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_shared_prefix_is_never_touched(device, rule):
    case = Case(device, rule, lengths=(40, 30), own_from=(21, 30))
    scores, memories = case.run(splits=2)
    touched = case.cells[0, 21:40]
    assert not torch.equal(scores[touched], case.scores[touched])
    others = torch.ones(CELLS, dtype=torch.bool).index_fill_(0, touched, False)
    assert torch.equal(scores[others], case.scores[others])
    assert memories is None or torch.equal(memories[others], case.memories[others])


@pytest.mark.parametrize("splits", [1, 3])
def test_padded_rows_and_skipped_steps_write_nothing(device, splits):
    case = Case(device, lengths=(1, 40, 20), own_from=(0, NEVER, 0))
    case.indptr = torch.tensor([0, 1, 41, 41], dtype=torch.int32)  # the last has length 0
    case.first[0] = NEVER
    case.lse[0], case.lse[2] = float("-inf"), NAN
    scores, _ = case.run(splits=splits)
    assert torch.equal(scores, case.scores)


def test_no_request_is_no_launch(device):
    case = Case(device)
    for name in ("query", "lse", "first", "decay", "step"):
        setattr(case, name, getattr(case, name)[:0])
    assert torch.equal(case.run()[0], case.scores)


def test_a_query_may_be_a_view_of_the_projection(device):
    case = Case(device)
    scores, _ = case.run()
    packed = torch.cat([case.query.flatten(1), torch.full((2, 64), NAN)], 1).to(device)
    view = packed[:, :-64].view(2, 4, 64)
    assert not view.is_contiguous()
    out = case.scores.clone().to(device)
    there = {n: getattr(case, n).to(device) for n in NAMES[1:8]}
    score.score(**arguments(case.rule, view, **there, scores=out, memories=None, scaling=case.scaling))
    assert torch.equal(out.cpu(), scores)


# -- the schedule ---------------------------------------------------------------------------------------------------


def schedule(accumulation, score_after, rows, seq_lens, device):
    """Run the kernel and the twin; the ledger's lines score from position 11, row 0 is padding."""
    table = torch.zeros(8, width(3), dtype=torch.int32)
    lines = read(table[1:])
    lines.score_from[:], lines.score_after[:] = 11, score_after
    results = []
    for function, where in ((score.schedule, device), (reference.schedule, torch.device("cpu"))):
        first = torch.full((len(rows),), -1, dtype=torch.int32, device=where)
        decay = torch.full((len(rows),), NAN, device=where)
        inputs = (table.to(where), torch.tensor(rows, device=where), torch.tensor(seq_lens, device=where))
        function(Batch(inputs[0], *inputs), accumulation, first, decay)
        results.append((first.tolist(), decay.tolist()))
    assert results[0] == results[1]
    return results[0]


def test_every_nth_step_is_scored_with_the_decay_of_n_steps(device):
    accumulation = Accumulation(decay=0.9, every=3)
    first, decay = schedule(accumulation, 0, [1, 2, 3, 4, 5], [9, 10, 11, 12, 13], device)
    assert first == [11, NEVER, NEVER, 11, NEVER]
    assert decay == pytest.approx([0.9**3] * 5)


def test_a_window_is_scored_from_zero_and_not_before(device):
    accumulation = Accumulation(decay=0.9, window=8)
    first, decay = schedule(accumulation, 20, [1, 2, 3, 4], [19, 20, 21, 22], device)
    assert first == [NEVER, NEVER, 11, 11]
    assert decay[2:] == pytest.approx([0.0, 0.9])


def test_without_a_window_the_start_of_one_means_nothing(device):
    first, decay = schedule(Accumulation(decay=0.9), 20, [1, 2], [20, 21], device)
    assert first == [11, 11] and decay == pytest.approx([0.9, 0.9])


def test_padding_is_never_scored(device):
    first, _ = schedule(Accumulation(), 0, [0, 3, 0, 0, 0, 5], [1, 5, 0, 1, 1, 5], device)
    assert first == [NEVER, 11, *[NEVER] * 3, 11]


def test_a_window_start_forgets_the_old_score(device):
    accumulation = Accumulation(decay=0.9, window=8)
    case = Case(device, lengths=(20,), own_from=(0,))
    table = torch.zeros(2, width(1), dtype=torch.int32, device=device)
    read(table).score_after[1] = 999
    first, decay = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    batch = Batch(table, table, torch.tensor([1], device=device), torch.tensor([1000], device=device))
    score.schedule(batch, accumulation, first, decay)
    case.first, case.decay = first.cpu(), decay.cpu()
    torch.testing.assert_close(case.run()[0][case.cells[0]], case.heads.mean(1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 64, dtype=torch.float64)}, "query must be float32 or float16 or bfloat16"),
        ({"query": torch.zeros(2, 3, 64)}, "3 query heads do not share 2 KV heads"),
        ({"keys": torch.zeros(CELLS, 2, 32)}, "keys must be .* of shape \\[any, any, 64\\]"),
        ({"keys": torch.zeros(2, CELLS, 64).transpose(0, 1)}, "keys must be contiguous"),
        ({"lse": torch.zeros(2, 3)}, "lse must be float32 of shape \\[2, 4\\]"),
        ({"indptr": torch.zeros(2, dtype=torch.int32)}, "2 requests need 3"),
        ({"first": torch.zeros(2, dtype=torch.int64)}, "first must be int32"),
        ({"scores": torch.zeros(CELLS - 1)}, f"scores must be float32 of shape \\[{CELLS}\\]"),
        ({"memories": torch.zeros(CELLS)}, "memories go with rule recurrence"),
        ({"lse_base": "10"}, "lse_base must be 'e' or '2'"),
        ({"splits": 0}, "splits must be at least 1"),
    ],
)
def test_bad_shapes_are_named(change, message):
    case = Case("cpu")
    splits = {name: change[name] for name in ("splits",) if name in change}
    tensors = {n: getattr(case, n) for n in NAMES} | {n: value for n, value in change.items() if n not in splits}
    with pytest.raises(ValueError, match=message):
        score.score(**arguments(case.rule, scaling=0.1, **tensors), **splits)
