"""Every policy keeps what a direct dense implementation of its rule keeps, in every layer and round after round.

The product's side is a decode loop over real keys and queries with the real ledger, rounds and kernels; its step is
that of ``attention/torch_native.py``. The other side is ``dense_reference.py``.
"""

from __future__ import annotations

import dense_reference as dense
import numpy as np
import pytest
import torch
from cache_model import MiniPool

from lethe_sglang.attention.prefill import observation_attention, replay
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels.common import Cells, Schedule
from lethe_sglang.kernels.reference import Reading, accumulate, attend
from lethe_sglang.kernels.table import read

LAYERS, KV_HEADS, HEADS, DIM, RANK = 3, 2, 4, 8, 4
RECENT, INTERVAL, SINKS = 6, 8, 2
BUDGETS = (9, 16, 5)
REQUESTS = {1: (0, 29), 2: (16, 19), 3: (0, 10)}  # row: (shared prefix, prompt)
STEPS, LONGEST, STALE = 58, 96, 3.25

CASES = {
    "lethe": ({"lethe": {"half_life": 6.58, "key_share": 0}}, dense.decayed_sum(0.5 ** (1 / 6.58))),
    "lethe, slow decay": ({"lethe": {"half_life": 346, "key_share": 0}}, dense.decayed_sum(0.5 ** (1 / 346))),
    "lethe, every third step": (
        {"lethe": {"half_life": 10, "score_every": 3, "key_share": 0}},
        dense.decayed_sum(0.5**0.1, 3),
    ),
    "lethe, default": ({}, dense.by_places(dense.decayed_sum(0.5 ** (1 / 128)), 0.5)),
    "lethe, few by key": (
        {"lethe": {"half_life": 13.5, "key_share": 0.2}},
        dense.by_places(dense.decayed_sum(0.5 ** (1 / 13.5)), 0.2),
    ),
    "h2o": ({}, dense.decayed_sum(1.0)),
    "tova": ({}, dense.decayed_sum(0.0)),
    "snapkv": ({"snapkv": {"window": 6, "kernel": 5}}, dense.snapkv(6, 5)),
    "snapkv, no pooling": ({"snapkv": {"window": 4, "kernel": 1}}, dense.snapkv(4, 1)),
    "snapkv, window beyond the last round": ({"snapkv": {"window": 30, "kernel": 3}}, dense.snapkv(30, 3)),
    "morphkv": ({"morphkv": {"window": 5}}, dense.morphkv(5, "sum")),
    "morphkv, max": ({"morphkv": {"window": 7, "fusion": "max"}}, dense.morphkv(7, "max")),
    "morphkv, window of one step": ({"morphkv": {"window": 1, "fusion": "max"}}, dense.morphkv(1, "max")),
    "rkv": ({"rkv": {"window": 6}}, dense.rkv(6, 0.1, 7, 0.5)),
    "rkv, half": ({"rkv": {"window": 8, "mix_lambda": 0.5}}, dense.rkv(8, 0.5, 7, 0.5)),
    "gkv": ({"gkv": {"window": 6}}, dense.gkv(6, 0.8, 0.5)),
    "gkv, long memory": ({"gkv": {"window": 8, "alpha": 0.99}}, dense.gkv(8, 0.99, 0.5)),
    "gkv, short memory": ({"gkv": {"window": 5, "alpha": 0.5}}, dense.gkv(5, 0.5, 0.5)),
    "gkv, importance alone": ({"gkv": {"window": 6, "mix_lambda": 1.0}}, dense.gkv(6, 0.8, 1.0)),
    "lazy": ({"lazy": {"threshold": 0.03}}, dense.lazy(0.03)),
    "lazy, rare uses": ({"lazy": {"threshold": 0.05}}, dense.lazy(0.05)),
    "keydiff": ({}, dense.keydiff),
    "streaming": ({}, dense.streaming),
    "random": ({}, dense.random),
}


def stream(row):
    """Keys ``[L, T, Hkv, D]`` on a smooth walk in few dimensions; queries ``[L, T, H, D]`` that look now and back."""
    rng = np.random.default_rng(row)
    basis = rng.normal(size=(LAYERS, KV_HEADS, RANK, DIM))
    walk = np.zeros((LAYERS, LONGEST, KV_HEADS, RANK))
    for t in range(LONGEST):
        walk[:, t] = 0.8 * walk[:, t - 1] + 0.6 * rng.normal(size=walk[:, t].shape)
    back = [walk[:, rng.integers(max(t - 30, 0), t + 1)] for t in range(LONGEST)]
    wanted = np.repeat(walk + 1.5 * np.stack(back, 1), HEADS // KV_HEADS, 2)
    wanted += 0.8 * rng.normal(size=wanted.shape)
    keys = np.einsum("lthr,lhrd->lthd", walk, basis)
    queries = np.einsum("lthr,lhrd->lthd", wanted, np.repeat(basis, HEADS // KV_HEADS, 1))
    return (keys + 0.1 * rng.normal(size=keys.shape)).astype(np.float32), 0.2 * queries.astype(np.float32)


STREAMS = {row: stream(row) for row in REQUESTS}


class DecodePool(MiniPool):
    """A pool of real keys; a cell's value tells (row, layer, position), and every state starts out stale."""

    def __init__(self, policy, page):
        super().__init__(num_layers=LAYERS, page=page, pages=136 // page, recent=RECENT, interval=INTERVAL)
        self.policy, rule = policy, policy.accumulation
        n = LAYERS * self.cells.blocks
        self.cells = Cells(
            key=torch.full((n, KV_HEADS, DIM), 9.0),
            value=torch.full((n, KV_HEADS, DIM), -1.0),
            score=None if rule is None else torch.full((n,), STALE),
            position=torch.full((n,), -7, dtype=torch.int32) if policy.uses_position else None,
            memory=torch.full((n,), STALE) if policy.uses_memory else None,
            num_layers=LAYERS,
            blocks=self.cells.blocks,
        )
        window = None if rule is None else rule.window
        self.ledger = Ledger(9, LAYERS, page, RECENT, INTERVAL, "cpu", window=window)
        self.slot, self.reused, self.used = {}, 0, set()

    def write(self, row, position):
        """Allocate a token's slot as SGLang does, start its states as ``init_forward_metadata`` does, store its key."""
        if position % self.page == 0:
            self.slot[row] = self.free.pop() * self.page
            self.reused += self.slot[row] in self.used
            self.used.add(self.slot[row])
        slot = self.slot[row] + position % self.page
        self.req_to_token[row, position] = slot
        recurs = self.policy.accumulation is not None and self.policy.accumulation.rule == "recurrence"
        for state, value in ((self.cells.score, float(position) if recurs else 0.0), (self.cells.memory, 0.0)):
            if state is not None:
                state.view(LAYERS, self.cells.blocks)[:, slot] = value
        cells = torch.arange(LAYERS) * self.cells.blocks + slot
        self.cells.key[cells] = torch.from_numpy(STREAMS[row][0][:, position])
        self.cells.value[cells, 0, 0], self.cells.value[cells, 0, 2] = float(row), float(position)
        self.cells.value[cells, 0, 1] = torch.arange(LAYERS, dtype=torch.float32)
        self.seq[row] = position + 1

    def prefill(self, row, length):
        for position in range(length):
            self.write(row, position)

    def observe(self, row, first):
        """Score a private prompt from its last queries."""
        for layer in range(LAYERS):
            cells = layer * self.cells.blocks + self.req_to_token[row, : self.seq[row]].long()
            queries = torch.from_numpy(STREAMS[row][1][layer, first : self.seq[row]])
            seen = observation_attention(queries, self.cells.key, cells, DIM**-0.5, 32)
            score, memory = replay(self.policy.accumulation, seen)
            self.cells.score[cells[first:]] = score[first:]
            if memory is not None:
                self.cells.memory[cells[first:]] = memory[first:]

    def decode(self):
        """One decode step of all requests, in the order of ``attention/torch_native.py``."""
        rows, rule = sorted(self.seq), self.policy.accumulation
        for row in rows:
            self.write(row, self.seq[row])
        cells, length = self.lists(rows)
        seq = torch.tensor([self.seq[row] for row in rows])
        at = read(self.ledger.table[torch.tensor(rows)])
        if rule is not None:
            own = torch.arange(cells.shape[2]) >= at.score_from.unsqueeze(1)
            decay = torch.full((len(rows),), rule.step_decay)
            if rule.every > 1:
                own &= (seq % rule.every == 0).unsqueeze(1)
            if rule.window is not None:
                own &= (seq > at.score_after).unsqueeze(1)
                decay = torch.where(seq == at.score_after + 1, 0.0, decay)
            scored = torch.where(own, cells, 0)
        for layer in range(LAYERS):
            query = torch.stack([torch.from_numpy(STREAMS[row][1][layer, self.seq[row] - 1]) for row in rows])
            reading = Reading.of(cells[layer], length[layer], KV_HEADS)
            _, heads = attend(query, self.cells.key, self.cells.value, reading, DIM**-0.5)
            if rule is not None:
                schedule = Schedule(at.score_from, decay, seq)
                accumulate(rule, self.cells.states, scored[layer], heads.mean(1), schedule)

    def kept(self, row):
        """Per layer, the own positions that decode would gather."""
        lists, prefix = self.lists([row]), REQUESTS[row][0]
        kept = []
        for layer in range(LAYERS):
            told = self.cells.value[lists.cells[layer, 0, : int(lists.length[layer, 0])], 0, :3].to(torch.int64)
            assert bool((told[:, 0] == row).all()) and bool((told[:, 1] == layer).all()), "a cell of somebody else"
            positions = told[:, 2].tolist()
            assert positions[:prefix] == list(range(prefix)) and len(positions) == len(set(positions))
            kept.append(set(positions[prefix:]))
        return kept


def follow(name, page, private=False):
    """Decode all requests and compare after every round; ``private`` prompts are scored and may be evicted."""
    options, rule = CASES[name]
    policy = from_mapping({"policy": name.partition(",")[0], **options}).built_policy
    pool, histories = DecodePool(policy, page), {}
    for row, (prefix, prompt) in REQUESTS.items():
        pool.prefill(row, prompt)
        observed = min(prompt - prefix, 32) if private else 0
        keys, queries = (a.astype(np.float64) for a in STREAMS[row])
        histories[row] = dense.History(keys, queries, prefix, prompt - observed)
        histories[row].unseen = prompt - observed if private else 0
        histories[row].prompt = prompt if private else 0
        for _ in range(observed):
            histories[row].decode()
        if private:
            pool.observe(row, prefix)
    for step in range(STEPS):
        if step == 1:  # SGLang's hook sees a request from its second decode step on
            for row, (prefix, _) in REQUESTS.items():
                state = pool.ledger.open(f"r{row}", row, prefix, BUDGETS, pool.seq[row])
                if pool.seq[row] < state.due_at:  # then its window starts anew, without the first step
                    histories[row].since = pool.seq[row]
        due = [state for state in pool.ledger.requests.values() if pool.seq[state.row] >= state.due_at]
        if due:
            pool.round(due, policy, sinks=SINKS)
            for state in due:
                history = histories[state.row]
                history.prune(rule, BUDGETS, RECENT, page, SINKS)
                assert pool.kept(state.row) == history.kept, f"request {state.row}, round {len(history.rounds)}"
        pool.decode()
        for history in histories.values():
            history.decode()
    for row, history in histories.items():
        assert len(history.rounds) >= 6
        assert pool.kept(row) == history.kept
    assert pool.reused > 40 // page, "blocks must be used again, or stale states go unnoticed"
    pool.check_conservation()


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_every_round_keeps_what_the_dense_rule_keeps(name, page):
    follow(name, page)


@pytest.mark.parametrize("name", ["lethe", "lethe, every third step", "lazy"])
def test_a_private_prompt_is_scored_as_if_its_last_tokens_had_been_decoded(name):
    follow(name, page=1, private=True)
