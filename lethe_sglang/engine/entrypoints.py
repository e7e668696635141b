"""The front doors of a server: command line, the launcher's checks and the scheduler's start.

What travels to the scheduler is ``server_args._lethe``, an ``EvictionRequest``: unpickling it imports this module, so a
process in which the plugin is broken dies instead of serving without eviction; and the launcher reports ready only
after every rank has reported that its hooks are in place (``launch``, ``proof``).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from sglang.srt.plugins.hook_registry import HookType

from lethe_sglang import __version__
from lethe_sglang.allocation.fingerprint import ModelFingerprint, fingerprint_of
from lethe_sglang.config import ConfigError, EvictionConfig, resolve
from lethe_sglang.engine import compat, graphs, guard, proof
from lethe_sglang.engine.hooking import Hook, install
from lethe_sglang.policies import policy_names
from lethe_sglang.profiling import automatic
from lethe_sglang.profiling.settle import settle

logger = logging.getLogger("lethe_sglang")

ENGINE_OPTIONS = ("kv_evict", "kv_evict_config", "kv_evict_budget", "kv_evict_profile")


@dataclass(frozen=True)
class EvictionRequest:
    """What the operator asked for.

    Attributes
    ----------
    config
        The resolved configuration.
    from_cli
        Whether errors belong on a terminal (one line, exit status 2) or to a Python caller (``ConfigError``).
    measures
        Whether the server measures a profile (``lethe profile``): it evicts nothing.
    budgets
        k_l of every layer; the launcher settles them once for all ranks.
    model
        Fingerprint of the model, once the launcher has taken it.
    """

    config: EvictionConfig
    from_cli: bool
    measures: bool = False
    budgets: tuple[int, ...] = ()
    model: ModelFingerprint | None = None

    @property
    def request_id(self) -> str:
        """Identifies plugin version, configuration and budgets; every rank must report the same."""
        text = f"{__version__}\n{compat.SUPPORTED}\n{self.config.model_dump_json()}\n{self.budgets}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fail(self, error: Exception) -> NoReturn:
        """Report an error to whoever asked."""
        fail(error, self.from_cli)


def fail(error: Exception, from_cli: bool) -> NoReturn:
    """Report an error to a terminal (one line, exit status 2) or to a Python caller."""
    if from_cli:
        print(f"lethe: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    raise error


def stash(server_args: Any, options: Sequence[Any], from_cli: bool) -> Any:
    """Resolve what the operator asked for (``ENGINE_OPTIONS``, in order), and let it travel unless it is stock SGLang.

    Raises
    ------
    ConfigError, CompatError
        (or, ``from_cli``, a one-line message and exit status 2).
    """
    try:
        if options[0] in (None, "none"):
            for name, value in zip(ENGINE_OPTIONS[1:], options[1:], strict=True):
                if value is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{flag} needs --kv-evict; legal: {', '.join(policy_names())}")
            return server_args
        config = resolve(*options)
        compat.version_check()
    except (ConfigError, compat.CompatError) as error:
        fail(error, from_cli)
    server_args._lethe = EvictionRequest(config=config, from_cli=from_cli)
    return server_args


# -- command line -----------------------------------------------------------------------------------------------------


def add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``."""
    group = parser.add_argument_group("KV eviction (lethe-sglang)")
    group.add_argument(
        "--kv-evict",
        default=None,
        metavar="POLICY",
        help=f"Evict KV during decoding with this policy: none, {', '.join(policy_names())}. Default: none.",
    )
    group.add_argument(
        "--kv-evict-config",
        default=None,
        metavar="FILE|JSON|PRESET",
        help="Eviction settings: a YAML or JSON file, inline JSON, or the name of a preset (`lethe show --presets`).",
    )
    group.add_argument(
        "--kv-evict-budget",
        default=None,
        type=int,
        metavar="N",
        help="Mean tokens a layer keeps after a round, the kept prompt not counted; beats budget.tokens of the config.",
    )
    group.add_argument(
        "--kv-evict-profile",
        default=None,
        metavar="FILE|auto|none",
        help="Share the budget among the layers by the model's profile: a file of `lethe profile`; auto: measured once "
        "at the first start and kept in the user's cache; none: all layers alike. Beats budget.profile of the config, "
        "and means budget.allocation profile where the config names none.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ``ServerArgs.from_cli_args``: stash the request on the server arguments."""
    return stash(original(cls, args), [getattr(args, name, None) for name in ENGINE_OPTIONS], from_cli=True)


# -- launcher ---------------------------------------------------------------------------------------------------------


def requested(server_args: Any) -> EvictionRequest | None:
    """Return what travels in the server arguments, if anything."""
    request: EvictionRequest | None = getattr(server_args, "_lethe", None)
    return request


def choose_backend(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Pick a backend on CUDA where none is named (``handle_attention_backend_compatibility`` step)."""
    from sglang.srt.arg_groups import model_override_base as stock

    def choice(view: Any) -> str:
        chosen: str = stock.get_default_attn_backend(view, stock.use_mla_backend(view), stock.model_config_of(view))
        falls_back = chosen == "fa3" and view.kv_cache_dtype == "fp8_e5m2"  # in the same step of SGLang's
        return "triton" if falls_back else chosen

    _pick(server_args, choice, otherwise="flashinfer")
    previous(server_args)


def choose_deterministic_backend(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Pick one where none is named and inference is deterministic (``handle_deterministic_inference`` step).

    SGLang picks one in that step, before the one above, by the GPU alone (``_deterministic_attention_backend``). Of
    those that serve every budget, Triton keeps the radix cache.
    """
    from sglang.srt.runtime_context import get_platform

    def choice(view: Any) -> str | None:
        if not (view.enable_deterministic_inference or view.rl_on_policy_target):
            return None
        return "flashinfer" if get_platform().is_sm100 or get_platform().is_sm120 else "fa3"

    _pick(server_args, choice, otherwise="triton")
    previous(server_args)


def _pick(server_args: Any, choice: Callable[[Any], str | None], otherwise: str) -> None:
    """Pick what SGLang would choose if it can serve, and say so; ``choice`` says None where it would not choose."""
    request = requested(server_args)
    if request is None:
        return
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    view = resolving_view(server_args)
    if not guard.on_cuda(view) or guard.attention_backends(view) != (None, None) or (stock := choice(view)) is None:
        return
    uniform = request.config.budget.uniform
    backend, why = stock, "as SGLang would"
    if stock not in guard.legal_backends(view, uniform):
        cannot = guard.unfit(view, stock, uniform) if stock in guard.BACKENDS else ""
        backend, why = otherwise, f"because SGLang's own choice, {stock}, does not serve{cannot}"
    logger.info("KV eviction: attention backend not specified; using %s, %s", backend, why)
    declare_resolution(server_args, "lethe", attention_backend=backend)


def capture_larger_batches(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Capture decode graphs of more requests than SGLang would, unless named (``handle_gpu_memory_settings`` step).

    SGLang's step runs twice: once for its own choice, and again to reckon memory with the larger graphs.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import with_phase

    fraction = resolving_view(server_args).mem_fraction_static
    previous(server_args)
    request, view = requested(server_args), resolving_view(server_args)
    named = {("decode", "max_bs"), ("decode", "bs")} & server_args._cuda_graph_config_locked
    if request is None or request.measures or named or (batches := graphs.graph_batches(view)) is None:
        return
    logger.info(
        "KV eviction: decode graphs of up to %d requests, SGLang would take %d; --cuda-graph-max-bs-decode names it",
        batches[-1],
        view.cuda_graph_config.decode.max_bs,
    )
    larger = with_phase(view.cuda_graph_config, "decode", max_bs=batches[-1], bs=batches)
    declare_resolution(server_args, "lethe", cuda_graph_config=larger, mem_fraction_static=fraction)
    previous(server_args)


def check_resolution(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse options and models that do not work with eviction (SGLang's ``handle_other_validations`` step)."""
    previous(server_args)
    request = requested(server_args)
    if request is None:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    try:
        guard.check_options(resolving_view(server_args), request.config.budget.uniform)
        guard.check_debug(resolving_view(server_args), request.config.debug, request.measures)
        model = model_config_of(server_args)
        guard.check_model(model)
        guard.check_defaults(resolving_view(server_args).preferred_sampling_params, request.config, model.context_len)
        settle(request.config, fingerprint_of(model, resolving_view(server_args)), make=None)
    except ConfigError as error:
        request.fail(error)


def launch(original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``Engine._launch_scheduler_processes``: settle the budgets first; ready means that every rank has them."""
    request = requested(server_args)
    if request is None:
        return original(cls, server_args, *args, **kwargs)
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    from lethe_sglang.engine import verb
    from lethe_sglang.engine.hooks import LAUNCHER_HOOKS  # imports the engine: only of the right SGLang

    try:
        install(LAUNCHER_HOOKS)
        model = fingerprint_of(model_config_of(server_args), resolved_view(server_args))
        budgets = settle(request.config, model, lambda path: automatic.run(server_args, path))
    except (ConfigError, RuntimeError) as error:
        request.fail(error)
    request = replace(request, budgets=budgets, model=model)
    verb.open_doors(cls)
    server_args._lethe = request
    result = original(cls, server_args, *args, **kwargs)
    resolved = resolved_view(server_args)
    proof.check_ranks(request, resolved.dp_size, resolved.page_size or 1, *result)
    return result


# -- scheduler --------------------------------------------------------------------------------------------------------


def start_scheduler(scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler.__init__``: install the engine hooks, only if eviction was asked for."""
    request = requested(server_args)
    if request is None:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    compat.version_check()
    from lethe_sglang.engine import lifecycle
    from lethe_sglang.engine.hooks import SCHEDULER_HOOKS
    from lethe_sglang.engine.runtime import Runtime, set_runtime

    resolved, model = resolved_view(server_args), model_config_of(server_args)
    guard.check_options(resolved, request.config.budget.uniform)
    guard.check_model(model)
    if not request.budgets:
        raise RuntimeError(
            "--kv-evict: what started this scheduler is not SGLang's own launcher, which settles the layers' budgets; "
            "start the server with python -m sglang.launch_server or sglang serve, without other plugins "
            "(SGLANG_PLUGINS=lethe)"
        )
    set_runtime(
        Runtime(
            request.config,
            request.budgets,
            resolved.page_size or 1,
            model.context_len,
            measures=request.measures,
            captured=graphs.captures(resolved),
            deterministic=bool(resolved.enable_deterministic_inference),
        )
    )
    install(SCHEDULER_HOOKS)
    ATTENTION_BACKENDS.update(lifecycle.BACKENDS)
    scheduler._lethe_request = request


def report_rank(result: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """AFTER ``Scheduler.get_init_info``: only a rank whose ledger is bound to its pool reports the request's id."""
    from lethe_sglang.engine import reach
    from lethe_sglang.engine.runtime import current
    from lethe_sglang.engine.telemetry import announce

    runtime = current()
    if runtime.pool is not scheduler.token_to_kv_pool_allocator.get_kvcache():
        raise RuntimeError("--kv-evict: the scheduler's pool is not the packed pool")
    announce(runtime)
    reach.warn(runtime)
    runtime.monitor.start(scheduler)
    if str(runtime.pool.device).startswith("cuda") and not runtime.measures:
        runtime.warm_up()
    return {**result, "lethe": scheduler._lethe_request.request_id}


ENTRY_HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        HookType.AFTER,
        add_flags,
        "SGLang has no way for a plugin to add a flag.",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        HookType.AROUND,
        from_cli_args,
        "What was asked for has to travel with the server arguments to every process.",
    ),
    Hook(
        "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        HookType.AROUND,
        launch,
        "The layers' budgets are settled once for all ranks before a scheduler starts, and the launcher may not report "
        "ready before every rank has said that it evicts. Whoever launches, server arguments may come from elsewhere.",
    ),
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        HookType.AFTER,
        proof.relay,
        "Data-parallel ranks report to a process of SGLang's that drops what it does not know; the launcher has to "
        "hear from each of them that it evicts.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        HookType.BEFORE,
        start_scheduler,
        "Everything else is hooked in a scheduler that shall evict, before it builds its pool, and nowhere else.",
    ),
)
"""Installed in every process that loads plugins; they do nothing unless eviction was asked for."""
