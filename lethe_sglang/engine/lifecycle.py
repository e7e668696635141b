"""The hooks on a request's life: one function per hooked function of SGLang (the table is ``hooks.py``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.runtime_context import get_parallel

from lethe_sglang.attention.scored import ScoreVariants
from lethe_sglang.cache.arrivals import Observed
from lethe_sglang.cache.pool import SCRATCH_FRACTION, PackedKVPool, pool_class
from lethe_sglang.config import ConfigError
from lethe_sglang.engine.admission import LethePrefillAdder, is_private
from lethe_sglang.engine.counters import lives
from lethe_sglang.engine.runtime import Runtime, current
from lethe_sglang.kernels.table import NEVER

logger = logging.getLogger("lethe_sglang")

UNPROVEN: tuple[tuple[str, Callable[[Runtime], bool]], ...] = (
    ("tensor parallelism (--tp 1)", lambda runtime: runtime.ranks.size > 1),
    ("rounds.when pressure (rounds.when always)", lambda runtime: runtime.ledger.on_demand),
    (
        "the kernel that ranks by places (lethe.key_share 0)",
        lambda runtime: getattr(runtime.policy, "key_share", 0) > 0,
    ),
    (
        "the sums of scores that rounds make where they place cells (--attention-backend torch_native)",
        lambda runtime: runtime.policy.accumulation is not None,
    ),
)
"""What no GPU has run, in brackets what does without it, and whether a server uses it (docs/results/gpu has all)."""


def build_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    """AROUND ``KVCacheConfigurator._build_mha_kv_pool``: build the packed pool."""
    runtime = current()
    kwargs["mha_pool_class"] = pool_class(*runtime.tracked())
    pool = original(configurator, **kwargs)
    if not isinstance(pool, PackedKVPool):
        raise RuntimeError(f"--kv-evict needs the plain multi-head KV pool, SGLang built {type(pool).__name__}")
    return pool


def add_state_bytes(size: int, configurator: Any, kvc: Any, num_layers: int) -> int:
    """AFTER ``DefaultPoolConfigurator._compute_cell_size``: states take 4 bytes a cell each, rounds a scratch."""
    runtime = current()
    return math.ceil((size + 4 * num_layers * sum(runtime.tracked())) * (1 + SCRATCH_FRACTION))


def on_decode_step(scheduler: Any, batch: Any) -> None:
    """BEFORE ``Scheduler.update_running_batch``: the head of a decode step, where rounds happen.

    Those that are due by a request's length, or those that make room for the step where the pool is short.

    A request is left alone until its second decode step (under overlap its prefill's result is not processed before),
    once it has finished, and when the result in flight will finish it.
    """
    runtime = current()
    ledger = runtime.ledger
    finishing = {id(req) for req in scheduler._reqs_finishing_inflight(batch)}
    due, known = [], len(ledger.requests)
    for req in batch.reqs:
        kv = req.kv
        if req.decode_batch_idx < 1 or not kv.holds_kv or req.finished() or id(req) in finishing:
            continue
        state = runtime.follow(req)
        if kv.kv_committed_len >= state.due_at:
            due.append((state, int(kv.kv_committed_len)))
            req.skip_radix_cache_insert = True  # nothing with holes enters the tree
    if due:
        _wait_for_forward(scheduler)
        runtime.run_rounds(due, scheduler.token_to_kv_pool_allocator)
        batch.batch_is_full = False
    elif ledger.on_demand:
        if len(ledger.requests) > known:
            batch.batch_is_full = False  # whoever is followed can give: admission may count on more than before
        runtime.pressure.before_decode(scheduler, batch, partial(_wait_for_forward, scheduler))
    if ledger.dirty:
        _wait_for_forward(scheduler)
        ledger.flush()


def _wait_for_forward(scheduler: Any) -> None:
    """Order what follows on the schedule stream behind the forward in flight, without stopping the host."""
    if torch.device(scheduler.device).type == "cpu":
        return
    module = torch.get_device_module(scheduler.device)
    module.current_stream().wait_stream(scheduler.forward_stream)


def check_arrival(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler._add_request_to_queue``: what slipped past the front door is an error of that request.

    A request that comes back after a retraction was legal when it came, whatever the configuration is by now.
    """
    runtime = current()
    if req.to_finish is None and not req.finished() and not hasattr(req, "_kv_evict"):
        try:
            runtime.check(req)
        except ConfigError as error:
            req.set_finish_with_abort(str(error))
    runtime.monitor.sample(req)


def offer_probe(result: list[Any], scheduler: Any) -> list[Any] | None:
    """AFTER ``Scheduler._poll_timeout_aborts``: what rank 0 has decided rides the broadcast of SGLang's requests."""
    monitor = current().monitor
    return [*result, *monitor.offer(scheduler)] if monitor.active else None


def admit_probe(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """AROUND ``Scheduler.get_new_batch_prefill``: a probe is prefilled where nobody waits."""
    return current().monitor.admit(original, scheduler, running_batch)


def settle_probe(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler.is_fully_idle``: a probe does not keep a server busy."""
    current().monitor.settle(scheduler)


def drop_probes(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE a flush of the cache and a change of the weights: what was recorded is not compared any more."""
    current().monitor.drop()


def prefill(original: Callable[..., None], batch: Any) -> None:
    """AROUND ``ScheduleBatch.prepare_for_extend``: make room for what admission has let in, then say who is scored."""
    runtime = current()
    if runtime.ledger.on_demand:
        runtime.pressure.before_prefill(batch)
    original(batch)
    observe_prefill(batch)


def observe_prefill(batch: Any) -> None:
    """Say from where on the rows of a prefill are scored, and whose prefill does so.

    The last chunk of a prefill does, by its own queries; rows and lengths are host numbers here and nowhere later.
    """
    runtime = current()
    runtime.ledger.observed, start = [], 0
    for req in batch.reqs:
        end = start + req.extend_len
        row = req.kv.req_pool_idx
        if row is not None:
            for observer in runtime.observers:
                observer.on_prefill(row, req.rid)
            evicts, length = runtime.evicts(req), len(req.full_untruncated_fill_ids)
            prefix, rest = runtime.protected(req, int(req.kv.cache_protected_len))
            runtime.ledger.announce(row, prefix if evicts else NEVER)
            scored = runtime.policy.accumulation is not None and evicts and is_private(req, batch.tree_cache)
            if scored and start < end and req.extend_end == length > prefix + rest:  # a kept prompt alone needs none
                runtime.ledger.observed.append(Observed(row, prefix, length, start, end))
        start = end


def name_rows(result: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER ``ForwardBatch.init_new``: name the rows of a decode step, from which its lists are planned, and count it.

    What attention sees of a replayed batch names them on the device only, and reading them back would stop the host.
    """
    runtime = current()
    rows = runtime.step_rows = batch.req_pool_indices_cpu.tolist() if batch.forward_mode.is_decode() else []
    if rows:
        ledger = runtime.ledger
        lengths = result.seq_lens_cpu.tolist() if ledger.phase.by_length else ()
        ledger.phase.advance(lengths, new=not any(row in ledger.requests for row in rows))
    runtime.monitor.note(batch)
    return result


def graph_variants(result: Any, hf_config: Any) -> Any:
    """AFTER ``create_attention_graph_variants``: a step that is not scored is another graph than one that is."""
    runtime = current()
    return ScoreVariants(runtime.ledger.phase) if runtime.ledger.phase.every > 1 else result


def free_kv_row(original: Callable[..., None], tree: Any, kv: Any, ranges: Sequence[tuple[int, int]]) -> None:
    """AROUND ``BasePrefixCache.free_kv_row``: dead positions own no blocks."""
    runtime = current()
    if kv.req_pool_idx is not None:
        runtime.released(kv.req_pool_idx, kv.kv_allocated_len)
    live = runtime.ledger.live(kv.req_pool_idx, ranges)
    if live:
        original(tree, kv, live)


def private_tokens(result: int, kv: Any, page_size: int) -> int:
    """AFTER ``kv_private_tokens``: a request's own footprint is less its dead positions."""
    return result - current().ledger.dead_len(kv.req_pool_idx)


def forget_rows(pool: Any, indices: list[int]) -> None:
    """BEFORE ``ReqToTokenPool.free_rows``: the ledger forgets the rows."""
    current().close_rows(indices)


def after_retract(result: Any, req: Any) -> None:
    """AFTER ``Req.reset_for_retract``: what was generated stays private when it is prefilled again.

    Otherwise the re-prefill would hand prompt and output to the radix tree, and nothing of it could be evicted.
    """
    runtime = current()
    runtime.counters.retracted += 1
    lives(req).append(None)
    if runtime.evicts(req):
        req.skip_radix_cache_insert = True


def adder_class(result: type, scheduler: Any) -> type:
    """AFTER ``Scheduler.get_prefill_adder_class``: what it admits may need rounds of those that run."""
    current().pressure.admits(scheduler, partial(_wait_for_forward, scheduler))
    return LethePrefillAdder


def torch_native_backend(runner: Any) -> Any:
    """Replace the factory of ``torch_native`` in ``ATTENTION_BACKENDS`` (the name stays: SGLang compares names)."""
    from lethe_sglang.attention.torch_native import LetheTorchNativeBackend

    runtime = attach(runner)
    return _known(runtime, LetheTorchNativeBackend(runner, runtime.pool, runtime.ledger, runtime.policy.accumulation))


def _attached_on_gpu(runner: Any) -> Runtime:
    """Attach, and say what no GPU has run yet."""
    runtime = attach(runner)
    if used := [what for what, uses in UNPROVEN if uses(runtime)]:
        logger.warning(
            "KV eviction: tested on CPUs only, and not yet run on a GPU: %s; watch the first replies, or do without",
            "; ".join(used),
        )
    return runtime


def flashinfer_backend(runner: Any) -> Any:
    """Replace the factory of ``flashinfer``."""
    from lethe_sglang.attention.flashinfer import LetheFlashInferBackend

    runtime = _attached_on_gpu(runner)
    backend = LetheFlashInferBackend(
        runner,
        runtime.pool,
        runtime.ledger,
        runtime.policy.accumulation,
        runtime.budgets,
        rows=lambda: runtime.step_rows,
        single_plan=runtime.config.budget.allocation == "breakpoint",
    )
    return _known(runtime, backend)


def triton_backend(runner: Any) -> Any:
    """Replace the factory of ``triton``."""
    from lethe_sglang.attention.triton import LetheTritonBackend

    runtime = _attached_on_gpu(runner)
    budgets = None if runtime.config.budget.allocation == "breakpoint" else runtime.budgets
    backend = LetheTritonBackend(runner, runtime.pool, runtime.ledger, runtime.policy.accumulation, budgets)
    return _known(runtime, backend)


def flash_attention_backend(runner: Any) -> Any:
    """Replace the factory of ``fa3``, which checks the GPU as the guard does."""
    from lethe_sglang.attention.flashattention import LetheFlashAttentionBackend

    runtime = _attached_on_gpu(runner)
    backend = LetheFlashAttentionBackend(
        runner, runtime.pool, runtime.ledger, runtime.policy.accumulation, runtime.budgets
    )
    return _known(runtime, backend)


BACKENDS = {
    "torch_native": torch_native_backend,
    "flashinfer": flashinfer_backend,
    "triton": triton_backend,
    "fa3": flash_attention_backend,
}
"""Factories for ``ATTENTION_BACKENDS``."""


def _known(runtime: Runtime, backend: Any) -> Any:
    """Let a backend follow the runtime when it takes another policy, and the runtime heed the backend's classes."""
    runtime.backends.append(backend)
    backend.observers = [observer for observer in runtime.observers if observer.sees_attention]
    if backend.classes is not None:
        runtime.length_classes.append(backend.classes)
    return backend


def attach(runner: Any) -> Runtime:
    """Bind the runtime to the pools of the runner whose attention backend is being built."""
    runtime = current()
    pool = runner.token_to_kv_pool
    if not isinstance(pool, PackedKVPool):
        raise RuntimeError(f"--kv-evict needs the packed pool, the runner has {type(pool).__name__}")
    runtime.attach(pool, runner.req_to_token_pool.req_to_token)
    tp_size = get_parallel().tp_size
    if tp_size > 1:
        runtime.ranks.size, runtime.ranks.group = tp_size, get_tp_group().device_group
        runtime.ranks.rank = get_parallel().tp_rank
    return runtime
