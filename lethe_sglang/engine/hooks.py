"""The one table of hook targets. All of SGLang that the plugin changes or leans on is named here."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_BATCH = "sglang.srt.managers.schedule_batch"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
_ATTENTION = "sglang.srt.layers.attention"
_METRICS = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"


class Hook(NamedTuple):
    """One hooked function: ``target`` is wrapped by ``function``, a dotted name inside ``lethe_sglang.engine``."""

    target: str
    kind: HookType
    function: str


ENTRY_HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", HookType.AFTER, "front.add_flags"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", HookType.AROUND, "front.from_cli_args"),
    Hook(f"{_SCHEDULER}.__init__", HookType.BEFORE, "front.start_scheduler"),
)
"""Installed in every process that loads plugins; they do nothing unless eviction was asked for."""

LAUNCHER_HOOKS = (
    Hook("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", HookType.AROUND, "front.launch"),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        HookType.BEFORE,
        "front.check_request",
    ),
)
"""Installed in the launcher once eviction is asked for."""

SCHEDULER_HOOKS = (
    Hook(f"{_SCHEDULER}.update_running_batch", HookType.BEFORE, "lifecycle.prune"),
    Hook(f"{_SCHEDULER}._add_request_to_queue", HookType.BEFORE, "lifecycle.check_arrival"),
    Hook(f"{_SCHEDULER}.get_prefill_adder_class", HookType.AFTER, "lifecycle.adder_class"),
    Hook(f"{_SCHEDULER}.init_request_dispatcher", HookType.AFTER, "verb.listen"),
    Hook(f"{_SCHEDULER}.get_init_info", HookType.AFTER, "front.report_rank"),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        HookType.AROUND,
        "lifecycle.build_pool",
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        HookType.AFTER,
        "lifecycle.add_state_bytes",
    ),
    Hook(
        "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.free_kv_row", HookType.AROUND, "lifecycle.free_kv_row"
    ),
    Hook("sglang.srt.mem_cache.memory_pool.ReqToTokenPool.free_rows", HookType.BEFORE, "lifecycle.forget_rows"),
    Hook(f"{_FORWARD_BATCH}.init_new", HookType.AFTER, "lifecycle.name_rows"),
    Hook(f"{_BATCH}.ScheduleBatch.prepare_for_extend", HookType.AFTER, "lifecycle.observe_prefill"),
    Hook(f"{_BATCH}.Req.reset_for_retract", HookType.AFTER, "lifecycle.after_retract"),
    Hook(f"{_COMPONENTS}.pool_stats_observer.kv_private_tokens", HookType.AFTER, "lifecycle.private_tokens"),
    Hook(
        f"{_COMPONENTS}.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        HookType.AFTER,
        "telemetry.decode_line",
    ),
    Hook(
        f"{_COMPONENTS}.internal_state.SchedulerInternalStateController.get_internal_state",
        HookType.AFTER,
        "telemetry.internal_state",
    ),
    Hook(f"{_METRICS}.__init__", HookType.AFTER, "telemetry.start_metrics"),
    Hook(f"{_METRICS}.log_stats", HookType.AFTER, "telemetry.log_metrics"),
)
"""Installed in a scheduler process that evicts, and nowhere else."""

READ_TARGETS = (
    f"{_SCHEDULER}._reqs_finishing_inflight",
    f"{_SCHEDULER}.collect_inflight_reqs",
    "sglang.srt.managers.communicator.FanOutCommunicator",
    "sglang.srt.managers.io_struct.hook_custom_types",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
    "sglang.srt.utils.auth.auth_level",
    f"{_BATCH}.ScheduleBatch.prepare_for_decode",
    f"{_BATCH}.ScheduleBatch.check_decode_mem",
    f"{_BATCH}.release_req",
    f"{_BATCH}.Req.set_finish_with_abort",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    f"{_BATCH}.ReqKvInfo",
    "sglang.srt.mem_cache.common.release_kv_cache",
    "sglang.srt.mem_cache.common.checkpoint_kv_cache",
    "sglang.srt.mem_cache.common.free_kv_row_segments",
    "sglang.srt.mem_cache.allocation.alloc_for_decode_default",
    "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator",
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_segment",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._kv_buffer_shapes",
    "sglang.srt.managers.schedule_policy.PrefillAdder",
    f"{_ATTENTION}.base_attn_backend.AttentionBackend",
    f"{_ATTENTION}.torch_native_backend.TorchNativeAttnBackend",
    f"{_ATTENTION}.flashinfer_backend.FlashInferAttnBackend",
    f"{_ATTENTION}.flashinfer_backend.FlashInferIndicesUpdaterDecode",
    f"{_ATTENTION}.triton_backend.TritonAttnBackend",
    "sglang.kernels.ops.attention.decode_attention.decode_attention_fwd",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.build_replay_fb_view",
)
"""Not wrapped, but the plugin subclasses them or relies on what they do."""

ALL_TARGETS = (*(hook.target for hook in (*ENTRY_HOOKS, *LAUNCHER_HOOKS, *SCHEDULER_HOOKS)), *READ_TARGETS)


def _resolve(function: str) -> Callable[..., Any]:
    module, name = function.rsplit(".", 1)
    hook: Callable[..., Any] = getattr(pkgutil.resolve_name(f"lethe_sglang.engine.{module}"), name)
    return hook


_installed: set[str] = set()


def install(hooks: tuple[Hook, ...]) -> None:
    """Install hooks that are not installed yet, and prove that each took effect.

    SGLang's registry only logs a hook that fails to apply and skips a target that somebody has already patched; either
    would leave a server that runs without eviction, so both are errors here.

    Raises
    ------
    RuntimeError
        Naming the target that could not be hooked.
    """
    missing = [hook for hook in hooks if hook.target not in _installed]
    source = HookSource(plugin_name="lethe", dist_name="lethe-sglang")
    before = {hook.target: pkgutil.resolve_name(hook.target) for hook in missing}
    for hook in missing:
        HookRegistry.register(hook.target, _resolve(hook.function), hook.kind, source=source)
    HookRegistry.apply_hooks()
    for hook in missing:
        if pkgutil.resolve_name(hook.target) is before[hook.target]:
            raise RuntimeError(
                f"--kv-evict could not hook {hook.target}: another plugin has patched it, or SGLang's hook registry "
                "refused (see the log above); remove the other plugin (SGLANG_PLUGINS=lethe) or use --kv-evict none"
            )
        _installed.add(hook.target)
