"""A machine of random events over the real scheduler, allocator, prefix cache and rounds, against a naive model.

What runs is SGLang's own code and ours; only the model's forward is missing (``scheduler_world.py``). After every event
and every scheduler step the naive model works out everything anew (``naive_cache.py``).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("lethe_sglang.engine.runtime")

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from naive_cache import Naive
from scheduler_world import World, install_hooks, publish
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult

from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.engine.admission import LethePrefillAdder
from lethe_sglang.engine.runtime import Runtime

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", 3))
"""Machines of each mode; 9 are more than 10,000 steps in all, and take three times as long."""
SEED = 5
"""Chosen for many rounds and events; Hypothesis' own would change with every line of this file."""

seen = {}


def forget():
    seen.update(steps=0, rounds=0, events=0, retracted=0, preempted=0, failed=False, configurations=set())


@pytest.fixture(autouse=True, scope="module")
def hooked():
    with pytest.MonkeyPatch.context() as patch:
        install_hooks(patch)
        published = publish()
        retract, add = ScheduleBatch.retract_decode, LethePrefillAdder.add_one_req
        preempt = LethePrefillAdder.preempt_to_schedule

        def retract_decode(batch):
            if not seen["machine"].world.forced:
                seen["machine"].retracted()
            return retract(batch)

        def add_one_req(adder, req, **kwargs):
            first = not adder.can_run_list
            result = add(adder, req, **kwargs)
            if first and result is AddReqResult.NO_TOKEN and not adder.can_run_list:
                seen["machine"].refused(adder, req)
            return result

        def preempt_to_schedule(adder, req):
            preempted = preempt(adder, req)
            seen["preempted"] += preempted
            return preempted

        patch.setattr(LethePrefillAdder, "preempt_to_schedule", preempt_to_schedule)
        patch.setattr(ScheduleBatch, "retract_decode", retract_decode)
        patch.setattr(LethePrefillAdder, "add_one_req", add_one_req)
        yield
        published.restore()


REQUESTS = st.tuples(
    st.integers(0, 2),  # which prefix
    st.sampled_from((0, 3, 8, 17, 40)),  # how much of it
    st.lists(st.integers(10, 11), min_size=1, max_size=9),
    st.sampled_from((1, 9, 60, 110, 200)),  # max_new_tokens
    st.sampled_from((None, None, None, None, "none", "less", "more")),
    st.booleans(),  # ignore_eos
)
SCHEDULES = ("fcfs", "lpm", "lof", "dfs-weight", "hrrn", "shortest-prefill-first", "random", "routing-key")
"""``--schedule-policy``; the first is SGLang's default."""


class Machine(RuleBasedStateMachine):
    """Requests come and go; ``mode`` is ``rounds.when`` and ``budget.allocation``.

    ``schedule`` is the schedule policy, and whether there are priorities; ``large`` is what pages of 8 are instead.
    """

    mode, schedule, large = ("pressure", "uniform"), (SCHEDULES[0], False), 8

    @initialize(
        page=st.sampled_from((1, 8)),
        size=st.sampled_from((96, 160, 320)),
        budget=st.sampled_from((12, 20, 40)),
        interval=st.sampled_from((4, 8, 16)),
        prompt=st.sampled_from(("keep", "evict")),
        tree=st.booleans(),
        overlap=st.booleans(),
        chunk=st.sampled_from((None, 16)),
        ratio=st.sampled_from((1.0, 0.3)),
    )
    def start(self, page, size, budget, interval, prompt, tree, overlap, chunk, ratio):
        when, allocation = self.mode
        page = self.large if page == 8 else page
        shares = {"allocation": allocation}
        if allocation == "list":
            shares["layers"] = [budget // 2 + 3, budget, budget + budget // 2 - 3]
        else:
            shares["tokens"] = budget
        config = {
            "policy": "h2o",
            "budget": shares,
            "rounds": {"when": when, "interval": interval},
            "retain": {"sinks": 2, "prompt": prompt},
            "pool": {"states": "all"},
        }
        schedule, priorities = self.schedule
        tree = tree or schedule == "shortest-prefill-first"  # which SGLang refuses without
        self.world = World(
            config,
            page,
            size,
            rows=6,
            tree=tree,
            overlap=overlap,
            chunk=chunk,
            ratio=ratio,
            schedule=schedule,
            priorities=priorities,
        )
        self.naive = Naive(self.world)
        self.strict = ratio == 1.0 and chunk is None
        seen["machine"] = self
        seen["configurations"].add((when, allocation, page, tree, overlap))

    def step(self):
        seen["failed"] = True
        self.world.step()
        self.check()

    def check(self):
        seen["failed"] = True  # if the check raises, nothing drains any more
        self.naive.check()
        seen["steps"] += 1
        seen["failed"] = False

    def retracted(self):
        self.naive.check_retraction()
        assert not self.strict, "admission let somebody in for whom there is no room at the floors"

    def refused(self, adder, req):
        assert not (self.naive.pressure and self.naive.serves(adder, req)), f"{req.rid} waits though there is room"

    # -- events -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.world.waiting_queue) < 4)
    @rule(several=st.lists(REQUESTS, min_size=1, max_size=4))
    def arrive(self, several):
        config, most = self.lethe.config, self.world.max_total_num_tokens // 2
        budgets = {"less": config.min_request_budget, "more": config.budget.tokens + 9}
        for family, shared, tail, tokens, asked, ignore_eos in several:
            prompt = ([2 + family] * shared + tail)[:most]
            asked = {"budget": budgets[asked]} if asked in budgets else asked
            self.world.arrive(prompt, tokens, asked, ignore_eos)
        self.check()

    @precondition(lambda self: not self.world.idle())
    @rule(steps=st.sampled_from((1, 2, 4, 8, 16, 32)))
    def run(self, steps):
        for _ in range(steps):
            self.step()

    @precondition(lambda self: len(self.world.running_batch.reqs) > 2)
    @rule()
    def retract(self):
        self.world.retract()
        self.check()

    @precondition(lambda self: len(self.world.requests) > 1)
    @rule(which=st.integers(0, 8), abort=st.booleans())
    def end(self, which, abort):
        rids = list(self.world.requests)
        rid = rids[which % len(rids)]
        if abort:
            self.world.cancel(rid)
        else:
            self.world.ending.add(rid)
        self.step()

    @precondition(lambda self: self.mode[1] != "list")
    @rule(tokens=st.sampled_from((12, 20, 40)), interval=st.sampled_from((4, 16)), sure=st.integers(0, 3))
    def reconfigure(self, tokens, interval, sure):
        if not sure:
            self.world.reconfigure({"budget": {"tokens": tokens}, "rounds": {"interval": interval}})
            self.strict = False  # those that run may need more now than admission has reckoned with

    @precondition(lambda self: self.world.idle())
    @rule()
    def flush(self):
        self.world.flush()
        self.check()

    @precondition(lambda self: self.world.arrived > 12)
    @rule(go_on=st.integers(0, 5))
    def end_all(self, go_on):
        if not go_on:
            self.drain()

    def drain(self):
        world = self.world
        left = sum(req.sampling_params.max_new_tokens + 40 for req in world.requests.values())
        for _ in range(20 + 4 * left):
            if world.idle():
                break
            self.step()
        assert world.idle(), f"{list(world.requests)} do not end"
        assert not world.requests and not self.naive.tracks and not self.lethe.ledger.requests
        assert self.naive.available() == world.max_total_num_tokens, "the pool is not whole"
        self.lethe.ledger.flush()
        assert not self.lethe.ledger.table.any()

    @property
    def lethe(self):
        return self.world.lethe

    def teardown(self):
        if not seen["failed"]:
            self.drain()
            seen["rounds"] += self.naive.rounds
            seen["events"] += self.lethe.pressure.events
            seen["retracted"] += self.lethe.counters.retracted


MODES = [(when, allocation) for when in ("pressure", "always") for allocation in ("uniform", "list", "breakpoint")]


def run(examples, modes=MODES, phases=(Phase.generate,), derandomize=True, large=8):
    """Run machines of each mode; returns what they have seen.

    With ``Phase.shrink`` among the phases a failure becomes a small one, which takes minutes; other machines run each
    time that ``derandomize`` is false.
    """
    forget()
    for mode in modes:
        machine = type("Machine", (Machine,), {"mode": mode, "large": large})
        run_state_machine_as_test(
            seed(SEED)(machine) if derandomize else machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=phases,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )
    return seen


@pytest.mark.proves("chunked prefill")
def test_thousands_of_steps_agree_with_the_naive_model():
    found = run(EXAMPLES)
    assert found["steps"] >= (10_000 if EXAMPLES >= 9 else 1_000 * EXAMPLES), found
    assert found["rounds"] > 33 * EXAMPLES and found["events"] > 5 * EXAMPLES, found
    assert len(found["configurations"]) > 2 * EXAMPLES and found["retracted"], found


def test_pages_of_16_agree_with_the_naive_model():
    found = run(2, large=16)
    pages = {page for _, _, page, *_ in found["configurations"]}
    assert 16 in pages and found["rounds"] > 20 and found["steps"] > 1_000, found


@pytest.mark.proves("schedule policies")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_policy_agrees_with_the_naive_model(schedule):
    """Nine requests of three prefixes and three lengths, more than there are rows, under pressure."""
    forget()
    machine = type("Machine", (Machine,), {"schedule": (schedule, False)})()
    machine.start(1, 120, 12, 8, "keep", tree=True, overlap=True, chunk=None, ratio=1.0)
    for number in range(9):
        machine.world.arrive([2 + number % 3] * 8 + [20 + number], (60, 30, 90)[number // 3])
        machine.step()
    assert machine.world.waiting_queue, "nobody waits, so there is nothing to order"
    machine.drain()
    assert machine.naive.rounds >= 6 and machine.lethe.pressure.events, machine.naive.rounds


@pytest.mark.proves("priority scheduling")
@pytest.mark.parametrize("when", ["pressure", "always"])
@pytest.mark.parametrize("schedule", ["fcfs", "lof"])
def test_a_request_that_is_preempted_agrees_with_the_naive_model(when, schedule):
    """Six requests hold all rows, and have been evicted from, when one of a higher priority arrives."""
    forget()
    machine = type("Machine", (Machine,), {"mode": (when, "uniform"), "schedule": (schedule, True)})()
    machine.start(1, 320, 20, 8, "keep", tree=True, overlap=True, chunk=None, ratio=1.0)
    world = machine.world
    for first in range(2, 8):
        world.arrive([first] * 5, 110, priority=0)
    while machine.naive.rounds < 6:
        machine.step()
    assert len(world.running_batch.reqs) == 6
    urgent = world.arrive([9] * 5, 40, priority=1)
    while not urgent.output_ids:
        machine.step()
    assert seen["preempted"] == 1 and len(world.waiting_queue) == 1
    machine.drain()


@pytest.mark.parametrize(("before", "after", "prompt"), [(60, 12, 120), (12, 40, 68)])
def test_a_prefill_just_after_a_change_counts_on_the_new_floors(before, after, prompt):
    """Admission and the rounds that serve it reckon with one budget, though nobody has decoded since the change."""
    forget()
    machine = Machine()
    machine.start(1, 200, before, 16, "keep", tree=False, overlap=True, chunk=None, ratio=1.0)
    world = machine.world
    for first in (2, 3):
        world.arrive([first] * 5, 120)
    while not machine.lethe.pressure.events or world.token_to_kv_pool_allocator.available_size() > 20:
        machine.step()
    world.reconfigure({"budget": {"tokens": after}})
    events = machine.lethe.pressure.events
    world.arrive([7] * prompt, 1)
    machine.step()
    assert (machine.lethe.pressure.events > events) == (not world.waiting_queue)
    machine.drain()


def test_whom_the_result_in_flight_finishes_gives_nothing():
    """A request arrives at each of the steps around the last one of another, and needs what those that run can give."""
    while_finishing = 0
    for when in range(54, 64):
        forget()
        machine = Machine()
        machine.start(1, 150, 20, 4, "keep", tree=False, overlap=True, chunk=None, ratio=1.0)
        world, pressure = machine.world, machine.lethe.pressure
        for first, tokens in ((2, 60), (3, 110), (4, 110)):
            world.arrive([first] * 5, tokens)
        for _ in range(when):
            machine.step()
        finishing, events = world._reqs_finishing_inflight(world.running_batch), pressure.events
        world.arrive([7] * 15, 3)
        machine.step()
        while_finishing += bool(finishing) and pressure.events > events and not world.waiting_queue
        machine.drain()
    assert while_finishing, "nobody was let in while another finished"


def test_who_asked_for_more_keeps_it_where_the_share_is_less():
    """Requests whose own floor lies above the share that the others are left with."""
    forget()
    machine = Machine()
    machine.start(1, 96, 12, 4, "keep", tree=False, overlap=True, chunk=None, ratio=1.0)
    world, pressure, less = machine.world, machine.lethe.pressure, 0
    for first, asked in ((2, None), (3, {"budget": 30}), (4, None)):
        world.arrive([first] * 5, 110, asked, ignore_eos=True)
    while world.requests:
        before = pressure.events
        machine.step()
        less += pressure.events > before and len(world.running_batch.reqs) == 3 and pressure.share < 30
    assert less, "no share was below the floor of the one that asked for more"
    machine.drain()


def test_cached_prefixes_go_before_anybody_gives():
    """What a finished request has left in the tree makes room for those that run, and rounds come once it is gone."""
    forget()
    machine = Machine()
    machine.start(1, 160, 12, 4, "keep", tree=True, overlap=True, chunk=None, ratio=1.0)
    world, pressure, makes_room = machine.world, machine.lethe.pressure, 0
    world.arrive([2] * 60, 1)
    while world.requests:
        machine.step()
    assert world.tree_cache.evictable_size() >= 60
    for first in (3, 4):
        world.arrive([first] * 5, 110, ignore_eos=True)
    while world.requests:
        cached, events = world.tree_cache.evictable_size(), pressure.events
        machine.step()
        if world.tree_cache.evictable_size() < cached:
            makes_room += 1
            assert pressure.events == events
    assert makes_room and pressure.events, "either the tree or the requests gave nothing"
    machine.drain()


def shares_below_the_floor(patch):
    plan = Ledger.plan

    def halved(ledger, state, committed, budgets):
        if ledger.on_demand and any(budgets) and tuple(budgets) == state.budgets:
            budgets = tuple(max(k - 1, state.rest + 1) for k in budgets)
        return plan(ledger, state, committed, budgets)

    patch.setattr(Ledger, "plan", halved)


def a_block_freed_twice(patch):
    carry_out = Runtime.carry_out

    def twice(runtime, planned, allocator):
        state = planned[0][0]
        carry_out(runtime, planned, allocator)
        if state.layout.packed:
            first = runtime.req_to_token[state.row, state.layout.prefix : state.layout.prefix + runtime.page_size]
            allocator.free_segment(first.long(), start_pos=0)

    patch.setattr(Runtime, "carry_out", twice)


def a_block_forgotten(patch):
    live = Ledger.live

    def shorter(ledger, row, ranges):
        (start, end), *others = live(ledger, row, ranges) or [(0, 0)]
        followed = row in ledger.requests and ledger.requests[row].rounds
        return [(start + (ledger.page_size if followed else 0), end), *others]

    patch.setattr(Ledger, "live", shorter)


FAULTS = {
    "a share below a floor": (shares_below_the_floor, "a share below a floor"),
    "a block freed twice": (a_block_freed_twice, r"are owned \[2|reads (other positions|cells of somebody else)"),
    "a block forgotten": (a_block_forgotten, r"are owned \[0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, fault):
    plant, message = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        run(20, modes=MODES[:1])
