"""A miniature of SGLang's pool for tests: rows, a page allocator and cells that know their (layer, position)."""

from __future__ import annotations

import random

import torch

from lethe_sglang.cache.layout import pinned_cells, protected
from lethe_sglang.cache.ledger import Ledger, RequestState
from lethe_sglang.cache.rounds import run_round
from lethe_sglang.kernels.common import Cells, token_lists
from lethe_sglang.kernels.table import read


class MiniPool:
    """Rows and slots as SGLang hands them out; every written cell holds its request, layer and position."""

    def __init__(self, num_layers=3, page=1, pages=400, context=600, rows=9, recent=6, interval=8, seed=0, narrow=None):
        self.rng = random.Random(seed)
        self.page, self.num_layers = page, num_layers
        blocks = pages * page + page
        cells = num_layers * blocks
        self.cells = Cells(
            key=torch.full((cells, 1, 4), -1.0),
            value=torch.full((cells, 1, 4), -1.0),
            score=torch.zeros(cells),
            position=torch.zeros(cells, dtype=torch.int32),
            memory=torch.zeros(cells),
            num_layers=num_layers,
            blocks=blocks,
        )
        self.req_to_token = torch.zeros((rows, context), dtype=torch.int32)
        self.free = list(range(1, pages + 1))
        self.total = pages
        self.rng.shuffle(self.free)
        self.ledger = Ledger(rows, num_layers, page, recent, interval, "cpu", narrow=narrow)
        self.seq = {}
        self.truth = {}

    def write(self, row, position):
        """Append one token: allocate its slot like SGLang, write K, V and score of every layer."""
        if position % self.page == 0:
            page = self.free.pop()
            self.last = {**getattr(self, "last", {}), row: page}
        slot = self.last[row] * self.page + position % self.page
        self.req_to_token[row, position] = slot
        for layer in range(self.num_layers):
            cell = layer * self.cells.blocks + slot
            self.cells.key[cell] = torch.tensor([row, layer, position, 0.0])
            self.cells.value[cell] = torch.tensor([row, layer, position, 1.0])
            self.cells.score[cell] = self.score(row, layer, position)
        self.seq[row] = position + 1

    def score(self, row, layer, position):
        """A fixed pseudo-random score of a token."""
        return random.Random(f"{row} {layer} {position}").random()

    def admit(self, row, length, prefix, budgets, prompt=0):
        """Follow a request of which the tree owns ``prefix`` positions and whose first ``prompt`` are kept."""
        for position in range(length):
            self.write(row, position)
        prefix, rest = protected(prefix, prompt, self.page)
        state = self.ledger.open(f"r{row}", row, prefix, budgets, rest=rest)
        self.truth[row] = [set(range(prefix, length)) for _ in range(self.num_layers)]
        return state

    def append(self, row):
        position = self.seq[row]
        self.write(row, position)
        for kept in self.truth[row]:
            kept.add(position)

    def round(self, states: list[RequestState], policy, sinks=2, budgets=None, own_sinks=0):
        for state in states:
            state.pinned = pinned_cells(state.layout.prefix, state.rest, sinks, own_sinks)
        plans = [self.ledger.plan(s, self.seq[s.row], budgets[s.row] if budgets else s.budgets) for s in states]
        result = run_round(plans, self.cells, self.req_to_token, policy)
        self.mass = result.mass
        freed = (result.freed[:: self.page] // self.page).tolist()
        assert len(freed) * self.page == result.freed.numel(), "freed slots are not whole pages"
        assert not set(freed) & set(self.free) and len(set(freed)) == len(freed), "double free"
        self.free += freed
        self.rng.shuffle(self.free)
        for state, plan in zip(states, plans, strict=True):
            self.ledger.commit(state, plan)
            state.layout.check(self.page, self.num_layers, state.kept, self.seq[state.row])
        self.ledger.flush()
        return plans

    def lists(self, rows):
        """Token lists of all layers for the rows as decode would build them."""
        self.ledger.flush()
        index = torch.tensor(rows)
        at = read(self.ledger.table[index])
        seq = torch.tensor([self.seq[r] for r in rows])
        width = int((at.prefix + at.kept.amax(1) + seq - at.tail).max())
        blocks = self.cells.blocks
        return token_lists(self.req_to_token, index, seq, at.spans, blocks, width)

    def check_conservation(self, owned_pages=0):
        """Free pages plus live row entries are all pages, none twice."""
        live = set()
        for row, state in self.ledger.requests.items():
            for lo, hi in state.layout.live([(0, self.seq[row])]):
                pages = {int(s) // self.page for s in self.req_to_token[row, lo:hi]}
                assert not pages & live
                live |= pages
        assert 0 not in live
        assert not live & set(self.free)
        assert len(live) + len(self.free) == self.total
