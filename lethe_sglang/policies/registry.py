"""Name to policy: ours, and those that other distributions register by an entry point."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import asdict
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import to_jsonable_python

from lethe_sglang.errors import one_line
from lethe_sglang.policies.base import Policy

GROUP = "lethe_sglang.policies"
"""The entry-point group in which a distribution names its policies: ``name = "module:Class"``, as below."""

IN_TREE = {
    "lethe": "lethe_sglang.policies.lethe:LethePolicy",
    "h2o": "lethe_sglang.policies.h2o:H2OPolicy",
    "tova": "lethe_sglang.policies.tova:TovaPolicy",
    "snapkv": "lethe_sglang.policies.snapkv:SnapKVPolicy",
    "morphkv": "lethe_sglang.policies.morphkv:MorphKVPolicy",
    "rkv": "lethe_sglang.policies.rkv:RKVPolicy",
    "gkv": "lethe_sglang.policies.gkv:GKVPolicy",
    "lazy": "lethe_sglang.policies.lazy:LazyPolicy",
    "keydiff": "lethe_sglang.policies.keydiff:KeyDiffPolicy",
    "streaming": "lethe_sglang.policies.streaming:StreamingPolicy",
    "random": "lethe_sglang.policies.random:RandomPolicy",
}

RESERVED = frozenset(("none", "policy", "budget", "rounds", "retain", "requests", "pool", "monitor", "debug"))
"""Names no policy can have: ``--kv-evict none`` is stock SGLang, and a policy's section stands beside these."""


@cache
def _registered() -> dict[str, list[EntryPoint]]:
    """Name -> who claims it, ours first. Nothing is imported, so a broken distribution breaks its own policies only."""
    found = {name: [EntryPoint(name, target, GROUP)] for name, target in IN_TREE.items()}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def policy_names() -> tuple[str, ...]:
    """Every policy that ``--kv-evict`` takes, ``none`` apart; whether it can be imported shows when it is asked for."""
    return tuple(name for name in _registered() if name not in RESERVED)


@cache
def policy_class(name: str) -> type[Policy]:
    """Import the policy of a name.

    Raises
    ------
    ConfigError
        If no policy has that name (the message lists the legal ones and the nearest), or if a distribution has
        registered it with a name that is taken, cannot be imported, or is not a policy (the message names it).
    """
    claims = _registered().get(name, [])
    if not claims:
        near = difflib.get_close_matches(name, policy_names(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        stock = () if name == "none" else ("none",)  # which only the flag takes
        raise one_line([f"unknown policy {name!r}{hint}; legal: {', '.join((*stock, *policy_names()))}"])
    *others, point = claims
    where = f"policy {name} of distribution {_owner(point)}"
    if others or name in RESERVED:
        owner = _owner(others[0]) if others else "lethe-sglang"
        raise one_line([f"{where}: the name is taken by {owner}; register it under another name, or uninstall it"])
    try:
        found = point.load()
    except Exception as error:
        raise one_line([f"{where}: {point.value} cannot be imported: {type(error).__name__}: {error}"]) from error
    if problem := _problem(found):
        raise one_line([f"{where}: {point.value} {problem}"])
    kind: type[Policy] = found
    return kind


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "lethe-sglang"


def _problem(found: object) -> str | None:
    """Say why an object is not a policy; None if it is one."""
    if not (isinstance(found, type) and issubclass(found, Policy)):
        return "is not a subclass of lethe_sglang.policies.Policy"
    if inspect.isabstract(found):
        return f"lacks {', '.join(sorted(found.__abstractmethods__))}"
    if not is_pydantic_dataclass(found) or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "is not decorated with @pydantic.dataclasses.dataclass(frozen=True)"
    if not isinstance(getattr(found, "source", None), str):
        return "does not say where it comes from: set source, such as 'arXiv 2511.06029'"
    kind: Any = found
    try:
        made = kind()
        accumulation = made.accumulation
        kind(**to_jsonable_python(asdict(made)))  # a live server's configuration travels so
    except Exception as error:
        return f"cannot be made from its defaults as JSON writes them: {' '.join(str(error).split())}"
    if accumulation is not None and accumulation.rule == "recurrence" and not kind.uses_memory:
        return "accumulates by recurrence, which needs uses_memory = True"
    return None
