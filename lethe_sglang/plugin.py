"""Entry point ``sglang.srt.plugins: lethe``: adds the front doors. Nothing of SGLang's runtime is hooked here."""

from __future__ import annotations


def register() -> None:
    """Register the command-line flags, the ``sgl.Engine`` options and the start-up checks."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.entrypoints.engine import Engine

    from lethe_sglang.engine.entrypoints import ENTRY_HOOKS, check_resolution, choose_backend, engine_server_args
    from lethe_sglang.engine.hooking import install

    register_resolution_hook("handle_attention_backend_compatibility")(choose_backend)
    register_resolution_hook("handle_other_validations")(check_resolution)
    Engine.server_args_class = staticmethod(engine_server_args(Engine.server_args_class))
    install(ENTRY_HOOKS)
