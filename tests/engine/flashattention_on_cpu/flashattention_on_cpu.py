"""Test aid: FlashAttention 3 in torch, so that SGLang's own fa3 backend serves on a CPU, and ours on top.

With this folder on ``PYTHONPATH`` every SGLang process loads it as a plugin. Real are then scheduler, overlap, radix
tree, SGLang's backend with its metadata and its calls, and our backend; the kernel, CUDA graphs and streams are not. A
run reads page table and lengths where they lie at that moment, and fails where it was scheduled for other lengths.

With ``WHOLE_PAGES`` the portable backend keeps whole pages, too, so that it can be compared.
"""

from __future__ import annotations

import contextlib
import os
import sys
from itertools import pairwise
from types import ModuleType

import torch

OF_FP8 = torch.bfloat16
"""Type of what attention over fp8 returns."""


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    page_table,
    cache_seqlens,
    cu_seqlens_q,
    max_seqlen_q,
    softmax_scale,
    causal,
    window_size,
    softcap,
    return_softmax_lse,
    num_splits,
    ver,
    out=None,
    scheduler_metadata=None,
    cu_seqlens_k_new=None,
    k_descale=None,
    v_descale=None,
):
    """Attend queries ``[T, H, D]`` to pages ``[pages, page, Hkv, D]``: output, and log-sum-exp ``[H, T]`` of base e."""
    assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
    assert ver == 3 and causal and window_size == (-1, -1) and q.dtype == k_cache.dtype == v_cache.dtype
    starts, lengths, page = cu_seqlens_q.tolist(), cache_seqlens.tolist(), k_cache.shape[1]
    assert starts[0] == 0 and starts[-1] == len(q) and len(lengths) == len(page_table) == len(starts) - 1
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts))
    if scheduler_metadata is not None:
        assert scheduler_metadata[1 : len(lengths) + 1].tolist() == lengths, "scheduled for other lengths"
    result = torch.empty(q.shape, dtype=OF_FP8 if q.element_size() == 1 else q.dtype) if out is None else out
    lse = torch.empty(q.shape[1], len(q))
    for b, n in enumerate(lengths):
        assert 0 < n <= page_table.shape[1] * page, "more tokens than the page table has"
        pages = page_table[b, : -(-n // page)].long()
        k, v = (x[pages].flatten(0, 1)[:n].float() for x in (k_cache, v_cache))
        scale = softmax_scale if k_descale is None else softmax_scale * float(k_descale[b, 0])
        own = slice(starts[b], starts[b + 1])
        output, lse[:, own] = attend(q[own].float(), k, v, scale)
        result[own] = output.mul(1.0 if v_descale is None else float(v_descale[b, 0])).to(result.dtype)
    assert not softcap
    return (result, lse) if return_softmax_lse else result


def attend(q, k, v, scale):
    """Output ``[Q, H, D]`` and natural log-sum-exp ``[H, Q]`` of ``[Q, H, D]``, the last of ``[n, Hkv, D]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,nhd->hqn", q, k) * scale
    late = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
    logits.masked_fill_(late, float("-inf"))
    return torch.einsum("hqn,nhd->qhd", logits.softmax(2), v), logits.logsumexp(2)


def get_scheduler_metadata(*, max_seqlen_k, cache_seqlens, **options):
    """Say for which lengths a run is scheduled."""
    assert int(cache_seqlens.max()) <= max_seqlen_k, "longer than the longest"
    return torch.cat([torch.tensor([max_seqlen_k], dtype=torch.int32), cache_seqlens])


@contextlib.contextmanager
def kernels():
    """Let SGLang import what it would import on a GPU, here alone."""
    doubles = {name: ModuleType(name) for name in ("sgl_kernel", "sgl_kernel.flash_attn")}
    doubles["sgl_kernel"].merge_state_v2 = None
    of = doubles["sgl_kernel.flash_attn"]
    of.get_scheduler_metadata, of.flash_attn_varlen_func, of.flash_attn_with_kvcache = (
        get_scheduler_metadata,
        None,
        None,
    )
    before = {name: sys.modules.pop(name, None) for name in doubles}
    sys.modules.update(doubles)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def register():
    """Give SGLang's backend the kernel it would import on a GPU, and let the plugin take the backend on a CPU."""
    with kernels():
        from sglang.srt.layers.attention import flashattention_backend as stock

    from lethe_sglang.engine import guard

    init = stock.FlashAttentionBackend.__init__

    def built(self, *args, **kwargs):
        with kernels():
            init(self, *args, **kwargs)

    stock.FlashAttentionBackend.__init__ = built
    stock.flash_attn_with_kvcache = lambda *args, **kwargs: flash_attn_with_kvcache(*args, **kwargs)  # as it is by then
    guard.unfit = lambda *_: ""
    if os.environ.get("WHOLE_PAGES"):
        from lethe_sglang.engine import lifecycle

        portable = lifecycle.BACKENDS["torch_native"]

        def whole(runner):
            backend = portable(runner)
            backend.scored.ledger.multiple = runner.page_size
            return backend

        lifecycle.BACKENDS["torch_native"] = whole
