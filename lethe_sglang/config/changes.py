"""What a running server may change, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lethe_sglang.config.loading import from_mapping
from lethe_sglang.config.policy_section import laid_over
from lethe_sglang.config.schema import EvictionConfig
from lethe_sglang.errors import one_line, show

When = Literal["running", "idle", "start"]

OPTIONS: dict[When, tuple[str, ...]] = {
    "running": (
        "budget.tokens",
        "rounds.interval",
        "requests.allow_off",
        "requests.max_budget",
        "monitor.fraction",
        "monitor.tokens_per_minute",
    ),
    "idle": (
        "policy",
        "budget.allocation",
        "budget.profile",
        "budget.layers",
        "retain.sinks",
        "retain.own_sinks",
        "retain.recent_ratio",
        "retain.prompt",
        "rounds.when",
    ),
    "start": ("pool.states", "debug.shadow", "debug.kept_hash", "debug.record_kept", "debug.pack_always"),
}
"""When an option may change: while requests run, on an idle server, or at the start alone. A policy's own: idle."""


def when(option: str) -> When:
    """Return when an option (a dotted key) may change."""
    return next((time for time, options in OPTIONS.items() if option in options), "idle")


def reconfigured(running: EvictionConfig, options: Any) -> EvictionConfig:
    """Lay options over the running configuration.

    A policy's own options go with it (``laid_over``). A new ``budget.layers`` brings its mean
    along, and goes with allocation list.

    Parameters
    ----------
    running
        What the server runs.
    options
        A mapping of sections and options, as in a configuration file.

    Raises
    ------
    ConfigError
        With one line that names every option at fault and what is legal.
    """
    if not isinstance(options, Mapping):
        raise one_line([f"kv_evict: got {show(options)}, expected a mapping of options such as 'budget:'"])
    base = running.model_dump(mode="json", exclude_unset=True)
    budget = options.get("budget")
    if isinstance(budget, Mapping):
        follows = budget.get("layers") is not None and "tokens" not in budget
        gone = {"tokens": follows, "layers": budget.get("allocation", "list") != "list"}
        base["budget"] = {name: value for name, value in base.get("budget", {}).items() if not gone.get(name)}
    return from_mapping(laid_over(base, options), where="kv_evict")


def changes(old: EvictionConfig, new: EvictionConfig) -> dict[str, list[Any]]:
    """Return what differs: dotted key -> old and new value, None where a configuration lacks the option."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    pairs = {option: [before.get(option), after.get(option)] for option in (*before, *after)}
    return {option: pair for option, pair in pairs.items() if pair[0] != pair[1]}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{option}": inner for option, inner in value.items()}
        else:
            found[name] = value
    return found
