"""A live server takes a new configuration: what is refused, and why (``Runtime.reconfigure``).

Everything that decides is equal on all tensor-parallel ranks (configurations, budgets, host numbers of the ledger, the
scheduler's queues), so that either every rank applies a request or none does. Data-parallel replicas differ in their
queues and in the size of their pools; the front asks all of them before it tells any (``verb``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lethe_sglang.config import EvictionConfig
from lethe_sglang.config.changes import changes, when
from lethe_sglang.engine import guard
from lethe_sglang.errors import ConfigError, one_line

if TYPE_CHECKING:
    from lethe_sglang.engine.runtime import Runtime


def unfinished(scheduler: Any) -> tuple[int, int]:
    """Count the requests that run and those that wait; a batch may still hold some that have finished."""
    running = scheduler.collect_inflight_reqs()
    if scheduler.chunked_req is not None:
        running.add(scheduler.chunked_req)
    waiting = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    return sum(not req.finished() for req in running), len(waiting)


def change(
    runtime: Runtime, config: EvictionConfig, budgets: tuple[int, ...], busy: tuple[int, int]
) -> dict[str, list[Any]]:
    """Return what a configuration and its budgets would change, by dotted key, if nothing stands against it.

    Raises
    ------
    ConfigError
        As :func:`check`.
    """
    changed = changes(runtime.config, config)
    if not changed and budgets != runtime.budgets:
        changed["budget.profile"] = [config.budget.profile] * 2  # its file holds another one now
    check(runtime, changed, config, settled(budgets, runtime.num_layers), busy)
    return changed


def check(
    runtime: Runtime,
    changed: Mapping[str, Any],
    config: EvictionConfig,
    budgets: tuple[int, ...],
    busy: tuple[int, int],
) -> None:
    """Check that a server can go over to a configuration as it is now.

    Parameters
    ----------
    runtime
        The server.
    changed
        Options that change, by dotted key.
    config, budgets
        What it is to become.
    busy
        Requests that run and that wait.

    Raises
    ------
    ConfigError
        One line: every reason that stands against it, with the option at fault and what to do.
    """
    problems = [*_untimely(changed, busy), *_states(runtime, config), *_graphs(runtime, config)]
    problems += [*_classes(runtime, config, budgets), *_pool(runtime, config), *runtime.monitor.problems(config)]
    if problems:
        raise one_line([f"kv_evict: {problem}" for problem in problems])


def _untimely(changed: Mapping[str, Any], busy: tuple[int, int]) -> Iterable[str]:
    fixed = [option for option in changed if when(option) == "start"]
    if fixed:
        yield f"{', '.join(fixed)}: settled when the server starts; leave it out, or start the server anew"
    idle = idle_options(changed)
    if idle and any(busy):
        running, waiting = busy
        yield (
            f"{', '.join(idle)}: changes on an idle server only, and {running} requests are running, {waiting} "
            "waiting; wait until they are done, or abort them (POST /abort_request with abort_all: true)"
        )


def idle_options(changed: Mapping[str, Any]) -> list[str]:
    """Name the options that change on an idle server only; those of two policies go and come with them."""
    implied = changed.get("policy", ())
    return [option for option in changed if when(option) == "idle" and option.partition(".")[0] not in implied]


def _states(runtime: Runtime, config: EvictionConfig) -> Iterable[str]:
    cells, policy = runtime.pool.cells, config.built_policy
    needed = {
        "score": policy.accumulation is not None and cells.score is None,
        "position": policy.uses_position and cells.position is None,
        "memory": policy.uses_memory and cells.memory is None,
    }
    if any(needed.values()):
        lacking = ", ".join(name for name, lacks in needed.items() if lacks)
        yield (
            f"policy: {config.policy} needs states that the pool's cells do not carry ({lacking}); "
            "start the server with pool.states: all"
        )


def _graphs(runtime: Runtime, config: EvictionConfig) -> Iterable[str]:
    if runtime.captured and config.built_policy.accumulation != runtime.policy.accumulation:
        yield (
            f"policy: the captured decode graphs hold how {runtime.config.policy} scores; "
            "start the server with --disable-cuda-graph to go from policy to policy"
        )


def _classes(runtime: Runtime, config: EvictionConfig, budgets: tuple[int, ...]) -> Iterable[str]:
    for classes in runtime.length_classes:
        if config.budget.allocation == "breakpoint" or not classes.serve(budgets):
            yield (
                "budget.allocation: layers that had one budget at the start, or at most the mean, share lists and "
                "plans, and this takes them apart; start the server with it"
            )


def _pool(runtime: Runtime, config: EvictionConfig) -> Iterable[str]:
    try:
        guard.check_pool(config, runtime.page_size, runtime.pool.size)
    except ConfigError as error:
        yield str(error)


def settled(budgets: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Check that there is one budget per layer: the front settles them for all ranks.

    Raises
    ------
    ConfigError
        If there are fewer or more.
    """
    if len(budgets) != layers:
        raise ConfigError(f"kv_evict: got budgets for {len(budgets)} layers, but the model has {layers}")
    return budgets
