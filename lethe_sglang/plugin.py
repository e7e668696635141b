"""Entry point ``sglang.srt.plugins: lethe``: adds the front doors. Nothing of SGLang's runtime is hooked here."""

from __future__ import annotations


def register() -> None:
    """Register the command-line flags, the ``sgl.Engine`` options and the start-up checks."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.entrypoints.engine import Engine

    from lethe_sglang.engine import entrypoints
    from lethe_sglang.engine.hooking import install

    register_resolution_hook("handle_gpu_memory_settings")(entrypoints.capture_larger_batches)
    register_resolution_hook("handle_deterministic_inference")(entrypoints.choose_deterministic_backend)
    register_resolution_hook("handle_attention_backend_compatibility")(entrypoints.choose_backend)
    register_resolution_hook("handle_other_validations")(entrypoints.check_resolution)
    Engine.server_args_class = staticmethod(entrypoints.engine_server_args(Engine.server_args_class))
    install(entrypoints.ENTRY_HOOKS)
