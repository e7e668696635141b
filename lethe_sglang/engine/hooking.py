"""Wrap functions of SGLang through its own hook registry, and prove that each hook took effect."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType


class Hook(NamedTuple):
    """One wrapped function of SGLang.

    Attributes
    ----------
    target
        Its dotted name.
    kind
        Whether ours runs before it, after it (and may replace its result), or around it.
    function
        Ours.
    why
        What would be wrong without it, in a sentence.
    """

    target: str
    kind: HookType
    function: Callable[..., Any]
    why: str


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
        HookRegistry.register(hook.target, hook.function, hook.kind, source=source)
    HookRegistry.apply_hooks()
    for hook in missing:
        if pkgutil.resolve_name(hook.target) == before[hook.target]:  # a class method is a new object each time
            raise RuntimeError(
                f"--kv-evict could not hook {hook.target}: another plugin has patched it, or SGLang's hook registry "
                "refused (see the log above); remove the other plugin (SGLANG_PLUGINS=lethe) or use --kv-evict none"
            )
        _installed.add(hook.target)
