"""The front doors of a Python program: what is built of keywords takes ours, and a copy keeps what was asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from lethe_sglang.engine.entrypoints import ENGINE_OPTIONS, requested, stash


def take_keywords() -> None:
    """Let ``sgl.Engine`` take our keywords, and ``HttpServerEngineAdapter`` where its module has been imported.

    ``ServerArgs(kv_evict=...)`` itself cannot: it is a struct of fixed fields. ``sgl.Engine.server_args_class``, which
    SGLang has for forks of it, builds one.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    build = building(Engine.server_args_class)
    Engine.server_args_class = staticmethod(build)
    if (adapter := sys.modules.get("sglang.srt.entrypoints.http_server_engine")) is not None:
        adapter.ServerArgs = build  # type: ignore[attr-defined]  # what it builds its own with, and nothing else
    for name in ("__copy__", "__replace__"):
        setattr(ServerArgs, name, keeping(getattr(ServerArgs, name)))


def building(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what builds server arguments: it takes our flags as keywords; ``kv_evict_config`` is a str or a dict."""

    def build(**kwargs: Any) -> Any:
        options = {name: kwargs.pop(name, None) for name in ENGINE_OPTIONS}
        if isinstance(options["kv_evict_config"], dict):
            options["kv_evict_config"] = json.dumps(options["kv_evict_config"])
        return stash(stock(**kwargs), list(options.values()), from_cli=False)

    return build


def keeping(copy_fields: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what copies the fields of server arguments and nothing else. Pickling keeps everything by itself."""

    def copied(server_args: Any, **changes: Any) -> Any:
        copy = copy_fields(server_args, **changes)
        if (request := requested(server_args)) is not None:
            copy._lethe = request
        return copy

    return copied
