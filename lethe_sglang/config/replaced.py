"""Keys and values that earlier versions had, and what to write instead.

The table is looked at only for a key that is unknown or a value that is illegal: an entry never refuses what works.
"""

from __future__ import annotations

from collections.abc import Mapping

_PROFILE = "it is the rule that a profile was made with: lethe {}, then budget.allocation: profile"
_CONSTANT = "no longer an option, the allocator settles it; leave it out"
_BREAKPOINT = "no longer an option, it is the paper's value; leave it out"
_RULES = ("concentration", "pyramid", "d2o", "cake", "zipvl")
_DECAY = "write lethe.half_life, with decay = 0.5 ** (1 / half_life): a decay of 0.998 is a half_life of 346"
_CREDIT = "gone, it improved nothing that was measured; lethe.key_share did"
_DIVERSITY = "write lethe.key_share: the part of the kept tokens that are chosen for their keys, such as 0.5"
_PAPER = "no longer an option, it is {} as in the paper's code; leave it out"

REPLACED: dict[str, str] = {
    "rasr": "the section of policy lethe is called lethe",
    **{f"rasr.{key}": f"write lethe.{key}" for key in ("half_life", "score_every")},
    **{f"{section}.diversity": _DIVERSITY for section in ("rasr", "lethe")},
    **{f"{section}.decay": _DECAY for section in ("rasr", "lethe")},
    **{f"{section}.credit": _CREDIT for section in ("rasr", "lethe")},
    "rkv.kernel": _PAPER.format("7"),
    "rkv.threshold": _PAPER.format("0.5"),
    "gkv.smoothing": _PAPER.format("max"),
    "budget.weights": "write budget.allocation: list, with the tokens of every layer in budget.layers",
    "budget.alpha": "it belongs to the profile: lethe profile --alpha",
    **{f"budget.{key}": _CONSTANT for key in ("min_factor", "max_factor", "classes")},
    "budget.allocation=weights": "write list, with the tokens of every layer in budget.layers",
    "budget.allocation=profiled": _PROFILE.format("profile --rule hoyer"),
    **{f"budget.allocation={rule}": _PROFILE.format(f"profile --rule {rule}") for rule in _RULES},
    "budget.allocation=sensitivity": _PROFILE.format("sensitivity FILE --model-path MODEL --out NEW"),
    "breakpoint": _BREAKPOINT,
    **{f"breakpoint.{key}": _BREAKPOINT for key in ("sparse_ratio", "segments", "reference")},
    "retain.prompt=shared": "write keep",
    "retain.prompt=private": "write evict",
    "debug.fingerprints": "write debug.kept_hash",
    "debug.measure": "not an option; lethe profile measures a model",
    "debug.arms": "not an option; POST /kv_evict gives a live server another configuration",
    "debug.record_requests": "not an option; GET /kv_evict/requests always has them",
}
"""Dotted key, or ``key=value``, -> what to write instead."""


def replaced_key(path: str, value: object) -> list[str]:
    """Say, one line a key, what replaced an unknown key or those inside it; nothing if it never was one."""
    inside = [f"{path}.{key}" for key in value] if isinstance(value, Mapping) else []
    return [f"{key}: {REPLACED[key]}" for key in [k for k in inside if k in REPLACED] or [path] if key in REPLACED]


def replaced_value(path: str, value: object) -> str | None:
    """Say what replaced an illegal value; None if it never was legal."""
    return REPLACED.get(f"{path}={value}")
