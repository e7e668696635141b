"""Test aid: FlashInfer's wrappers in torch, so that SGLang's own FlashInfer backend serves on a CPU, and ours on top.

With this folder on ``PYTHONPATH`` every SGLang process loads it as a plugin. Real are then scheduler, overlap, radix
tree, SGLang's backend and its planning of prefills, our backend and its planning of decode steps; attention kernels,
CUDA graphs and streams are not. A plan knows lengths, by the host's indptr; a run reads the indices where they lie at
that moment, and fails where plan and tables contradict each other. A plan that does not split knows none: its run reads
indptr where it lies, too.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch


class _Wrapper:
    def __init__(
        self, workspace, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, backend="auto", **buffers
    ):
        assert kv_layout == "NHD" and use_cuda_graph == bool(buffers)
        self.is_cuda_graph_enabled, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        for name, buffer in buffers.items():  # graphs hold their addresses
            setattr(self, f"_{name}".removesuffix("fer"), buffer)
        self._float_workspace_buffer = workspace
        self._custom_mask_buf = None
        self.plan = None

    def reset_workspace_buffer(self, workspace, int_workspace):
        self._float_workspace_buffer, self._int_workspace_buffer = workspace, int_workspace

    def forward(self, *args, **kwargs):
        return self.forward_return_lse(*args, **kwargs)[0]


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query a request over a paged cache of page size 1."""

    def begin_forward(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        data_type,
        q_data_type,
        non_blocking,
        fixed_split_size=None,
        disable_split_kv=False,
    ):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32 and page_size == 1
        assert indptr.device.type == "cpu" and bool((last_page_len == 1).all())
        self.plan = indptr.clone(), (num_qo_heads, num_kv_heads, head_dim), (q_data_type, data_type)
        self.whole = disable_split_kv and self.use_tensor_cores
        if self.is_cuda_graph_enabled:
            self._paged_kv_indptr_buf.copy_(indptr)
        else:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr.clone(), indices

    def run(self, *args, **kwargs):
        raise NotImplementedError("forward and forward_return_lse are what the backends call")

    def forward_return_lse(self, q, paged_kv_cache, *, sm_scale, logits_soft_cap=0.0, k_scale=None, v_scale=None):
        indptr, heads, types = self.plan
        key, value = paged_kv_cache
        if self.whole:
            indptr = self._paged_kv_indptr_buf
        assert torch.equal(indptr, self._paged_kv_indptr_buf), "the lists are not as long as the plan says"
        assert (q.shape[1], key.shape[1], key.shape[2]) == heads and (q.dtype, key.dtype) == types
        assert len(q) == len(indptr) - 1 and not logits_soft_cap
        lists = [self._paged_kv_indices_buf[a:b].long() for a, b in pairwise(indptr)]
        parts = [
            attend(query[None], key[cells], value[cells], sm_scale * (k_scale or 1.0), v_scale)
            for query, cells in zip(q, lists, strict=True)
        ]
        return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts])


def fast_decode_plan(wrapper, indptr, *args, global_override_indptr_cpu, **options):
    """Plan a captured wrapper again, from host numbers alone; its indptr has been written."""
    assert torch.equal(wrapper._paged_kv_indptr_buf, global_override_indptr_cpu)
    BatchDecodeWithPagedKVCacheWrapper.begin_forward(wrapper, global_override_indptr_cpu, *args, **options)


class OnCpu:
    """Torch, to a module that asks for tensors of a CUDA device by name."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def zeros(*args, **kwargs):
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    """All queries of a request over its own new keys."""

    def begin_forward(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim, *, q_data_type):
        self.plan = qo_indptr.tolist(), kv_indptr.tolist()

    def forward_return_lse(self, q, k, v, *, causal, sm_scale, window_left=-1, logits_soft_cap=0.0):
        return _extend(self.plan, q, lambda a, b: (k[a:b], v[a:b]), causal, sm_scale, None)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """All queries of a request over its cached keys."""

    def begin_forward(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        **options,
    ):
        assert page_size == 1 and options["custom_mask"] is None
        self.plan, self.indices = (qo_indptr.tolist(), kv_indptr.tolist()), kv_indices

    def forward_return_lse(
        self, q, kv_cache, *, causal, sm_scale, window_left=-1, logits_soft_cap=0.0, k_scale=None, v_scale=None
    ):
        def cached(a, b):
            cells = self.indices[a:b].long()
            return kv_cache[0][cells], kv_cache[1][cells]

        return _extend(self.plan, q, cached, causal, sm_scale * (k_scale or 1.0), v_scale)


def _extend(plan, q, keys_and_values, causal, scale, v_scale):
    queries, keys = plan
    parts = []
    for n in range(len(queries) - 1):
        k, v = keys_and_values(keys[n], keys[n + 1])
        parts.append(attend(q[queries[n] : queries[n + 1]], k, v, scale, v_scale, causal))
    return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts])


def attend(q, k, v, scale, v_scale=None, causal=False):
    """Output ``[Q, H, D]`` and log-sum-exp ``[Q, H]`` in base 2 of ``[Q, H, D]`` over ``[n, Hkv, D]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,nhd->qhn", q.float(), k) * scale
    if causal:
        late = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
        logits.masked_fill_(late[:, None], float("-inf"))
    lse = torch.logsumexp(logits, 2)
    weights = torch.exp(logits - lse[..., None]).nan_to_num()  # no key at all: nothing
    output = torch.einsum("qhn,nhd->qhd", weights, v * (v_scale or 1.0))
    return output.to(q.dtype), lse * math.log2(math.e)


def merge_state(v_a, s_a, v_b, s_b):
    """Merge attention over two parts of the keys, log-sum-exps in base 2."""
    s = torch.logaddexp2(s_a, s_b)
    return v_a * torch.exp2(s_a - s)[..., None] + v_b * torch.exp2(s_b - s)[..., None], s


def register():
    """Give SGLang's backend the wrappers it would import on a GPU, and let the plugin take the backend on a CPU."""
    from sglang.srt.layers.attention import flashinfer_backend

    from lethe_sglang.engine import guard

    for wrapper in _Wrapper.__subclasses__():
        setattr(flashinfer_backend, wrapper.__name__, wrapper)
    flashinfer_backend._safe_merge_state = merge_state
    flashinfer_backend.fast_decode_plan = fast_decode_plan
    flashinfer_backend.torch = OnCpu()
    guard.unfit = lambda *_: ""
