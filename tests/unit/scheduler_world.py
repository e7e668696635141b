"""SGLang's scheduler, allocator, prefix cache and rows without a server, over a forward that only writes cells.

Every cell that is written says what it is: its position, its layer, and a hash of all tokens up to it. So whoever reads
a list of cells knows whether they are the right ones. A cell's score is a fixed number of its position and layer.
"""

from __future__ import annotations

import pkgutil
from array import array
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.cache.pool import pool_class
from lethe_sglang.config import from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.engine import runtime as runtime_module
from lethe_sglang.engine.hooks import SCHEDULER_HOOKS
from lethe_sglang.engine.reconfigure import unfinished
from lethe_sglang.engine.runtime import Runtime

LAYERS = 3
CONTEXT = 400
VOCABULARY = 1 << 20
END = 1
PRIME = 1009
HASH = 1 << 23
HOOKED = (
    *("update_running_batch", "_add_request_to_queue", "get_prefill_adder_class", "free_kv_row", "free_rows"),
    *("prepare_for_extend", "reset_for_retract"),
)
"""Hooks that work without a model: all that follow a request's life."""


class Nothing:
    """A part of the scheduler that has nothing to do here."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def score_of(layer, position):
    """A cell's score: distinct for all positions of a layer, and steeper in later layers."""
    return ((position * (7919, 104729, 1299709)[layer] + 1) % PRIME / PRIME) ** (1 + 2 * layer)


SCORES = np.array([[score_of(layer, position) for position in range(CONTEXT)] for layer in range(LAYERS)])


def install_hooks(patch):
    """Wrap SGLang's functions as the engine does, by its own table; ``patch`` (a MonkeyPatch) takes them off again."""
    wanted = set(HOOKED)
    for hook in SCHEDULER_HOOKS:
        owner, name = hook.target.rsplit(".", 1)
        if name in HOOKED:
            wanted.discard(name)
            owner = pkgutil.resolve_name(owner)
            patch.setattr(owner, name, _wrapped(getattr(owner, name), hook))
    assert not wanted, f"the engine does not hook {wanted}"


def _wrapped(original, hook):
    def wrapper(*args, **kwargs):
        if hook.kind is HookType.AROUND:
            return hook.function(original, *args, **kwargs)
        if hook.kind is HookType.BEFORE:
            hook.function(*args, **kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        replaced = hook.function(result, *args, **kwargs)
        return result if replaced is None else replaced

    return wrapper


class World(Scheduler):
    """SGLang's scheduler over a pool of ``size`` blocks, with eviction by ``config``.

    Parameters
    ----------
    config
        As a file holds it.
    page, size, rows
        Page size and blocks of the pool (tokens), and requests that may run at once.
    tree, overlap
        Whether there is a prefix cache, and whether results are processed a step late.
    chunk
        ``--chunked-prefill-size``, or None.
    ratio
        Part of what a request may still generate that admission counts on.
    schedule, priorities
        ``--schedule-policy``, and whether there is ``--enable-priority-scheduling``, with preemption.
    """

    def __init__(
        self,
        config,
        page=1,
        size=240,
        rows=5,
        tree=True,
        overlap=True,
        chunk=None,
        ratio=1.0,
        schedule="fcfs",
        priorities=False,
    ):
        config = from_mapping(config)
        self.lethe = Runtime(config, from_config(config, LAYERS), page, CONTEXT)
        runtime_module.set_runtime(self.lethe)
        pool = pool_class(*self.lethe.tracked())(
            size=size,
            page_size=page,
            dtype=torch.float32,
            head_num=1,
            head_dim=4,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        self.cells = pool.cells
        self.req_to_token_pool = ReqToTokenPool(rows, CONTEXT, "cpu", False)
        sized = (size,) if page == 1 else (size, page)
        kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        self.token_to_kv_pool_allocator = kind(*sized, torch.float32, "cpu", pool, False)
        self.tree_cache = UnifiedRadixCache(
            CacheInitParams(
                disable=not tree,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=page,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.lethe.attach(pool, self.req_to_token_pool.req_to_token)
        self.page_size, self.max_total_num_tokens, self.max_running_requests = page, size, rows
        self.enable_overlap, self.chunked_prefill_size = overlap, chunk
        self.new_token_ratio_tracker = NewTokenRatioTracker(init=ratio, min=ratio, decay=0.0, current=ratio)
        self._stand_in()
        self.policy = SchedulePolicy(schedule, self.tree_cache, False, priorities, False)
        self.enable_priority_scheduling = self.enable_priority_preemption = priorities
        self.requests, self.hashes, self.sampled, self.ending = {}, {}, {}, set()
        self.arrived, self.forced, self.ratio, self.now_running = 0, False, ratio, None

    def _stand_in(self):
        """Give the scheduler what it looks at and a server would have built."""
        self.device, self.enable_overlap_mlx, self.is_generation = "cpu", False, True
        self.disaggregation_mode, self.spec_algorithm = DisaggregationMode.NULL, SpeculativeAlgorithm.NONE
        self.dllm_config = self.prefill_delayer = self.min_free_slots_delayer = self.lora_drainer = None
        self.decode_offload_manager = self.dynamic_chunk_sizer = self.truncation_align_size = None
        self.max_queued_requests = self.hisparse_coordinator = self.mm_receiver = self.draft_worker = None
        self.chunked_req = self._pending_chunked_abort_req = self.last_batch = None
        for off in (
            *("enable_hisparse", "require_mlp_sync"),
            *("enable_lora", "enable_hicache_storage", "enable_lmcache", "enable_hierarchical_cache", "is_hybrid_swa"),
            *("enable_unified_cache_external_linker", "is_mixed_chunk", "enable_continuous_input_polling"),
            *("abort_on_priority_when_disabled", "_engine_paused", "enable_unified_memory"),
        ):
            setattr(self, off, False)
        self.enable_skip_finishing_decode = self.enable_overlap
        self.prefill_decode_interval = self._prefill_decode_interval_remaining = self.forward_ct = 0
        self.priority_scheduling_preemption_threshold = self.max_prefill_bs = self.processed_tokens_counter = 0
        self.prefill_decode_interval_min_bs, self.max_prefill_tokens, self.max_req_len = 0, 16384, CONTEXT - 1
        self.max_new_tokens_limit, self.sliding_window_size, self.kv_shard_widening = None, None, 1
        self.waiting_queue, self.result_queue = [], deque()
        self.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        self.model_config = SimpleNamespace(
            is_encoder_decoder=False, vocab_size=VOCABULARY, self_opened_think_start_ids=None, think_end_ids=None
        )
        nothing = Nothing()
        self.scheduler_stage_metrics = None
        self.metrics_reporter = SimpleNamespace(
            num_generated_tokens=0,
            forward_ct_decode=0,
            num_retracted_reqs=0,
            enable_metrics=False,
            report_prefill_stats=nothing.any,
            report_decode_stats=nothing.any,
        )
        self.output_streamer = self.ipc_channels = nothing
        self.grammar_manager = SimpleNamespace(
            has_waiting_grammars=lambda: False, abort_requests=nothing.any, grammar_queue=(), clear=nothing.any
        )
        self.beam_coordinator = SimpleNamespace(
            pending_member_rows=lambda batch: 0, retire_group=nothing.any, commit_decode=lambda batch: set()
        )
        self.load_inquirer = SimpleNamespace(_get_num_pending_tokens=lambda **kwargs: 0)
        self.tp_worker = SimpleNamespace(
            model_runner=SimpleNamespace(attn_backend=object(), prefill_aware_swa=False),
            prepare_for_kv_cache_release=None,
        )
        self.dp_attn_adapter = SimpleNamespace(
            maybe_prepare_mlp_sync_batch=lambda batch, need_sync=None: batch,
            maybe_convert_decode_to_extend=lambda batch: batch,
        )
        self.ngram_embedding_manager = SimpleNamespace(prepare_for_forward=lambda batch, chunked_req: batch)
        self.batch_result_processor = SchedulerBatchResultProcessor(
            is_generation=True,
            disaggregation_mode=self.disaggregation_mode,
            enable_overlap=self.enable_overlap,
            enable_overlap_mlx=False,
            model_config=self.model_config,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
            req_to_token_pool=self.req_to_token_pool,
            decode_offload_manager=None,
            metrics_collector=nothing,
            metrics_reporter=self.metrics_reporter,
            draft_worker=None,
            model_worker=self.tp_worker,
            logprob_result_processor=nothing,
            output_streamer=nothing,
            beam_coordinator=self.beam_coordinator,
            abort_request=nothing.any,
        )

    # -- what may happen --------------------------------------------------------------------------------------------

    def arrive(self, prompt, max_new_tokens, asked=None, ignore_eos=False, priority=None):
        """Put a request into the queue as the front door would."""
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=0,
            ignore_eos=ignore_eos,
            stop_token_ids=[END],
            custom_params=None if asked is None else {"kv_evict": asked},
        )
        params.normalize(None)
        req = Req(f"r{self.arrived}.", "", array("q", prompt), params, vocab_size=VOCABULARY, priority=priority)
        self.init_req_max_new_tokens(req)
        if (
            ignore_eos and self.tree_cache.disable
        ):  # stock keeps a reserve, so that a request that fits just so waits on
            params.max_new_tokens -= min(2 * self.page_size, params.max_new_tokens - 1)
        self.requests[req.rid] = req
        self.arrived += 1
        self._add_request_to_queue(req)
        return req

    def cancel(self, rid):
        """Abort a request, wherever it is."""
        self.abort_request(AbortReq(rid=rid))

    def reconfigure(self, options):
        """Go over to other options, as ``POST /kv_evict`` does."""
        config = reconfigured(self.lethe.config, options)
        return self.lethe.reconfigure(config, from_config(config, LAYERS), unfinished(self))

    def step(self):
        """One turn of SGLang's event loop; returns the batch that ran."""
        plan = self.get_next_batch_to_run(running_batch=self.running_batch, last_batch=self.last_batch)
        self.running_batch, batch = plan.running_batch, plan.batch_to_run
        if self.enable_overlap:
            if batch:
                self.result_queue.append((batch.copy(), self.forward(batch)))
            if self.last_batch:
                self._process(*self.result_queue.popleft())
        elif batch:
            self._process(batch, self.forward(batch))
        self.last_batch = batch
        return batch

    def retract(self):
        """One step that retracts as SGLang's own tests do."""
        self.forced = True
        try:
            return self.step()
        finally:
            self.forced, self.new_token_ratio_tracker.current = False, self.ratio

    def idle(self):
        """Whether nothing is left to do."""
        return not (self.waiting_queue or self.running_batch.reqs or self.last_batch or self.chunked_req)

    def flush(self):
        """What an idle server does to flush its cache."""
        self.last_batch = None
        self.tree_cache.reset()
        self.req_to_token_pool.clear()
        self.token_to_kv_pool_allocator.clear()

    # -- the scheduler's parts that meet a model --------------------------------------------------------------------

    def update_running_batch(self, batch):
        """SGLang's, with the switch of its own tests of retraction."""
        self.now_running, module = batch, scheduler_module
        before = module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL
        module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL = self.forced, 1
        try:
            return super().update_running_batch(batch)
        finally:
            module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL = before

    def get_new_batch_prefill(self, running_batch):
        """SGLang's; notes which batch runs."""
        self.now_running = running_batch
        return super().get_new_batch_prefill(running_batch)

    def send_abort_output(self, abort_req, req):
        """Nobody listens; a request that was aborted out of the queue is done."""
        self.requests.pop(req.rid, None)

    def _process(self, batch, result):
        if batch.forward_mode.is_decode():
            self.batch_result_processor.process_batch_result_decode(batch, result)
        else:
            self.batch_result_processor.process_batch_result_prefill(batch, result)
        for req in batch.reqs:
            if req.finished() and req.inflight_middle_chunks <= 0:
                self.requests.pop(req.rid, None)

    def hash_of(self, req):
        """Hashes of a request's tokens, each of all up to it."""
        known = self.hashes.setdefault(req.rid, [])
        tokens = req.origin_input_ids + req.output_ids
        for token in tokens[len(known) :]:
            known.append((known[-1] * 31 + token * 7 + 1) % HASH if known else token)
        return known

    def forward(self, batch):
        """Write the cells of a batch and sample: a token that no other request samples, or the end."""
        rows, slots, positions, hashes = [], batch.out_cache_loc.numpy(), [], []
        decodes = batch.forward_mode.is_decode()
        for req, length in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True):
            first = length - 1 if decodes else req.prefix_len
            positions += range(first, length)
            rows += [req.kv.req_pool_idx] * (length - first)
            known = self.hash_of(req)
            # Under overlap the last token is in flight: it is what sample() will say.
            while len(known) < length:
                token = self.sample(req, len(known))
                known.append((known[-1] * 31 + token * 7 + 1) % HASH)
            hashes += known[first:length]
        assert np.array_equal(self.req_to_token_pool.req_to_token.numpy()[rows, positions], slots), (
            "slots are not the row's"
        )
        for layer in range(LAYERS):
            at = layer * self.cells.blocks + slots
            content = np.stack([positions, np.full(len(positions), layer), hashes, np.ones(len(positions))], 1)
            self.cells.key.numpy()[at, 0] = self.cells.value.numpy()[at, 0] = content
            if self.cells.score is not None:
                self.cells.score.numpy()[at] = SCORES[layer, positions]
            if self.cells.position is not None:
                self.cells.position.numpy()[at] = positions
        if decodes:
            self.watch(batch)
        next_ids = [
            self.sample(req, length) for req, length in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)
        ]
        return GenerationBatchResult(next_token_ids=torch.tensor(next_ids))

    def watch(self, batch):
        """See a decode step whose cells are written, as its attention would."""

    def sample(self, req, position):
        """The token that a request has at a position that it generates."""
        known = req.origin_input_ids + req.output_ids
        if position < len(known):
            return known[position]
        token = END if req.rid in self.ending else 1000 + int(req.rid[1:-1])
        return self.sampled.setdefault((req.rid, position), token)


def publish():
    """Publish what SGLang's scheduler reads of a server's arguments; returns what restores it."""
    override = get_context().override_server_args(
        device="cpu", attention_backend="torch_native", pp_max_micro_batch_size=64
    )
    override.install()
    return override
