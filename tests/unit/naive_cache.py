"""What a cache under eviction has to look like, worked out again from scratch after every step, with sets and loops.

It knows the rules of ``docs/architecture.md`` and nothing of how the engine keeps its books: who owns each page, which
positions each layer of each request keeps, what a share of the pool is, and what admission may promise.
"""

from __future__ import annotations

import numpy as np
import torch
from scheduler_world import LAYERS, SCORES

from lethe_sglang.allocation.budgets import scale
from lethe_sglang.kernels.common import token_lists
from lethe_sglang.kernels.table import read
from lethe_sglang.observers.base import Observer


def floor_to(value, page):
    return value // page * page


def ceil_to(value, page):
    return -(-value // page) * page


class Track:
    """What a request keeps since its first round: P, the rest of its prompt, m, T, and positions per layer."""

    def __init__(self, prefix, rest):
        self.prefix, self.rest, self.packed, self.tail = prefix, rest, 0, prefix
        self.kept = [set() for _ in range(LAYERS)]


class Naive(Observer):
    """The model of a :class:`~scheduler_world.World`; it raises where the world differs."""

    def __init__(self, world):
        self.world, self.lethe = world, world.lethe
        self.page, self.tracks, self.checks, self.rounds = world.page_size, {}, 0, 0
        self.event = self.batch = None
        self.pressure = self.config.rounds.by_pressure
        self.adaptive = self.config.budget.allocation == "breakpoint"
        budgets = self.lethe.budgets
        mean = -(-sum(budgets) // LAYERS)
        self.narrow = [not self.adaptive and k <= mean for k in budgets]
        self.lethe.observers.append(self)
        world.watch = self.check_lists
        pressure = self.lethe.pressure
        self._relieve, pressure.relieve = pressure.relieve, self.relieve
        self._before = pressure.before_decode, pressure.before_prefill
        pressure.before_decode, pressure.before_prefill = self.before_decode, self.before_prefill

    @property
    def config(self):
        return self.lethe.config

    @property
    def interval(self):
        return ceil_to(self.config.rounds.interval, self.page)

    # -- arithmetic -------------------------------------------------------------------------------------------------

    def budget(self, req):
        return self.lethe.override_of(req).budget

    def limits(self, mean, rest):
        """Most cells of each layer where they keep ``mean`` besides the recent window."""
        budgets = self.lethe.budgets
        scaled = budgets if mean == self.config.scored else scale(budgets, mean, self.config.floor)
        return [k + rest for k in scaled]

    def blocks(self, kept):
        """m of what the layers keep."""
        own = max((k for k, narrow in zip(kept, self.narrow, strict=True) if narrow), default=0)
        return ceil_to(max(-(-sum(kept) // LAYERS), own), self.page)

    def track(self, req):
        """What is known of a request that is followed; before its first round it keeps everything."""
        if req.kv.req_pool_idx in self.tracks:
            return self.tracks[req.kv.req_pool_idx]
        prompt = len(req.origin_input_ids) if self.config.retain.prompt == "keep" else 0
        prefix = max(req.kv.cache_protected_len, floor_to(prompt, self.page))
        return Track(prefix, max(prompt - prefix, 0))

    def plan(self, req, share):
        """What a round down to a share would leave: k_l, T, and the blocks it frees. ``share`` 0 is the floor.

        It frees nothing of a request that holds no more, whatever its single layers hold.
        """
        track, committed = self.track(req), req.kv.kv_committed_len
        tail = max(floor_to(committed - self.config.recent, self.page), track.tail)
        limits = self.limits(max(share, self.budget(req) - self.config.recent), track.rest)
        candidates = [len(kept) + tail - track.tail for kept in track.kept]
        kept = [min(k, n) for k, n in zip(limits, candidates, strict=True)]
        held = track.packed + tail - track.tail
        share = max(share, self.budget(req) - self.config.recent)
        above = held > ceil_to(share + track.rest, self.page)
        return kept, tail, held - self.blocks(kept) if above else 0

    def available(self):
        return self.world.token_to_kv_pool_allocator.available_size() + self.world.tree_cache.evictable_size()

    def own(self, req):
        """Blocks that a request holds and the tree does not own (its last page may not be full)."""
        kv, track = req.kv, self.tracks.get(req.kv.req_pool_idx)
        dead = track.tail - track.prefix - track.packed if track else 0
        return kv.kv_allocated_len - kv.cache_protected_len - dead

    def bound(self, req, tree):
        """Most blocks that a request needs beside the tree's, at its floor."""
        prompt = len(req.origin_input_ids) if self.config.retain.prompt == "keep" else 0
        prefix = max(tree, floor_to(prompt, self.page))
        scaled = self.limits(self.budget(req) - self.config.recent, 0)
        widest = max((k for k, narrow in zip(scaled, self.narrow, strict=True) if narrow), default=0)
        budget = max(self.budget(req), self.config.recent + widest) + max(prompt - prefix, 0)
        return prefix - tree + budget + self.interval + 2 * self.page

    # -- rounds -----------------------------------------------------------------------------------------------------

    def givers(self):
        batch = self.world.now_running
        finishing = self.world._reqs_finishing_inflight(batch)
        rows = self.lethe.ledger.requests
        return [
            req
            for req in batch.reqs
            if req.kv.req_pool_idx in rows and self.lethe.evicts(req) and not req.finished() and req not in finishing
        ]

    def before_decode(self, scheduler, batch, fence):
        """Note what is about to be allocated: a block, or a page, for each that decodes."""
        finishing = self.world._reqs_finishing_inflight(batch)
        going_on = [req for req in batch.reqs if req not in finishing]
        demand = sum(self.page for req in going_on if req.kv.kv_committed_len % self.page == 0)
        self.demand = 0 if finishing else demand, len(going_on)  # memory comes back in a moment
        self._before[0](scheduler, batch, fence)

    def before_prefill(self, batch):
        """Note what is about to be allocated: the pages of the prompts less those of their prefixes."""
        demand = [ceil_to(req.extend_end, self.page) - ceil_to(req.prefix_len, self.page) for req in batch.reqs]
        self.demand = sum(demand), len(demand) + len(self.world.now_running.reqs)
        self._before[1](batch)

    def relieve(self, givers, lacking, steppers, allocator, fence):
        """Work out the event by brute force, let it happen, and compare."""
        demand, stepping = self.demand
        assert self.pressure and demand > self.available(), "an event while the pool had room"
        assert (lacking, steppers) == (demand - self.available(), stepping), "it is not that which is missing"
        mine = self.givers()
        assert {req.rid for req, _ in givers} == {req.rid for req in mine}, "somebody else gives"
        needed = lacking + steppers * self.interval
        shares = range(max((req.kv.kv_committed_len for req in mine), default=0), -1, -1)
        plans = [(share, self.round(mine, share)) for share in shares]
        right = next(((s, p) for s, p in plans if sum(freed for *_, freed in p.values()) >= needed), plans[-1])
        self.event, before = {}, self.world.token_to_kv_pool_allocator.available_size()
        self._relieve(givers, lacking, steppers, allocator, fence)
        given = self.world.token_to_kv_pool_allocator.available_size() - before
        happened, self.event = self.event, None
        if self.adaptive:
            return
        assert given >= needed or not self.round(mine, 0), "less was freed than was needed, though somebody had it"
        allowed = [right] if len(set(self.lethe.budgets)) == 1 else plans
        kept = [(share, {row: plan[0] for row, plan in p.items()}) for share, p in allowed]
        assert any(happened == k for _, k in kept), f"kept {happened}, where the share {right[0]} leaves {right[1]}"

    def round(self, reqs, share):
        """What a round of all requests above a share would do, by row."""
        plans = {req.kv.req_pool_idx: self.plan(req, share) for req in reqs}
        return {row: plan for row, plan in plans.items() if plan[2] > 0}

    def on_round(self, states, plans, result):
        """Do to the sets what the round has done to the cells."""
        self.rounds += 1
        assert not self.pressure or self.event is not None, "a round while the pool had room"
        reqs = {req.kv.req_pool_idx: req for req in self.world.requests.values() if req.kv.holds_kv}
        for plan in plans:
            req = reqs[plan.row]
            track = self.tracks[plan.row] = self.track(req)
            assert (plan.prefix, plan.old_packed, plan.old_tail) == (track.prefix, track.packed, track.tail)
            floors, tail, _ = self.plan(req, 0)
            assert plan.new_tail == tail
            if self.event is not None:
                self.event[plan.row] = list(plan.kept)
            elif not self.adaptive:
                assert list(plan.kept) == floors, f"kept {plan.kept} where the budget leaves {floors}"
            least = [min(self.config.floor, k) for k in floors] if self.adaptive else floors
            assert all(k >= f for k, f in zip(plan.kept, least, strict=True)), "a share below a floor"
            pinned = max(self.config.retain.sinks - track.prefix, track.rest + self.config.retain.own_sinks)
            for layer in range(LAYERS):
                candidates = sorted(track.kept[layer] | set(range(track.tail, tail)))
                ranked = sorted(candidates[pinned:], key=lambda p, layer=layer: SCORES[layer, p], reverse=True)
                track.kept[layer] = set((candidates[:pinned] + ranked)[: plan.kept[layer]])
            track.tail, track.packed = tail, self.blocks(plan.kept)

    def on_close(self, rows):
        for row in rows:
            self.tracks.pop(row, None)

    # -- what is checked --------------------------------------------------------------------------------------------

    def check_lists(self, batch):
        """Compare what attention would read of a decode step with the sets, cell by cell."""
        world, lengths = self.world, batch.seq_lens_cpu
        rows = batch.req_pool_indices_cpu
        at = read(self.lethe.ledger.table[rows])
        width = int((at.prefix + at.kept.amax(1) + lengths - at.tail).max())
        lists = token_lists(world.req_to_token_pool.req_to_token, rows, lengths, at.spans, world.cells.blocks, width)
        cells, length = lists.cells.numpy(), lists.length.numpy()
        key = world.cells.key.numpy()[:, 0]
        for i, (req, seq) in enumerate(zip(batch.reqs, lengths.tolist(), strict=True)):
            track, hashes = self.tracks.get(req.kv.req_pool_idx), np.array(world.hashes[req.rid])
            for layer in range(LAYERS):
                found = cells[layer, i, : length[layer, i]]
                wanted = list(range(seq))
                if track:
                    wanted = [*range(track.prefix), *sorted(track.kept[layer]), *range(track.tail, seq)]
                content = key[found]
                content = content[content[:, 0].argsort()]
                assert content[:, 0].tolist() == wanted, f"{req.rid} reads other positions in layer {layer}"
                same = (content[:, 1] == layer) & (content[:, 2] == hashes[wanted])
                assert same.all(), f"{req.rid} reads cells of somebody else in layer {layer}"
                assert len(set(found.tolist())) == len(found), "a cell is read twice"

    def check(self):
        """Work out who owns every page and see that somebody does, once."""
        world, page = self.world, self.page
        self.checks += 1
        allocator, rows = world.token_to_kv_pool_allocator, world.req_to_token_pool.req_to_token.numpy()
        pages = world.max_total_num_tokens // page
        owned = np.zeros(pages + 1, dtype=int)
        free = (
            torch.cat((allocator.free_pages, allocator.release_pages)) if page == 1 else allocator.get_all_free_pages()
        )
        np.add.at(owned, free.numpy(), 1)
        tree = np.array([], dtype=int)
        if not world.tree_cache.disable:
            slots = world.tree_cache.all_values_flatten().numpy()
            tree = slots[::page] // page
            np.add.at(owned, np.unique(slots // page), 1)
            assert len(slots) == world.tree_cache.evictable_size() + world.tree_cache.protected_size()
        held = set()
        for req in world.requests.values():
            kv = req.kv
            if not kv.holds_kv:
                continue
            assert kv.req_pool_idx not in held, "two requests share a row"
            held.add(kv.req_pool_idx)
            row, tracked = rows[kv.req_pool_idx], self.tracks.get(kv.req_pool_idx)
            assert np.isin(row[: kv.cache_protected_len] // page, tree).all(), "a prefix that the tree does not own"
            own = [(kv.cache_protected_len, kv.kv_allocated_len)]
            if tracked:
                end = tracked.prefix + tracked.packed
                own = [(kv.cache_protected_len, end), (tracked.tail, kv.kv_allocated_len)]
                assert not row[end : tracked.tail].any(), "a dead position owns a block"
            for start, stop in own:
                slots = row[start:stop]
                assert (slots % page == np.arange(start, stop) % page).all(), "a page is out of order"
                np.add.at(owned, slots[::page] // page, 1)
        free_rows = set(world.req_to_token_pool.free_slots)
        assert not held & free_rows and len(held) + len(free_rows) == world.max_running_requests, "rows"
        assert set(self.lethe.ledger.requests) <= held, "the ledger follows a row that nobody holds"
        wrong = np.flatnonzero(owned[1:] != 1) + 1
        assert not len(wrong), f"pages {wrong.tolist()} are owned {owned[wrong].tolist()} times"

    def check_retraction(self):
        """See that nobody is retracted while somebody is above their floor."""
        if self.pressure and not self.adaptive:
            above = [req.rid for req in self.givers() if self.plan(req, 0)[2] > 0]
            assert not above, f"a retraction while {above} are above their floors"

    def serves(self, adder, req):
        """Whether the pool could serve a request that waits, whatever those that run still need at their floors."""
        if not self.lethe.evicts(req) and req.sampling_params.ignore_eos and self.world.tree_cache.disable:
            return False  # stock simulates how everybody grows, and knows nothing of eviction
        left = self.available() - req.prefix_len  # its own prefix may be counted among what nobody uses
        for other in self.world.now_running.reqs:
            growth = other.sampling_params.max_new_tokens - len(other.output_ids)
            if not self.lethe.evicts(other):
                left -= growth
                continue
            followed = other.kv.req_pool_idx in self.lethe.ledger.requests
            private = other.skip_radix_cache_insert or self.world.tree_cache.disable
            tree = other.kv.cache_protected_len
            if followed or private:
                lacking = self.bound(other, tree) - self.own(other)
            else:
                tree = floor_to(len(other.origin_input_ids), self.page)
                lacking = self.bound(other, tree)
            left -= min(growth, max(lacking, self.page))
            if followed and other in self.givers():
                left += max(-lacking, 0)
        fill = len(req.full_untruncated_fill_ids)
        growth = req.sampling_params.max_new_tokens - len(req.output_ids)
        if self.lethe.evicts(req):
            private = req.skip_radix_cache_insert or self.world.tree_cache.disable
            tree = req.kv.cache_protected_len if private else floor_to(len(req.origin_input_ids), self.page)
            need = max(self.bound(req, tree) - (fill - tree), 2 * self.page) if private else self.bound(req, tree)
            growth = min(growth, need)
        if req.sampling_params.ignore_eos and self.world.tree_cache.disable:  # stock asks for whole pages of these
            fits = ceil_to(fill - req.prefix_len, self.page) + self.page <= left
            return fits and fill + growth + self.page < left
        return fill - req.prefix_len + growth + self.page < left
