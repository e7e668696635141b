"""The live quality signal: a sample of finished requests is prefilled once more, with the full cache, and compared.

One sampled request, from its arrival to the metrics::

    arrival     its id says whether it is sampled (``sample``)
    a step      SGLang's sampling observer keeps log q of the token and the likeliest one; both are copied to the host
                with SGLang's own results (``Recorder``)
    its end     what it has said waits in a short queue (``finished``)
    a probe     rank 0 decides when and tells all ranks by SGLang's own broadcast (``offer``, ``accept``); every rank
                prefills prompt and reply in a batch of their own if nobody waits and memory is free (``admit``)
    its end     k3 and agreement of every token go to the metrics and to ``/server_info`` (``collect``)

A probe is a request of SGLang's that nobody has sent: it never enters the radix tree, is never evicted from, never
decodes, and is never streamed. Only rank 0 reads the clock and keeps what was said. What other ranks do follows from
the message and from the state of the scheduler, which is the same everywhere.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import BaseReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams

from lethe_sglang.cache.layout import page_ceil, page_floor
from lethe_sglang.config import EvictionConfig, RequestOverride
from lethe_sglang.engine.quality import (
    UNPRUNED,
    Allowance,
    Entry,
    Label,
    Metrics,
    Noted,
    Quality,
    Record,
    Recorder,
    draws,
    k3,
    label,
    window,
)

if TYPE_CHECKING:
    from lethe_sglang.engine.runtime import Runtime

PENDING = 8
"""Finished requests that wait for a probe; the oldest goes when another comes."""

COLD = 0.1
"""Part of the cached prefixes, the first in the order of their eviction, that a probe may push out."""


class Probe(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """To every rank: prefill ``ids`` and give the log-probabilities of those behind position ``start``."""

    ids: list[int]
    start: int
    lora_id: str | None
    extra_key: str | None
    cache_salt: str | None


class Monitor:
    """The quality signal of one scheduler.

    Parameters
    ----------
    runtime
        Of this process.

    Attributes
    ----------
    quality
        What probes have found.
    probes, tokens
        Probes that ran, and the tokens that they prefilled.
    skipped
        Probes that did not run, by reason.
    pending
        Finished requests that wait for one.
    epoch
        How often everything said so far has become worthless: the weights changed, or somebody wants an empty server.
    recorder
        Keeps what the steps of sampled requests say.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.quality = Quality()
        self.probes = self.tokens = self.epoch = 0
        self.skipped: Counter[str] = Counter()
        self.pending: deque[Entry] = deque()
        self.recorder = Recorder(self.finished)
        self._allowance = Allowance()
        self._scheduler: Any = None  # of rank 0
        self._metrics: Metrics | None = None
        self._entry: Entry | None = None  # of the probe that is on its way, waits or runs; on rank 0
        self._ready: Any = None
        self._running: Any = None

    # -- configuration ------------------------------------------------------------------------------------------------

    def start(self, scheduler: Any) -> None:
        """Begin on a scheduler that is complete; on other ranks than 0 there is nothing to record."""
        if get_parallel().tp_rank == 0:
            self._scheduler = scheduler
            for problem in self.problems(self.runtime.config):
                raise RuntimeError(f"--kv-evict: {problem}")
            self.configure()

    def problems(self, config: EvictionConfig) -> Iterable[str]:
        """Say what stands against a configuration."""
        observer = self._scheduler and self._scheduler.tp_worker.model_runner.sampling_observer
        if config.monitor.fraction and observer not in (None, self.recorder):
            yield "monitor.fraction: another plugin observes SGLang's sampling; set it to 0"

    def configure(self) -> None:
        """Go by the configuration of now: SGLang's sampling is observed only while requests are sampled."""
        if self._scheduler is not None:
            fraction, runner = self.runtime.config.monitor.fraction, self._scheduler.tp_worker.model_runner
            self.recorder.noted = []
            if fraction:
                runner.sampling_observer = self.recorder
            elif runner.sampling_observer is self.recorder:
                runner.sampling_observer = None
                self._forget()

    @property
    def active(self) -> bool:
        """Whether requests are sampled on this rank."""
        return self._scheduler is not None and self.runtime.config.monitor.fraction > 0

    # -- a sampled request --------------------------------------------------------------------------------------------

    def sample(self, req: Any) -> None:
        """Decide about a request that has arrived.

        Not sampled are requests that are not evicted from, those whose input is more than tokens, and those whose
        tokens something else than the model's distribution picks: then log q says little about them.
        """
        if not self.active or hasattr(req, "_kv_quality"):
            return
        req._kv_quality = None
        chance, place = draws(req.rid)
        if chance < self.runtime.config.monitor.fraction and self.runtime.evicts(req) and _plain(req):
            req._kv_quality = Record(place, self.epoch)

    def note(self, batch: Any) -> None:
        """Note the sampled requests of a batch whose forward is being prepared; its rounds have been run."""
        if self.active:
            sampled = [(i, req) for i, req in enumerate(batch.reqs) if getattr(req, "_kv_quality", None) is not None]
            self.recorder.noted = [Noted(line, req, self._label(req)) for line, req in sampled]

    def _label(self, req: Any) -> Label:
        ledger = self.runtime.ledger
        state = ledger.requests.get(req.kv.req_pool_idx)
        if state is None or not state.rounds:
            return UNPRUNED
        steps = int(req.kv.kv_committed_len) - 1 - state.pruned_at  # the step's own token is counted already
        return label("pressure" if ledger.on_demand else "interval", steps)

    def finished(self, req: Any) -> None:
        """Queue a sampled request that has ended, if a round came before one of its tokens."""
        record: Record = req._kv_quality
        pruned = [place for place, told in record.told.items() if told.label != UNPRUNED]
        if not pruned or isinstance(req.finished_reason, FINISH_ABORT):
            return
        prompt, config = len(req.origin_input_ids), self.runtime.config
        scheduler = self._scheduler
        shared = config.retain.prompt == "keep" and not scheduler.tree_cache.disable
        cached = page_floor(prompt - 1, self.runtime.page_size) if shared else 0
        extend = min(self._chunk(scheduler), config.monitor.tokens_per_minute)
        most = min(cached + extend, scheduler.max_req_input_len - 1)
        chosen = window(min(pruned), min(max(record.told) + 1, most - prompt), record.place)
        if record.epoch != self.epoch or chosen is None:
            self._skip("stale" if record.epoch != self.epoch else "length")
            return
        first, end = chosen
        ids = [*req.origin_input_ids, *req.output_ids[:end]]
        origin = {"lora_id": req.lora_id, "extra_key": req.extra_key, "cache_salt": req.cache_salt}
        message = Probe(rid=f"lethe-probe-{req.rid}", ids=ids, start=prompt + first - 1, **origin)
        if len(self.pending) == PENDING:
            self._skip(self.pending.popleft().blocked)
        self.pending.append(Entry(message, first, record.told, record.epoch, len(ids) - cached))

    def _chunk(self, scheduler: Any) -> int:
        """Most tokens that SGLang prefills at once: a probe is one chunk at most, so nobody waits for a second."""
        size = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
        return page_floor(size, self.runtime.page_size)

    # -- a probe ------------------------------------------------------------------------------------------------------

    def offer(self, scheduler: Any) -> list[Probe]:
        """Return what all ranks are to be told now, on rank 0: a probe that may start, if any."""
        if scheduler._engine_paused:
            self._forget()
        if self._ready is not None or self._running is not None:
            return []
        if self._entry is None:
            if not self.pending:
                return []
            entry, now = self.pending[0], time.monotonic()
            obstacle = self._obstacle(scheduler, scheduler.running_batch, entry.extend)
            if obstacle or scheduler.flush_wrapper._pending is not None:  # somebody waits for an idle server
                entry.blocked = obstacle or "load"
                return []
            self.pending.popleft()
            if entry.extend > self._allowance.left(now, self.runtime.config.monitor.tokens_per_minute):
                self._skip("rate")
                return []
            self._entry = entry
        return [self._entry.message]  # once more if SGLang did not look at its inputs the last time

    def accept(self, scheduler: Any, message: Probe) -> None:
        """Make the request of a probe, on every rank; it starts with the next prefill (:meth:`admit`)."""
        params = SamplingParams(max_new_tokens=1, temperature=0)
        params.normalize(None)
        req = Req(
            rid=message.rid,
            origin_input_text="",
            origin_input_ids=array("q", message.ids),
            sampling_params=params,
            return_logprob=True,
            top_logprobs_num=1,
            disagg_mode=scheduler.disaggregation_mode,
            vocab_size=scheduler.model_config.vocab_size,
            cache_salt=message.cache_salt,
        )
        req.lora_id, req.extra_key, req.logprob_start_len = message.lora_id, message.extra_key, message.start
        req.skip_radix_cache_insert = True
        req.finished_output = True  # there is nobody to stream it to
        never = RequestOverride(mode="none", budget=self.runtime.config.budget.tokens)
        req._kv_evict = self.runtime.version, never, never
        req._kv_quality, req._kv_probe = None, True
        scheduler._set_or_validate_priority(req)  # the lowest
        self._ready = req

    def admit(self, original: Callable[..., Any], scheduler: Any, running: Any) -> Any:
        """Let SGLang make a prefill batch of the probe alone, if nothing stands against it."""
        self.collect(scheduler)
        probe, self._ready = self._ready, None
        if probe is None:
            return original(scheduler, running)
        probe.init_next_round_input(scheduler.tree_cache)
        extend = len(probe.origin_input_ids) - probe.prefix_len
        obstacle = self._gone(scheduler, probe, extend) or self._obstacle(scheduler, running, extend)
        if obstacle:
            self._return(obstacle)
            return original(scheduler, running)
        probe.time_stats.set_wait_queue_entry_time()
        scheduler.waiting_queue.append(probe)
        plan = original(scheduler, running)
        if probe in scheduler.waiting_queue:  # refused: admission expects the memory to be needed
            scheduler.waiting_queue.remove(probe)
            plan.running_batch.batch_is_full = False  # for a probe; not for whoever comes next
            self._return("memory")
            return plan
        self._running = probe
        self.probes += 1
        self.tokens += extend
        self._allowance.spend(time.monotonic(), extend)
        if self._metrics is not None:
            self._metrics.probes.inc()
            self._metrics.tokens.inc(extend)
        return plan

    def _gone(self, scheduler: Any, probe: Any, extend: int) -> str | None:
        """Say why a probe cannot run any more: its prompt has left the prefix cache, or its adapter the server."""
        if extend > self._chunk(scheduler):
            return "length"
        if probe.lora_id is None or probe.lora_id in scheduler.tp_worker.model_runner.lora_manager.lora_refs:
            return None
        return "stale"

    def _obstacle(self, scheduler: Any, running: Any, extend: int) -> str | None:
        """Say what stands against a probe now: somebody who waits, or memory that it would take from somebody.

        Running requests keep room for the two steps that a probe lasts. Of the cached prefixes that nobody uses it may
        take those that the next request would take first: without any, a cache that has filled the pool would keep it
        from ever running.
        """
        if scheduler.waiting_queue or scheduler.chunked_req is not None or scheduler.grammar_manager.grammar_queue:
            return "load"
        page, requests = self.runtime.page_size, len(running.reqs)
        needed = page_ceil(extend, page) + page + 2 * page * requests
        full = bool(requests) and running.batch_is_full
        slots = scheduler.get_num_allocatable_reqs(requests, running_batch=running)
        room = scheduler.token_to_kv_pool_allocator.available_size()
        room += int(scheduler.tree_cache.evictable_size() * COLD)
        return "memory" if full or slots < min(2, requests + 1) or needed > room else None

    def _return(self, obstacle: str) -> None:
        """Put the probe that did not start back to the head of the queue, or give it up."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        if obstacle in ("load", "memory"):
            entry.blocked = obstacle
            self.pending.appendleft(entry)
        else:
            self._skip(obstacle)

    def collect(self, scheduler: Any) -> None:
        """Take the result of a probe that has ended; one that was preempted leaves the queue."""
        probe = self._running
        if probe is None or not (probe.finished() or probe.is_retracted):
            return
        self._running = None
        entry, self._entry = self._entry, None
        if probe.is_retracted:
            scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req is not probe]
        if entry is None:
            return
        if probe.is_retracted or entry.epoch != self.epoch or isinstance(probe.finished_reason, FINISH_ABORT):
            self._skip("load" if probe.is_retracted else "stale")
            return
        said = zip(probe.logprob.input_token_logprobs_val, probe.logprob.input_top_logprobs_idx, strict=True)
        for place, (logprob, top) in enumerate(list(said)[1:], start=entry.first):  # nothing comes before the first
            told = entry.told.get(place)
            if told is not None:
                value, agrees = k3(logprob, told.logprob), top[0] == told.likeliest
                self.quality.add(told.label, value, agrees)
                if self._metrics is not None:
                    self._metrics.observe(told.label, value, agrees)

    def drop(self) -> None:
        """Forget what waits for a probe, and let nothing that was said so far be compared (on every rank)."""
        self.epoch += 1
        self._ready = None
        if self._entry is not None and self._running is None:
            self.pending.append(self._entry)
            self._entry = None
        self._forget()

    def _forget(self) -> None:
        self._skip("stale", len(self.pending))
        self.pending.clear()

    def settle(self, scheduler: Any) -> None:
        """End a probe that alone keeps the server from being idle, for whoever asks whether it is.

        Under overlap its result may be in flight: it is processed now, as SGLang does before it pauses.
        """
        last = scheduler.last_batch.reqs if scheduler.last_batch is not None else ()
        if last and not scheduler.running_batch.reqs and all(getattr(req, "_kv_probe", False) for req in last):
            if scheduler.enable_overlap and scheduler.result_queue:
                scheduler.process_batch_result(*scheduler.result_queue.popleft())
            scheduler.last_batch = None
        self.collect(scheduler)

    # -- what operators see -------------------------------------------------------------------------------------------

    def _skip(self, reason: str, count: int = 1) -> None:
        if count:
            self.skipped[reason] += count
            if self._metrics is not None:
                self._metrics.skipped(reason, count)

    def report(self) -> dict[str, Any] | None:
        """Say what ``/server_info`` shows.

        Returns
        -------
        dict or None
            ``fraction``, ``probes``, ``tokens`` (prefilled), ``pending``, ``skipped`` (by reason) and ``groups``
            (:meth:`Quality.report`); None where no request is sampled.
        """
        if not self.active:
            return None
        return {
            "fraction": self.runtime.config.monitor.fraction,
            "probes": self.probes,
            "tokens": self.tokens,
            "pending": len(self.pending),
            "skipped": dict(self.skipped),
            "groups": self.quality.report(),
        }

    def export(self, labels: dict[str, str]) -> None:
        """Create the Prometheus metrics, once SGLang's own are there."""
        self._metrics = Metrics(labels)


def _plain(req: Any) -> bool:
    """Whether a request is tokens alone, and its own are picked by the model's distribution alone."""
    params = req.sampling_params
    more = (req.multimodal_inputs, req.input_embeds, req.positional_embed_overrides, req.token_type_ids)
    picks = (req.grammar, req.custom_logit_processor, params.logit_bias, params.watermark)
    penalties = params.frequency_penalty or params.presence_penalty or params.min_new_tokens
    return not penalties and params.repetition_penalty == 1 and all(part is None for part in (*more, *picks))
