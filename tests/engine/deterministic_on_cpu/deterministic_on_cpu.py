"""Test aid: SGLang's deterministic mode on a CPU, with the portable backend.

With this folder on ``PYTHONPATH`` every SGLang process loads it as a plugin. Real are what SGLang and we decide by the
mode; the batch-invariant kernels, which are a GPU's, are not: sums may differ in their last bits between batch sizes.
"""

from __future__ import annotations


def register() -> None:
    """Let SGLang take the portable backend for one that its deterministic mode and its prefix cache serve with."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda enable_bmm=True: None
