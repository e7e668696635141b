"""What this plugin needs of SGLang: every function that it wraps or leans on, and why. ``docs/upstream.md`` shows it.

Imported once eviction is asked for, and after the version is known to be the right one: it imports the engine.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang.srt.plugins.hook_registry import HookType

from lethe_sglang.engine import doors, entrypoints, lifecycle, metrics, replies, telemetry, verb
from lethe_sglang.engine.hooking import Hook

AFTER, AROUND, BEFORE = HookType.AFTER, HookType.AROUND, HookType.BEFORE
_MANAGERS = "sglang.srt.managers"
_SCHEDULER = f"{_MANAGERS}.scheduler.Scheduler"
_TOKENIZER = f"{_MANAGERS}.tokenizer_manager.TokenizerManager"
_CONTROLLER = f"{_MANAGERS}.data_parallel_controller.DataParallelController"
_BATCH = f"{_MANAGERS}.schedule_batch"
_COMPONENTS = f"{_MANAGERS}.scheduler_components"
_CACHE = "sglang.srt.mem_cache"
_ATTENTION = "sglang.srt.layers.attention"
_METRICS = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"
_OPENAI = "sglang.srt.entrypoints.openai"


class Reliance(NamedTuple):
    """Something of SGLang that is not wrapped: the plugin subclasses it or counts on what it does, and why."""

    target: str
    why: str


LAUNCHER_HOOKS = (
    Hook(
        f"{_TOKENIZER}._init_req_state",
        BEFORE,
        doors.apply_override,
        "Every HTTP route creates its request here, and here the HTTP request is known, too: what it asks for in a "
        "header or in a part of the body that its route drops becomes a sampling parameter.",
    ),
    Hook(
        f"{_TOKENIZER}._validate_one_request",
        BEFORE,
        doors.check_request,
        "An illegal request must be an HTTP 400 before it reaches a scheduler; SGLang has no validator for custom "
        "parameters that a plugin could register.",
    ),
    Hook(
        f"{_TOKENIZER}.update_request_meta_info",
        AROUND,
        replies.into_meta_info,
        "What a scheduler adds to an output becomes a list of one value a token; an account is one of the request.",
    ),
    Hook(
        f"{_OPENAI}.usage_processor.UsageProcessor.calculate_response_usage",
        AFTER,
        replies.into_usage,
        "OpenAI's replies have no place for more than usage.",
    ),
    Hook(
        f"{_OPENAI}.usage_processor.UsageProcessor.calculate_streaming_usage",
        AFTER,
        replies.into_streamed_usage,
        "The usage of a stream is made of numbers of tokens, and of nothing else that a request brings.",
    ),
)
"""Installed where a launcher starts schedulers that shall evict."""

SCHEDULER_HOOKS = (
    Hook(
        f"{_SCHEDULER}.update_running_batch",
        BEFORE,
        lifecycle.on_decode_step,
        "The only place between two decode steps where rows may change: rounds run here, before SGLang allocates.",
    ),
    Hook(
        f"{_SCHEDULER}._add_request_to_queue",
        BEFORE,
        lifecycle.check_arrival,
        "A request that came past the front door (another door, a default) is aborted here, where SGLang aborts too.",
    ),
    Hook(
        f"{_SCHEDULER}._poll_timeout_aborts",
        AFTER,
        lifecycle.offer_probe,
        "Rank 0 decides by its clock when a finished request is prefilled again, and all ranks have to hear of it in "
        "the same step: what this returns is broadcast with SGLang's requests.",
    ),
    Hook(
        f"{_SCHEDULER}.get_new_batch_prefill",
        AROUND,
        lifecycle.admit_probe,
        "A probe joins an empty queue for one prefill batch and leaves it if not admitted: nobody waits behind it.",
    ),
    Hook(
        f"{_SCHEDULER}.is_fully_idle",
        BEFORE,
        lifecycle.settle_probe,
        "A probe that nobody has sent may not make a flush or the release of memory fail.",
    ),
    Hook(
        f"{_SCHEDULER}.flush_cache",
        BEFORE,
        lifecycle.drop_probes,
        "Who flushes the cache wants nothing of what came before to run any more.",
    ),
    Hook(
        f"{_SCHEDULER}.record_weight_version_change",
        BEFORE,
        lifecycle.drop_probes,
        "Every change of the weights comes by here, and makes the recorded log-probabilities worthless.",
    ),
    Hook(
        f"{_SCHEDULER}.get_prefill_adder_class",
        AFTER,
        lifecycle.adder_class,
        "Admission charges a request its full length; with eviction it never holds more than its bound.",
    ),
    Hook(
        f"{_SCHEDULER}.get_output_streamer_class",
        AFTER,
        replies.streamer_class,
        "A request's last output says what eviction did to it; SGLang asks a subclass for what else goes along.",
    ),
    Hook(
        f"{_SCHEDULER}.init_request_dispatcher",
        AFTER,
        verb.listen,
        "The scheduler dispatches by the type of a message; the verb that reconfigures a server brings one of its own.",
    ),
    Hook(
        f"{_SCHEDULER}.get_init_info",
        AFTER,
        entrypoints.report_rank,
        "Each rank proves to the launcher that its ledger is bound to its pool.",
    ),
    Hook(
        f"{_CACHE}.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        AROUND,
        lifecycle.build_pool,
        "The pool's layers have to be views of one buffer, so that a packed cell may lie in any layer's memory.",
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        AFTER,
        lifecycle.add_state_bytes,
        "A token's states take memory beside its keys and values; without this the pool would be sized too large.",
    ),
    Hook(
        f"{_CACHE}.base_prefix_cache.BasePrefixCache.free_kv_row",
        AROUND,
        lifecycle.free_kv_row,
        "SGLang frees a row by position; positions that a round has emptied own no blocks any more.",
    ),
    Hook(
        f"{_CACHE}.memory_pool.ReqToTokenPool.free_rows",
        BEFORE,
        lifecycle.forget_rows,
        "A row that is given back may be handed out at once; the ledger has to forget it first.",
    ),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        AFTER,
        lifecycle.name_rows,
        "FlashInfer's plans are made on the host, where a replayed batch does not name its rows; and decode steps are "
        "counted, of which a policy may score every n-th only.",
    ),
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.create_attention_graph_variants",
        AFTER,
        lifecycle.graph_variants,
        "A step that is not scored launches less than one that is, so it needs a captured graph of its own.",
    ),
    Hook(
        f"{_BATCH}.ScheduleBatch.prepare_for_extend",
        AROUND,
        lifecycle.prefill,
        "Under pressure a prefill is admitted into memory that running requests give, and they do before it allocates; "
        "its tokens that may be evicted start with the scores of its last queries.",
    ),
    Hook(
        f"{_BATCH}.Req.reset_for_retract",
        AFTER,
        lifecycle.after_retract,
        "What was generated stays the request's own when it is prefilled again, or nothing of it could be evicted.",
    ),
    Hook(
        f"{_COMPONENTS}.pool_stats_observer.kv_private_tokens",
        AFTER,
        lifecycle.private_tokens,
        "SGLang's memory checks count a request's tokens by its length; dead positions hold nothing.",
    ),
    Hook(
        f"{_COMPONENTS}.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        AFTER,
        telemetry.decode_line,
        "One more part of the log line that operators read.",
    ),
    Hook(
        f"{_COMPONENTS}.internal_state.SchedulerInternalStateController.get_internal_state",
        AFTER,
        telemetry.internal_state,
        "GET /server_info says what eviction does.",
    ),
    Hook(
        f"{_METRICS}.init_new",
        AFTER,
        metrics.start,
        "Prometheus metrics are created where SGLang creates its own, with its labels, by the ranks that publish.",
    ),
    Hook(f"{_METRICS}.log_stats", AFTER, metrics.refresh, "Gauges are published when SGLang publishes its own."),
)
"""Installed in a scheduler process that evicts, and nowhere else."""

RELIANCES = (
    Reliance("sglang.srt.arg_groups.resolution_hooks.register_resolution_hook", "Lets the plugin refuse options."),
    Reliance(
        "sglang.srt.arg_groups.overrides.declare_resolution", "Picks backend and decode graphs if none are named."
    ),
    Reliance(
        "sglang.srt.arg_groups.memory_hook.handle_gpu_memory_settings",
        "Runs a second time, to reckon memory with larger decode graphs; what is settled stays as it is.",
    ),
    Reliance(
        "sglang.srt.arg_groups.model_override_base.get_default_attn_backend",
        "Says which attention backend SGLang would choose.",
    ),
    Reliance(
        "sglang.srt.arg_groups.overrides._deterministic_attention_backend",
        "Chooses it where inference is deterministic; the plugin has to know before.",
    ),
    Reliance("sglang.srt.entrypoints.http_server.get_global_state", "Finds the tokenizer manager for the HTTP routes."),
    Reliance("sglang.srt.server_args.ServerArgs.__reduce__", "Lets what was asked for travel in pickled arguments."),
    Reliance(f"{_SCHEDULER}._reqs_finishing_inflight", "Names requests that the result in flight will finish."),
    Reliance(f"{_SCHEDULER}.collect_inflight_reqs", "Names what still runs: some changes need an idle server."),
    Reliance(f"{_MANAGERS}.communicator.FanOutCommunicator", "Carries the verb to the scheduler and its answer back."),
    Reliance(f"{_MANAGERS}.io_struct.hook_custom_types", "Registers the type of that message."),
    Reliance(f"{_CONTROLLER}._record_scheduler_init_infos", "Collects what the ranks of all replicas report."),
    Reliance(f"{_CONTROLLER}.send_control_message", "Hands the verb on to every replica."),
    Reliance(
        f"{_TOKENIZER}.generate_request",
        "Passes is_pause_cond, then reads under model_update_lock: who holds the first keeps requests out, and the "
        "second says whether one is on its way.",
    ),
    Reliance(f"{_TOKENIZER}.auto_create_handle_loop", "Starts the loop that receives the answer."),
    Reliance("sglang.srt.utils.auth.auth_level", "Authorises the verb as SGLang's other admin verbs are."),
    Reliance(f"{_COMPONENTS}.output_streamer.SchedulerOutputStreamer", "Subclassed: accounts of finished requests."),
    Reliance(f"{_TOKENIZER}._handle_batch_output", "Lays out completion_tokens before it asks for more of a request."),
    Reliance(f"{_OPENAI}.protocol.UsageInfo", "Widened, so that it holds the accounts of its choices."),
    Reliance(f"{_TOKENIZER}._create_tokenized_object", "Lays a request over the server's default sampling parameters."),
    Reliance(f"{_BATCH}.Req.set_finish_with_abort", "Turns a request into an error of its own."),
    Reliance(f"{_BATCH}.ScheduleBatch.prepare_for_decode", "Allocates the new token behind the row's last position."),
    Reliance(f"{_BATCH}.ScheduleBatch.check_decode_mem", "Decides on retraction after the rounds of a step."),
    Reliance(
        f"{_BATCH}.ScheduleBatch.new_tokens_required_next_decode",
        "Says what a decode step will allocate: under pressure rounds make room for that and no more.",
    ),
    Reliance(
        f"{_CACHE}.prefill_budget.PrefillBudget", "Its offsets say what admission may count on, in the end and now."
    ),
    Reliance(
        f"{_CACHE}.unified_radix_cache.UnifiedRadixCache.evictable_size",
        "Unused cached prefixes count as free: the pool is short only without them.",
    ),
    Reliance(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        "Lets an observer see the logits before grammars and the sampler change them, and the tokens after.",
    ),
    Reliance(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias_with_observer",
        "Calls it after penalties alone: requests with penalties are not sampled.",
    ),
    Reliance(
        f"{_MANAGERS}.utils.GenerationBatchResult.copy_to_cpu",
        "Copies what it has seen to the host with SGLang's own results, without a wait of its own.",
    ),
    Reliance(
        f"{_COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor.consume_auxiliary_output",
        "Says which of the tokens have become part of a reply, once requests are known to have ended.",
    ),
    Reliance(
        f"{_COMPONENTS}.logprob_result_processor.SchedulerLogprobResultProcessor.add_input_logprob_return_values",
        "Gives a prefill's log-probabilities and likeliest tokens, one line a position behind logprob_start_len.",
    ),
    Reliance(
        f"{_COMPONENTS}.output_streamer.SchedulerOutputStreamer._stream_output_generation",
        "Does not stream a request that has finished and is marked as already streamed: a probe.",
    ),
    Reliance(
        f"{_COMPONENTS}.request_receiver.SchedulerRequestReceiver.recv_requests",
        "Hands what rank 0 adds to all ranks in the same step.",
    ),
    Reliance(
        f"{_SCHEDULER}.get_num_allocatable_reqs", "Says how many rows are free: a probe leaves one for somebody else."
    ),
    Reliance(f"{_BATCH}.release_req", "Releases a row at the end of a request and at a retraction, in this order."),
    Reliance(f"{_BATCH}.ReqKvInfo", "Says what of a row the tree owns, what is allocated and what is committed."),
    Reliance(f"{_CACHE}.common.release_kv_cache", "Frees a request's own part through free_kv_row."),
    Reliance(f"{_CACHE}.common.checkpoint_kv_cache", "Inserts a prompt into the tree, unless the request is flagged."),
    Reliance(f"{_CACHE}.common.free_kv_row_segments", "Frees exactly the positions it is given."),
    Reliance(f"{_CACHE}.allocation.alloc_for_decode_default", "Reads the row's last page to continue in it."),
    Reliance(f"{_CACHE}.allocation.alloc_for_extend", "Allocates a prefill: the pages of its tokens that lack one."),
    Reliance(f"{_CACHE}.allocator.token.TokenToKVPoolAllocator", "Takes single blocks back in any order."),
    Reliance(
        f"{_CACHE}.allocator.paged.PagedTokenToKVPoolAllocator.free_segment", "Takes whole pages back in row order."
    ),
    Reliance(f"{_CACHE}.memory_pool.MHATokenToKVPool._create_buffers_normal", "Overridden: one buffer for all layers."),
    Reliance(f"{_CACHE}.memory_pool.MHATokenToKVPool._kv_buffer_shapes", "Says the shape of a layer's buffer."),
    Reliance(f"{_MANAGERS}.schedule_policy.PrefillAdder", "Subclassed: admission."),
    Reliance(f"{_ATTENTION}.base_attn_backend.AttentionBackend", "Base of every backend: when metadata is made."),
    Reliance(f"{_ATTENTION}.torch_native_backend.TorchNativeAttnBackend", "Subclassed: decode over packed rows."),
    Reliance(f"{_ATTENTION}.flashinfer_backend.FlashInferAttnBackend", "Subclassed: decode over packed rows."),
    Reliance(f"{_ATTENTION}.flashinfer_backend.FlashInferIndicesUpdaterDecode", "Replaced: plans by length classes."),
    Reliance(
        "sglang.srt.model_executor.runner_utils.capture_mode.get_capture_attention_variant",
        "Says which variant of a decode step is being captured, the scored one or the other.",
    ),
    Reliance(f"{_ATTENTION}.triton_backend.TritonAttnBackend", "Subclassed: decode over packed rows."),
    Reliance(
        f"{_ATTENTION}.flashattention_backend:FlashAttentionBackend",
        "Subclassed: decode over the pages of packed rows, which it writes where stock writes its own.",
    ),
    Reliance("sglang.kernels.ops.attention.decode_attention.decode_attention_fwd", "Called over our own lists."),
    Reliance(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.build_replay_fb_view",
        "What a backend sees of a replayed batch: no rows on the host, so name_rows keeps them.",
    ),
)
"""Not wrapped."""

HOOKS = (*entrypoints.ENTRY_HOOKS, *LAUNCHER_HOOKS, *SCHEDULER_HOOKS)
TARGETS = (*(hook.target for hook in HOOKS), *(reliance.target for reliance in RELIANCES))
