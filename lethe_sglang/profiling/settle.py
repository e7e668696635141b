"""Which budgets the layers get at a server's start, and where the profile that they follow comes from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.allocation.fingerprint import ModelFingerprint
from lethe_sglang.allocation.profile import Profile, load
from lethe_sglang.config import EvictionConfig
from lethe_sglang.profiling import cache

logger = logging.getLogger("lethe_sglang")

Make = Callable[[Path], None]
"""Measures the server's model and writes the profile to a path."""


def settle(
    config: EvictionConfig, model: ModelFingerprint, make: Make | None, folder: Path | None = None
) -> tuple[int, ...]:
    """Return k_l of every layer.

    Parameters
    ----------
    config
        The server's configuration.
    model
        The server's model.
    make
        Makes the profile that ``budget.profile: auto`` needs; None only checks the rest, and returns () where that one
        is needed.
    folder
        The profiles' cache; None is the user's.

    Raises
    ------
    ConfigError
        If a profile cannot be read or made, is of another model, or budgets do not fit the model.
    """
    source, profile = config.budget.profile, None
    if config.budget.reads_profile:
        if source == "auto" and make is None:
            return ()
        profile = _profile(source, model, make, folder)
    return from_config(config, model.layers, profile)


def _profile(source: str, model: ModelFingerprint, make: Make | None, folder: Path | None) -> Profile:
    if source == "auto":
        assert make is not None
        return cache.obtain(model, make, folder)
    where = f"budget.profile {source}"
    profile = load(Path(source), where)
    profile.check(model, where)
    if differing := profile.model.numeric_differences(model):
        logger.warning("KV eviction: %s was measured with %s; it is used all the same", where, ", ".join(differing))
    return profile
