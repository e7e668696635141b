"""Test aid: what keeps LoRA, ``--enable-strict-thinking`` and the release of memory from a CPU.

With this folder on ``PYTHONPATH`` every SGLang process loads it as a plugin. Three things are replaced. Memory that is
asked for pinned is plain memory: the LoRA backend ``torch_native`` computes in torch, and pins what it would copy to a
GPU. A grammar backend applies its masks where logits lie on a CPU, as its grammars already do. And nobody waits for a
GPU that is not there when memory is released, of which a CPU releases none.
"""

from __future__ import annotations

import functools

import torch

TAKES_PINNED = ("arange", "empty", "ones", "tensor", "zeros")


def register():
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from xgrammar import apply_token_bitmask_inplace

    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    for name in TAKES_PINNED:
        setattr(torch, name, unpinned(getattr(torch, name)))
    XGrammarGrammarBackend.apply_vocab_mask = staticmethod(
        lambda logits, vocab_mask: apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")
    )


def unpinned(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made
