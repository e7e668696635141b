"""The live quality signal: its arithmetic, what is recorded, and when a probe may run, over SGLang's real scheduler."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lethe_sglang.engine.runtime")

from scheduler_world import World, install_hooks, publish
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.logprob_result_processor import SchedulerLogprobResultProcessor
from sglang.srt.runtime_context import get_parallel

from lethe_sglang.config import ConfigError
from lethe_sglang.engine import quality
from lethe_sglang.engine.monitor import PENDING
from lethe_sglang.engine.quality import UNPRUNED, Allowance, Quality, draws, k3, label, window

WORDS = 1100
"""Columns of the doubles' logits; the world's tokens are smaller numbers."""


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_the_mean_of_k3_over_samples_is_the_divergence():
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 2.0):
        q, p = (np.exp(rng.normal(0, spread, 50)) for _ in range(2))
        q, p = q / q.sum(), p / p.sum()
        values = [k3(math.log(b), math.log(a)) for a, b in zip(q, p, strict=True)]
        assert min(values) >= 0
        assert sum(a * v for a, v in zip(q, values, strict=True)) == pytest.approx(float((q * np.log(q / p)).sum()))
    assert k3(-1.25, -1.25) == 0
    assert k3(-1.0, -1.001) == pytest.approx(0.001**2 / 2, rel=1e-3), "a small difference is lost to rounding"
    assert k3(0.0, -900.0) == math.expm1(20) - 20 and k3(-math.inf, -1.0) == math.expm1(-20) + 20


@pytest.mark.parametrize(
    ("steps", "group"), [(0, "0-15"), (15, "0-15"), (16, "16-63"), (63, "16-63"), (64, "64+"), (900, "64+")]
)
def test_steps_are_grouped(steps, group):
    assert label("pressure", steps) == ("pressure", group)


def test_a_request_id_says_whether_it_is_sampled_and_where_it_is_read_independently():
    drawn = np.array([draws(f"request-{i}") for i in range(20_000)])
    assert draws("request-7") == draws("request-7")
    few = drawn[drawn[:, 0] < 0.05]
    assert 0.045 < len(few) / len(drawn) < 0.055
    assert abs(few[:, 1].mean() - 0.5) < 0.03 and few[:, 1].min() < 0.01 and few[:, 1].max() > 0.99
    assert drawn.min() >= 0 and drawn.max() < 1


def test_a_window_holds_tokens_after_a_round_and_every_place_is_reached(monkeypatch):
    monkeypatch.setattr(quality, "WINDOW", 10)
    assert window(30, 30, 0.5) is None
    for first, count in ((0, 5), (3, 40), (35, 40), (39, 40), (0, 10)):
        found = [window(first, count, place / 100) for place in range(100)]
        for start, end in found:
            assert 0 <= start < end <= count and end > first and end - start == min(10, count)
        assert max(end for _, end in found) == count
        assert len(set(found)) == max(count - 10, 0) - min(first, max(count - 10, 0)) + 1


def test_the_tokens_of_a_minute_are_bounded():
    allowance, rng, now, started = Allowance(), random.Random(0), 0.0, []
    for _ in range(500):
        now += rng.random() * 10
        tokens = rng.randrange(1, 400)
        if tokens <= allowance.left(now, 1000):
            allowance.spend(now, tokens)
            started.append((now, tokens))
        assert sum(n for at, n in started if at > now - 60) <= 1000
    assert sum(n for _, n in started) > 0.5 * 1000 * now / 60


def test_sums_are_means_by_group():
    found = Quality()
    for group, value, agrees in ((UNPRUNED, 0.0, True), (label("interval", 3), 1.0, False)):
        found.add(group, value, agrees)
    found.add(label("interval", 4), 0.5, True)
    assert found.report() == [
        {"reason": "interval", "steps": "0-15", "tokens": 2, "k3": 0.75, "agreement": 0.5},
        {"reason": "none", "steps": "none", "tokens": 1, "k3": 0.0, "agreement": 1.0},
    ]


# -- a scheduler with logits ------------------------------------------------------------------------------------------


@functools.cache
def full(position):
    """What the full cache says of the token at a position."""
    return 3 * torch.randn(WORDS, generator=torch.Generator().manual_seed(position))


@functools.cache
def evicted(position):
    """What a server that has evicted something says of it."""
    return full(position) + torch.randn(WORDS, generator=torch.Generator().manual_seed(10_000 + position))


class Monitored(World):
    """A world whose forward has logits: full ones, and others from a request's first round on."""

    def __init__(self, fraction=1.0, per_minute=1 << 20, **kwargs):
        config = {
            "policy": "h2o",
            "budget": {"tokens": 20},
            "rounds": {"interval": kwargs.pop("interval", 4), "when": kwargs.pop("when", "always")},
            "retain": {"sinks": 2, "prompt": kwargs.pop("prompt", "keep")},
            "monitor": {"fraction": fraction, "tokens_per_minute": per_minute},
        }
        super().__init__(config, **kwargs)
        self.flush_wrapper, self.max_req_input_len = SimpleNamespace(_pending=None), 390
        self.tp_worker.model_runner.sampling_observer = None
        self.streamed, self.probed, self.compared = [], [], []
        self.monitor = self.lethe.monitor
        self.monitor.start(self)
        add = self.monitor.quality.add
        self.monitor.quality.add = lambda *said: (self.compared.append(said), add(*said))
        self.batch_result_processor = dataclasses.replace(
            self.batch_result_processor,
            logprob_result_processor=SchedulerLogprobResultProcessor(model_config=self.model_config),
            output_streamer=SimpleNamespace(stream_output=self.stream),
        )

    def stream(self, reqs, *args):
        """As SGLang's streamer, which leaves out what is marked as streamed."""
        self.streamed += [req.rid for req in reqs if not (req.finished() and req.finished_output)]

    def get_new_batch_prefill(self, running_batch):
        return self.monitor.admit(World.get_new_batch_prefill, self, running_batch)

    def step(self):
        for message in self.monitor.offer(self):
            self.monitor.accept(self, message)
        return super().step()

    def run(self, steps=600):
        """Step until nothing is left to do and no probe waits."""
        for _ in range(steps):
            self.step()
            if self.idle() and not self.monitor.pending and self.monitor._entry is None:
                return
        raise AssertionError("it does not end")

    def sample(self, req, position):
        return 7 if hasattr(req, "_kv_probe") else super().sample(req, position)

    def forward(self, batch):
        result, observer = super().forward(batch), self.tp_worker.model_runner.sampling_observer
        self.monitor.note(batch)
        logits = []
        for req, length in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True):
            state = self.lethe.ledger.requests.get(req.kv.req_pool_idx)
            logits.append(evicted(length) if state is not None and state.rounds else full(length))
        result.logits_output = LogitsProcessorOutput(next_token_logits=torch.stack(logits))
        result.extend_input_len_per_req = batch.extend_lens
        result.extend_logprob_start_len_per_req = batch.extend_logprob_start_lens
        if observer is not None and observer.is_active(None):
            seen = observer.before_grammar(result.logits_output.next_token_logits, None)
            result.logits_output.next_token_logits.zero_()  # the sampler works in place
            said = observer.after_sample(seen, result.next_token_ids)
            result.auxiliary_host_output = said.copy_to_host(torch.clone)
        if batch.return_logprob:
            self.prefill(batch, result.logits_output)
        return result

    def prefill(self, batch, output):
        """A probe's prefill: log-probabilities of the tokens behind each position, the last of which is nobody's."""
        (req,) = batch.reqs
        assert req.kv.req_pool_idx not in self.lethe.ledger.requests and not self.lethe.ledger.observed
        self.probed.append(req)
        positions = range(req.prefix_len + batch.extend_logprob_start_lens[0] + 1, req.extend_end + 1)
        ids = [*req.origin_input_ids, 0]
        rows = [full(position).log_softmax(0) for position in positions]
        output.input_token_logprobs = torch.stack([row[ids[p]] for row, p in zip(rows, positions, strict=True)])
        output.input_top_logprobs_val = [[[float(row.max())] for row in rows]]
        output.input_top_logprobs_idx = [[[int(row.argmax())] for row in rows]]

    def held(self):
        """Blocks that are neither free nor the prefix cache's."""
        free = self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size()
        return self.max_total_num_tokens - free


@pytest.fixture(autouse=True, scope="module")
def hooked():
    with pytest.MonkeyPatch.context() as patch:
        install_hooks(patch)
        published = publish()
        with get_parallel().override(tp_rank=0):
            yield
        published.restore()


PROMPT = list(range(10, 23))


def expected(req, places):
    """What a probe of a request has to find: its tokens' groups are known from what they say."""
    prompt, found = len(req.origin_input_ids), []
    for place in places:
        position, token = prompt + place, req.output_ids[place]
        p, full_first = full(position).log_softmax(0), int(full(position).argmax())
        told = req._kv_quality.told[place]
        q = (full if told.label == UNPRUNED else evicted)(position).log_softmax(0)
        value = pytest.approx(k3(float(p[token]), float(q[token])), rel=1e-4, abs=1e-6)
        found.append((told.label, value, full_first == int(q.argmax())))
    return found


@pytest.mark.parametrize(
    ("page", "overlap", "tree", "when"),
    [
        (1, True, True, "always"),
        (8, False, True, "always"),
        (1, False, False, "always"),
        (8, True, False, "pressure"),
        (1, True, True, "pressure"),
    ],
)
def test_every_token_is_compared_with_its_own_position_also_after_a_retraction(page, overlap, tree, when):
    size = 240 if when == "pressure" else 400
    prompt = "keep" if tree else "evict"
    world = Monitored(page=page, overlap=overlap, tree=tree, when=when, size=size, prompt=prompt)
    req, other = world.arrive(PROMPT, 150, ignore_eos=True), world.arrive(PROMPT[:6], 150)
    other._kv_quality = None
    for step in range(40):
        world.step()
        if step == 30 and when == "always":
            world.retract()  # the youngest that runs
            assert req.retraction_count + other.retraction_count > 0
    while not (req.finished() and other.finished()):
        world.step()
    at_rest = world.tree_cache.total_size()
    world.run()
    assert world.monitor.probes == 1 and world.monitor.skipped == {}
    (probe,) = world.probed
    assert [*probe.origin_input_ids] == [*PROMPT, *req.output_ids]
    assert world.compared == expected(req, range(len(req.output_ids)))
    reason = "interval" if when == "always" else "pressure"
    groups = {group for group, _, _ in world.compared}
    assert UNPRUNED in groups and {g.reason for g in groups - {UNPRUNED}} == {reason}
    assert all(value < 1e-5 and agrees for group, value, agrees in world.compared if group == UNPRUNED)
    assert sum(value for group, value, _ in world.compared if group != UNPRUNED) > 1
    assert world.tree_cache.total_size() == at_rest, "a probe was inserted into the tree"
    assert world.held() == 0 and not [rid for rid in world.streamed if "probe" in rid]
    assert world.lethe.counters.closed <= 3, "a probe was followed as a request"


def test_steps_are_counted_from_the_step_of_the_round():
    world = Monitored(size=400, interval=20)
    req = world.arrive(PROMPT, 130, ignore_eos=True)
    rounds, since = 0, {}
    while not req.finished():
        before = world.lethe.counters.rounds
        place = len(req.output_ids) + (world.last_batch is not None)  # under overlap one token is in flight
        world.step()
        rounds += world.lethe.counters.rounds > before
        since[place] = 0 if world.lethe.counters.rounds > before else since.get(place - 1, -99) + 1
    assert rounds > 3
    told = req._kv_quality.told
    for place, steps in since.items():
        if place in told:
            assert told[place].label == (UNPRUNED if steps < 0 else label("interval", steps)), (place, steps)
    assert {steps for _, steps in {told.label for told in told.values()}} == {"none", "0-15", "16-63"}


def test_what_is_recorded_is_what_the_model_said_before_the_sampler():
    done = []
    recorder = quality.Recorder(done.append)
    assert not recorder.is_active(None)
    reqs = [SimpleNamespace(_kv_quality=quality.Record(0.0, 0), finished=lambda end=i == 2: end) for i in range(3)]
    recorder.noted = [quality.Noted(line, reqs[i], UNPRUNED) for line, i in ((0, 0), (2, 1), (3, 2))]
    assert recorder.is_active(None)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    raw, tokens = logits.log_softmax(1), torch.tensor([3, 1, 4, 1, 5])
    step = recorder.before_grammar(logits, None)
    logits.div_(0.7).softmax(1)
    logits.zero_()
    said = recorder.after_sample(step, tokens)
    recorder.noted = []  # the next step is noted before this one is processed
    host = said.copy_to_host(torch.clone)
    commit = SimpleNamespace(output_index=17)
    host.consume(None, [commit, None, None, commit, None])
    for i, line in ((0, 0), (2, 3)):
        told = reqs[i]._kv_quality.told
        assert [*told] == [17]
        assert told[17].logprob == pytest.approx(float(raw[line, tokens[line]]), abs=1e-5)
        assert told[17].likeliest == int(raw[line].argmax())
    assert reqs[1]._kv_quality.told == {}, "a token that nobody got was kept"
    assert done == [reqs[2]]


# -- who is sampled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"grammar": object()},
        {"custom_logit_processor": "x"},
        {"multimodal_inputs": object()},
        {"input_embeds": [[0.0]]},
        {"positional_embed_overrides": object()},
        {"sampling_params.logit_bias": {"1": 2.0}},
        {"sampling_params.frequency_penalty": 0.1},
        {"sampling_params.presence_penalty": 0.1},
        {"sampling_params.repetition_penalty": 1.1},
        {"sampling_params.min_new_tokens": 2},
        {"_kv_evict": "none"},
        {"beam_group": object()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_requests_of_which_log_q_says_little_are_not_sampled(change):
    world = Monitored()
    req = world.arrive(PROMPT, 10)
    assert req._kv_quality is not None
    other = copy.copy(req)
    other.sampling_params = copy.copy(req.sampling_params)
    del other._kv_quality
    ((name, value),) = change.items()
    owner = other
    if name.startswith("sampling_params."):
        owner, name = other.sampling_params, name.partition(".")[2]
    if name == "_kv_evict":
        world.lethe.override_of(other)
        value = (other._kv_evict[0], *[dataclasses.replace(o, mode="none") for o in other._kv_evict[1:]])
    setattr(owner, name, value)
    world.monitor.sample(other)
    assert other._kv_quality is None


def test_a_part_of_the_requests_is_sampled_and_a_retraction_does_not_draw_again():
    world = Monitored(fraction=0.3)
    req = world.arrive(PROMPT, 10)
    kept = req._kv_quality
    sampled = 0
    for number in range(400):
        other = copy.copy(req)
        del other._kv_quality
        other.rid = f"n{number}"
        world.monitor.sample(other)
        assert (other._kv_quality is not None) == (draws(other.rid)[0] < 0.3)
        sampled += other._kv_quality is not None
    assert 80 < sampled < 160
    world.monitor.sample(req)
    assert req._kv_quality is kept


def test_nothing_is_recorded_where_the_signal_is_off_and_it_goes_on_and_off():
    world = Monitored(fraction=0.0)
    runner = world.tp_worker.model_runner
    req = world.arrive(PROMPT, 60)
    assert runner.sampling_observer is None and not hasattr(req, "_kv_quality")
    assert world.monitor.report() is None
    world.run()
    world.reconfigure({"monitor": {"fraction": 1.0}})
    assert runner.sampling_observer is world.monitor.recorder
    req = world.arrive(PROMPT, 60, ignore_eos=True)
    while not req.finished():
        world.step()
    assert len(world.monitor.pending) == 1 and world.monitor.report()["pending"] == 1
    world.reconfigure({"monitor": {"fraction": 0.0}})
    assert runner.sampling_observer is None and not world.monitor.pending
    world.run()
    assert world.monitor.probes == 0 and world.monitor.skipped == {"stale": 1}
    other = runner.sampling_observer = object()
    with pytest.raises(ConfigError, match=r"kv_evict: monitor\.fraction: another plugin observes"):
        world.reconfigure({"monitor": {"fraction": 0.5}})
    assert world.lethe.config.monitor.fraction == 0 and runner.sampling_observer is other
    world.reconfigure({"monitor": {"tokens_per_minute": 5}})
    assert runner.sampling_observer is other


# -- when a probe runs ------------------------------------------------------------------------------------------------


def ended(world, tokens=60):
    """Serve one request to its end; its probe waits."""
    req = world.arrive(PROMPT, tokens, ignore_eos=True)
    while not req.finished():
        world.step()
    assert len(world.monitor.pending) == 1 and world.monitor.probes == 0
    return req


def test_a_request_that_was_aborted_or_never_pruned_is_not_compared():
    world = Monitored()
    world.arrive(PROMPT, 5)
    req = world.arrive(PROMPT[:5], 100, ignore_eos=True)
    for _ in range(60):
        world.step()
    assert any(told.label != UNPRUNED for told in req._kv_quality.told.values())
    world.cancel(req.rid)
    world.run()
    assert isinstance(req.finished_reason, FINISH_ABORT)
    assert world.monitor.probes == 0 and world.monitor.skipped == {}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_probe_waits_until_nobody_else_does(overlap):
    world = Monitored(overlap=overlap, rows=3, size=400)
    ended(world)
    users = [world.arrive([30 + i, 31, 32], 30, ignore_eos=True) for i in range(5)]  # two of them wait for a row
    while world.waiting_queue:
        world.step()
        assert not world.probed, "a probe ran while somebody waited"
    world.run()
    assert len(world.probed) == world.monitor.probes >= 1 and all(u.finished() for u in users)


def test_somebody_who_comes_with_the_message_goes_first():
    world = Monitored(size=400)
    ended(world)
    for message in world.monitor.offer(world):
        world.monitor.accept(world, message)
    user = world.arrive([1, 2, 3], 8)
    batch = World.step(world)
    assert batch.reqs == [user] and not world.probed
    assert world.monitor.pending[0].blocked == "load"
    world.run()
    assert world.monitor.probes == 1 and world.monitor.skipped == {}


def test_a_probe_does_not_start_into_a_chunked_prefill_or_behind_a_grammar_or_a_flush_or_a_pause():
    world = Monitored(size=400, chunk=80)
    ended(world)
    for name, value in (("chunked_req", object()), ("waiting_queue", [object()])):
        before = getattr(world, name)
        setattr(world, name, value)
        assert world.monitor.offer(world) == []
        setattr(world, name, before)
    world.grammar_manager.grammar_queue = [1]
    assert world.monitor.offer(world) == []
    world.grammar_manager.grammar_queue = ()
    world.flush_wrapper._pending = object()
    assert world.monitor.offer(world) == []
    world.flush_wrapper._pending = None
    assert len(world.monitor.offer(world)) == 1
    world._engine_paused = True
    assert len(world.monitor.offer(world)) == 1, "SGLang lost it, and nobody said that it may not start any more"
    world.monitor.drop()
    assert world.monitor.offer(world) == [] and world.monitor.skipped == {"stale": 1}


def test_a_pause_drops_what_waits():
    world = Monitored(size=400)
    ended(world)
    world._engine_paused = True
    assert world.monitor.offer(world) == [] and world.monitor.skipped == {"stale": 1}


def test_a_message_that_was_lost_is_sent_again_and_starts_one_probe():
    world = Monitored(size=400)
    ended(world)
    (lost,), (again,) = world.monitor.offer(world), world.monitor.offer(world)
    assert lost is again
    world.monitor.accept(world, again)
    assert world.monitor.offer(world) == []
    world.run()
    assert world.monitor.probes == 1


@pytest.mark.parametrize("page", [1, 8])
def test_a_probe_takes_no_memory_that_somebody_may_want(page):
    """Neither the room of the next two steps of those who run nor more than the coldest tenth of the cache."""
    world = Monitored(page=page, size=240, tree=True)
    ended(world)
    allocator, monitor = world.token_to_kv_pool_allocator, world.monitor
    extend = monitor.pending[0].extend
    running = SimpleNamespace(reqs=[object()] * 2, batch_is_full=False)
    least = -(-extend // page) * page + page + 2 * 2 * page
    free = allocator.available_size
    world.get_num_allocatable_reqs = lambda *args, **kwargs: 2
    for cached in (0, 9, 200):
        world.tree_cache.evictable_size = lambda cached=cached: cached
        for room, obstacle in ((least - cached // 10, None), (least - cached // 10 - 1, "memory")):
            allocator.available_size = lambda room=room: room
            assert monitor._obstacle(world, running, extend) == obstacle
    del world.tree_cache.evictable_size
    allocator.available_size = lambda: 10_000
    for slots, full_batch, obstacle in ((2, True, "memory"), (1, False, "memory"), (2, False, None)):
        world.get_num_allocatable_reqs = lambda *args, slots=slots, **kwargs: slots
        running.batch_is_full = full_batch
        assert monitor._obstacle(world, running, extend) == obstacle
    allocator.available_size = free
    del world.get_num_allocatable_reqs
    world.run()
    assert monitor.probes == 1


def test_a_probe_that_admission_refuses_leaves_no_trace():
    world = Monitored(size=400)
    ended(world)
    user = world.arrive([1, 2, 3], 40, ignore_eos=True)
    world.step()
    calls = []

    def refuse(scheduler, running):
        calls.append([req.rid for req in scheduler.waiting_queue])
        running.batch_is_full = True
        return SimpleNamespace(batch_to_run=None, running_batch=running)

    for message in world.monitor.offer(world):
        world.monitor.accept(world, message)
    plan = world.monitor.admit(refuse, world, world.running_batch)
    assert calls == [["lethe-probe-r0."]]
    assert not world.waiting_queue and not plan.running_batch.batch_is_full and not world.probed
    assert world.monitor.pending[0].blocked == "memory" and world.monitor.probes == 0
    world.run()
    assert user.finished() and world.monitor.probes == 2


def test_the_queue_is_short_and_says_why_the_oldest_did_not_run():
    world = Monitored(size=400, rows=6)
    first = ended(world)
    world.get_num_allocatable_reqs = lambda *args, **kwargs: 0
    entry = world.monitor.pending[0]
    assert world.monitor.offer(world) == [] and entry.blocked == "memory"
    for number in range(PENDING):
        assert len(world.monitor.pending) == min(number + 1, PENDING)
        world.monitor.finished(first)
    assert len(world.monitor.pending) == PENDING and entry not in world.monitor.pending
    assert world.monitor.skipped == {"memory": 1}


def test_more_tokens_than_a_minute_may_have_are_not_prefilled():
    world = Monitored(size=400, per_minute=100, tree=False)
    for _ in range(3):
        req = world.arrive(PROMPT, 50, ignore_eos=True)
        world.run()
        assert req.finished()
    assert world.monitor.probes == 1 and world.monitor.skipped == {"rate": 2}
    assert world.monitor.tokens == len(PROMPT) + len(req.output_ids)


@pytest.mark.parametrize("chunk", [None, 40])
def test_a_probe_is_one_chunk_and_reads_the_first_tokens_of_a_longer_reply(chunk):
    world = Monitored(size=400, chunk=chunk, tree=False)
    world.max_prefill_tokens = 40
    req = world.arrive(PROMPT, 60, ignore_eos=True)
    world.run()
    (probe,) = world.probed
    assert probe.extend_len == 40 == len(probe.origin_input_ids)
    assert world.compared == expected(req, range(27))
    long = world.arrive(list(range(40, 80)), 60, ignore_eos=True)
    world.run()
    assert long.finished() and world.monitor.skipped == {"length": 1}, "no token after a round is within reach"


def test_a_cached_prompt_is_read_and_one_that_has_left_the_cache_is_too_long():
    world = Monitored(size=400, chunk=80)
    ended(world, tokens=78)
    world.run()
    assert world.probed[0].prefix_len == len(PROMPT) - 1 and world.probed[0].extend_len == 79
    ended2 = world.arrive(PROMPT, 78, ignore_eos=True)
    while not ended2.finished():
        world.step()
    world.tree_cache.reset()
    world.run()
    assert len(world.probed) == 1 and world.monitor.skipped == {"length": 1}


def test_an_adapter_travels_along_and_one_that_is_gone_ends_the_probe():
    world = Monitored(size=400)
    req = ended(world)
    req.lora_id, req.extra_key, req.cache_salt = "a7", "key+a7", "salt"
    world.monitor.pending.clear()
    world.monitor.finished(req)
    (message,) = world.monitor.offer(world)
    world.monitor.accept(world, message)
    probe = world.monitor._ready
    assert (probe.lora_id, probe.extra_key, probe.cache_salt) == ("a7", "key+a7", "salt")
    loaded = world.tp_worker.model_runner.lora_manager = SimpleNamespace(lora_refs={"a7": 1})
    assert world.monitor._gone(world, probe, 10) is None
    loaded.lora_refs.clear()
    World.step(world)
    assert world.monitor.skipped == {"stale": 1} and not world.probed and not world.monitor.pending


@pytest.mark.parametrize("overlap", [True, False])
def test_a_probe_in_flight_does_not_keep_the_server_busy(overlap):
    world = Monitored(overlap=overlap, size=400)
    world.process_batch_result = world._process
    ended(world)
    while not world.probed:
        world.step()
    assert world.last_batch.reqs == world.probed and bool(world.result_queue) is overlap
    world.monitor.settle(world)
    assert world.last_batch is None and not world.result_queue and world.probed[0].finished()
    assert world.idle() and world.held() == 0
    assert len(world.compared) == 60, "who asks after a flush does not see what the probe has found"
    world.run()
    user = world.arrive([1, 2, 3], 8)
    for _ in range(3):
        world.step()
        world.monitor.settle(world)
    assert world.last_batch is not None and user in world.last_batch.reqs, "a request was settled"


def test_what_was_said_before_the_weights_changed_is_not_compared():
    world = Monitored(size=400)
    ended(world)
    world.monitor.drop()
    assert world.monitor.skipped == {"stale": 1}
    ended_late = world.arrive(PROMPT, 60, ignore_eos=True)
    for _ in range(30):
        world.step()
    world.monitor.drop()  # while it runs
    while not ended_late.finished():
        world.step()
    assert world.monitor.skipped == {"stale": 2}
    ended(world)
    while not world.probed:
        world.step()
    world.monitor.drop()  # while its probe runs
    world.run()
    assert world.monitor.skipped == {"stale": 3} and not world.compared


def test_a_probe_that_was_preempted_leaves_the_queue():
    world = Monitored(size=400)
    ended(world)
    while not world.probed:
        world.step()
    probe = world.probed[0]
    world.monitor.settle = None
    probe.is_retracted = True
    probe.finished_reason = None
    user = SimpleNamespace(rid="user")
    world.waiting_queue = [probe, user]
    world.monitor.collect(world)
    assert world.waiting_queue == [user] and world.monitor.skipped == {"load": 1} and world.monitor._running is None


@pytest.mark.parametrize("seed", range(3))
def test_probes_among_random_events_hold_nothing_and_are_alone(seed):
    rng = random.Random(seed)
    when = ("always", "pressure", "always")[seed]
    world = Monitored(
        page=(8, 1, 8)[seed], size=(320, 200, 160)[seed], overlap=bool(seed % 2), when=when, tree=seed < 2
    )
    world.process_batch_result = world._process
    for _ in range(200):
        event = rng.random()
        if event < 0.08:
            world.arrive([rng.randrange(10, 12) for _ in range(rng.randrange(1, 20))], rng.randrange(20, 120))
        elif event < 0.085 and world.requests:
            world.cancel(rng.choice([*world.requests]))
        elif event < 0.095:
            world.retract()
        elif event < 0.098:
            world.monitor.drop()
        waiting = len(world.waiting_queue)
        batch = world.step()
        if batch and any(hasattr(req, "_kv_probe") for req in batch.reqs) and batch.forward_mode.is_extend():
            assert len(batch.reqs) == 1 and not waiting
        if event > 0.9:
            world.monitor.settle(world)
    world.run(2000)
    world.monitor.settle(world)
    assert world.held() == 0 and not world.tree_cache.protected_size()
    assert world.monitor.probes > 0, (world.monitor.skipped, world.lethe.counters.rounds)
    assert not [rid for rid in world.streamed if "probe" in rid]
    assert all(value < 1e-4 for group, value, _ in world.compared if group == UNPRUNED)
