"""One live server: whether it is what its arms need, how it goes over to an arm, and what its requests held."""

from __future__ import annotations

import time
import urllib.error
from collections.abc import Sequence
from typing import Any

from lethe_bench.accuracy.experiment import Arm
from lethe_bench.servers import Server, ServerError

_FACTS = (
    "device",
    "dtype",
    "attention_backend",
    "tp_size",
    "page_size",
    "max_running_requests",
    "max_total_num_tokens",
)
PATIENCE = 20
"""How often the server is asked again for a request's record, or to switch, a quarter of a second apart."""


def check_server(server: Server, evicts: bool) -> dict[str, Any]:
    """Check that a server is what its arms need, and return what its defaults came to."""
    info = server.get("/server_info")
    state = info["internal_states"][0].get("lethe")
    if not evicts and state is not None:
        raise ServerError("the stock server evicts; it must run without --kv-evict")
    if evicts and state is None:
        raise ServerError("the server does not evict; is the plugin installed where it runs?")
    return {name: info[name] for name in _FACTS if name in info}


def switch(server: Server, arm: Arm) -> None:
    """Empty the prefix cache and bring the server to an arm.

    Raises
    ------
    ServerError
        If the server refuses, or then reports another configuration.
    """
    config = arm.config
    assert config is not None
    options = config.model_dump(mode="json", exclude={"debug", "pool"})  # those are settled at the start
    for attempt in range(PATIENCE):
        server.post("/flush_cache?timeout=60", {})
        try:
            server.post("/kv_evict", options)
            break
        except urllib.error.HTTPError as error:
            if attempt == PATIENCE - 1:
                why = error.read().decode(errors="replace")[:500]
                raise ServerError(f"the server refused to switch to arm {arm.name}: {why}") from None
        time.sleep(0.25)
    state = state_of(server)
    wanted = {"policy": config.policy, "budget_tokens": config.budget.tokens, "interval": config.rounds.interval}
    if found := {name: state.get(name) for name, value in wanted.items() if state.get(name) != value}:
        raise ServerError(f"the server was switched to {wanted} and reports {found}")


def held(server: Server, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the requests of some replies held, by rid.

    A request that was retracted has several records, which become one; one that ended with its first tokens may have
    none, because it never reached a decode step.

    Raises
    ------
    ServerError
        If the server does not report one of the others.
    """
    rids = {line["rid"] for line in lines}
    expected = {line["rid"] for line in lines if line["tokens"] > 2}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(PATIENCE):
        found = {}
        for record in server.get("/kv_evict/requests")["requests"]:
            if (rid := record["rid"]) in rids:
                values = {name: value for name, value in record.items() if name not in ("rid", "number")}
                found[rid] = _joined(found[rid], values) if rid in found else values
        if expected <= found.keys():
            return {rid: found.get(rid, held_by_stock(1)) for rid in rids}
        time.sleep(0.25)
    missing = sorted(expected - found.keys())
    raise ServerError(f"the server did not report what {len(missing)} requests held, {missing[0]} among them")


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    steps = one["steps"] + other["steps"]
    joined = {name: max(one[name], other[name]) for name in ("held_peak", "stock_peak")}
    for name in ("own_held_mean", "own_stock_mean"):
        joined[name] = (one[name] * one["steps"] + other[name] * other["steps"]) / max(steps, 1)
    columns = zip(one["evicted_per_layer"], other["evicted_per_layer"], strict=True)
    evicted = [a + b for a, b in columns]
    return {"rounds": one["rounds"] + other["rounds"], "evicted_per_layer": evicted, **joined, "steps": steps}


def held_by_stock(tokens: int) -> dict[str, Any]:
    """Say what stock SGLang holds besides a shared prompt: one block more at every decode step."""
    mean = max(tokens - 1, 0) / 2
    return {
        "rounds": 0,
        "evicted_per_layer": [],
        "steps": max(tokens - 1, 0),
        "own_held_mean": mean,
        "own_stock_mean": mean,
    }


def state_of(server: Server) -> dict[str, Any]:
    """Return what the plugin reports of a server."""
    return dict(server.get("/server_info")["internal_states"][0]["lethe"])
