"""Name to policy."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from lethe_sglang.config import ConfigError
from lethe_sglang.policies.gkv import GKVPolicy
from lethe_sglang.policies.h2o import H2OPolicy
from lethe_sglang.policies.keydiff import KeyDiffPolicy
from lethe_sglang.policies.lazy import LazyPolicy
from lethe_sglang.policies.lethe import LethePolicy
from lethe_sglang.policies.morphkv import MorphKVPolicy
from lethe_sglang.policies.random import RandomPolicy
from lethe_sglang.policies.rkv import RKVPolicy
from lethe_sglang.policies.snapkv import SnapKVPolicy
from lethe_sglang.policies.streaming import StreamingPolicy
from lethe_sglang.policies.tova import TovaPolicy

if TYPE_CHECKING:
    from lethe_sglang.config import EvictionConfig
    from lethe_sglang.policies.base import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        LethePolicy,
        H2OPolicy,
        TovaPolicy,
        SnapKVPolicy,
        MorphKVPolicy,
        RKVPolicy,
        GKVPolicy,
        LazyPolicy,
        KeyDiffPolicy,
        StreamingPolicy,
        RandomPolicy,
    )
}


def policy_names() -> tuple[str, ...]:
    """Every policy that ``--kv-evict`` takes, ``none`` apart."""
    return tuple(POLICIES)


def build_policy(config: EvictionConfig) -> Policy:
    """Build the policy that a configuration names.

    Raises
    ------
    ConfigError
        If no policy has that name; the message lists the legal ones and the nearest.
    """
    try:
        return POLICIES[config.policy].from_config(config)
    except KeyError:
        near = difflib.get_close_matches(config.policy, POLICIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"--kv-evict: unknown policy {config.policy!r}{hint}; legal: none, {', '.join(POLICIES)}"
        ) from None
