"""Entry point ``sglang.srt.plugins: lethe``: adds the front doors. Nothing of SGLang's runtime is hooked here.

``python -m lethe_sglang.plugin MODULE ...`` runs a program of SGLang that loads no plugins itself, as its benchmarks.
"""

from __future__ import annotations

import runpy
import sys


def register() -> None:
    """Register the command-line flags, the ``sgl.Engine`` options and the start-up checks."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from lethe_sglang.engine import entrypoints, keywords
    from lethe_sglang.engine.hooking import install

    register_resolution_hook("handle_gpu_memory_settings")(entrypoints.capture_larger_batches)
    register_resolution_hook("handle_deterministic_inference")(entrypoints.choose_deterministic_backend)
    register_resolution_hook("handle_attention_backend_compatibility")(entrypoints.choose_backend)
    register_resolution_hook("handle_other_validations")(entrypoints.check_resolution)
    keywords.take_keywords()
    install(entrypoints.ENTRY_HOOKS)


def main() -> None:
    """Load SGLang's plugins, then run the module that the command line names with the rest of it."""
    from sglang.srt.plugins import load_plugins

    if len(sys.argv) < 2:
        sys.exit("lethe_sglang.plugin: give the module to run, for example sglang.benchmark.offline_throughput")
    load_plugins()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
