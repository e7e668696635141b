"""Doubles for the decode backends: FlashInfer's plan/run contract in torch, SGLang's classes from their own source.

What SGLang calls on a step is not imitated: the methods under test run inside the installed classes, whose methods are
taken from their source files, because importing those files takes longer than all of these tests.
"""

from __future__ import annotations
import __future__

import ast
import copy
import importlib
import importlib.util
import math
import sys
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch
from cache_model import MiniPool

import lethe_sglang.attention
from lethe_sglang.allocation.budgets import scale
from lethe_sglang.cache.layout import ceil_div, narrow_layers, page_ceil
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.kernels.common import Cells, Lists
from lethe_sglang.policies.base import Accumulation
from lethe_sglang.policies.lethe import LethePolicy

HEADS, KV_HEADS, DIM, LAYERS, CONTEXT = 6, 2, 8, 5, 200
GARBAGE = 1e3
STREAM = []
"""Copies that the device has yet to make, in order."""
EARLY = []
"""The indptr that the kernel launched last has written, and what it held before."""


MIN_BLOCK_KV = 4
"""Of the Triton decode's double, so that short lists have several parts."""
DONE = []
"""Those it has made."""


def drain(until=None):
    """Let the device make the copies that are queued, or as many as make ``until`` of them."""
    while STREAM and (until is None or len(DONE) < until):
        DONE.append(STREAM.pop(0))
        DONE[-1]()


class Event:
    """A CUDA event on that queue."""

    def record(self):
        self.until = len(DONE) + len(STREAM)

    def synchronize(self):
        drain(self.until)


class Launched:
    """The kernels of a device, with what a launch behind them may see too early."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        kernel = getattr(self.kernels, name)

        def launch(*args):
            EARLY.clear()
            lists = next((a for a in args if isinstance(a, Lists)), None) if name == "fill_lists" else None
            before = None if lists is None else lists.indptr.clone()
            kernel(*args)
            if lists is not None:
                EARLY[:] = lists.indptr, before

        return launch


# -- the installed sources --------------------------------------------------------------------------------------------


def root(package: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


@cache
def tree(package: str, path: str) -> ast.Module:
    return ast.parse((root(package) / path).read_text())


def node(package: str, path: str, name: str):
    """A top-level class or function, or ``Class.method``."""
    found = tree(package, path)
    for part in name.split("."):
        found = next(n for n in found.body if getattr(n, "name", None) == part)
    return found


def build(path: str, name: str, scope: dict, methods: Iterable[str] | None = None):
    """Make a class of SGLang from its source, with all its methods or those named, in the given scope."""
    chosen = copy.copy(node("sglang", path, name))
    chosen.body = [n for n in chosen.body if methods is None or getattr(n, "name", None) in {*methods}]
    exec(compile(ast.Module([chosen], []), path, "exec", __future__.annotations.compiler_flag), scope)
    return scope[name]


def attributes(path: str, name: str) -> set[str]:
    """What a class's ``__init__`` sets on ``self``."""
    targets = [n for n in ast.walk(node("sglang", path, f"{name}.__init__")) if isinstance(n, ast.Attribute)]
    return {n.attr for n in targets if isinstance(n.ctx, ast.Store) and getattr(n.value, "id", None) == "self"}


def parameters(package: str, path: str, name: str) -> list[str]:
    arguments = node(package, path, name).args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


# -- FlashInfer -------------------------------------------------------------------------------------------------------


def split(lengths: torch.Tensor, chunk: int) -> list[int]:
    return [max(ceil_div(int(n), chunk), 1) for n in lengths]


class BatchDecodeWithPagedKVCacheWrapper:
    """Plan/run semantics of FlashInfer's fa2 decode.

    A plan knows lengths by the host's indptr and lives in the integer workspace, at its address; a run reads plan,
    indptr and indices where they lie at that moment. A plan that splits visits the chunks it planned: what lies behind
    them is missed, and a chunk that begins behind a list's end underflows.

    A plan is written on the host, and its copy to the device stands in a queue (``STREAM``) until the device gets to
    it: at the latest when a kernel behind it runs. A run that is launched programmatically reads indptr before the
    kernel in front of it has written it (``EARLY``).
    """

    CHUNK = 4

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
    ):
        assert kv_layout == "NHD" and backend == "fa2", "other backends copy the tables at plan time"
        self.is_cuda_graph_enabled, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = torch.empty(2**10, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = torch.empty(2**10, dtype=torch.uint8)
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self.begin_forward = self.plan
        self.planned = []
        self.with_lse = False
        if use_cuda_graph:
            self._fixed_batch_size = len(paged_kv_last_page_len_buffer)
            assert len(paged_kv_indptr_buffer) == self._fixed_batch_size + 1
            assert bool((paged_kv_last_page_len_buffer == 1).all())

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        self._float_workspace_buffer, self._int_workspace_buffer = float_workspace_buffer, int_workspace_buffer
        self._pin_memory_int_workspace_buffer = torch.empty_like(int_workspace_buffer)

    def plan(
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
        non_blocking=True,
        fixed_split_size=None,
        disable_split_kv=False,
    ):
        if self.is_cuda_graph_enabled:
            assert len(indices) <= len(self._paged_kv_indices_buf)
            self._paged_kv_indptr_buf.copy_(indptr)
            self._paged_kv_last_page_len_buf.copy_(last_page_len)
            self._paged_kv_indices_buf[: len(indices)].copy_(indices)
        else:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr.clone(), indices
            self._paged_kv_last_page_len_buf = last_page_len
        assert fixed_split_size is None or self.use_tensor_cores, "fixed_split_size needs tensor cores"
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (HEADS, KV_HEADS, DIM, 1)
        self._write_plan(indptr, len(last_page_len), fixed_split_size, disable_split_kv)

    def _write_plan(self, indptr_host, batch, fixed_split_size, disable_split_kv):
        if self.is_cuda_graph_enabled:
            assert batch == self._fixed_batch_size, "the batch size is fixed in CUDA graph mode"
        whole = disable_split_kv and self.use_tensor_cores  # the other kernel's plan ignores the flag
        chunk = 2**30 if whole else fixed_split_size or self.CHUNK
        words = torch.tensor([batch, chunk, whole, *split(indptr_host.diff(), chunk)], dtype=torch.int32)
        staged = self._pin_memory_int_workspace_buffer.view(torch.int32)[: len(words)]
        staged[:] = words
        there = self._int_workspace_buffer.view(torch.int32)[: len(words)]

        def copy():
            assert torch.equal(staged, words), "a plan was overwritten before it was copied"
            there.copy_(staged)

        STREAM.append(copy)
        self.planned.append(indptr_host.tolist())

    def run(self, q, paged_kv_cache, sm_scale, k_scale, v_scale, enable_pdl=None):
        drain()
        key, value = (cache.float() for cache in paged_kv_cache)
        ends = self._paged_kv_indptr_buf
        if enable_pdl is not False and EARLY and EARLY[0].data_ptr() == ends.data_ptr():
            ends = EARLY[1]
        words = self._int_workspace_buffer.view(torch.int32)
        batch, chunk, whole = words[:3].tolist()
        assert q.shape == (batch, HEADS, DIM), "not the batch that was planned"
        output, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for b, chunks in enumerate(words[3 : 3 + batch].tolist()):
            begin, end = ends[b : b + 2].tolist()
            length = end - begin
            assert whole or (chunks - 1) * chunk < length, "the plan over-estimates a length: a chunk underflows"
            cells = self._paged_kv_indices_buf[begin : begin + min(length, chunks * chunk)].long()
            k, v = (x[cells].repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
            logits = torch.einsum("hd,nhd->hn", q[b].float(), k) * (sm_scale * (k_scale or 1.0))
            lse[b] = torch.logsumexp(logits, 1) * math.log2(math.e)
            output[b] = torch.einsum("hn,nhd->hd", logits.softmax(1), v * (v_scale or 1.0)).to(q.dtype)
        return output, lse

    def forward(self, q, paged_kv_cache, *, sm_scale, logits_soft_cap, k_scale, v_scale):
        self.with_lse = False
        return self.run(q, paged_kv_cache, sm_scale, k_scale, v_scale)[0]

    def forward_return_lse(self, q, paged_kv_cache, *, sm_scale, logits_soft_cap, k_scale, v_scale):
        self.with_lse = True
        return self.run(q, paged_kv_cache, sm_scale, k_scale, v_scale)

    def addresses(self):
        buffers = (
            self._paged_kv_indptr_buf,
            self._paged_kv_indices_buf,
            self._paged_kv_last_page_len_buf,
            self._int_workspace_buffer,
            self._float_workspace_buffer,
        )
        return [buffer.data_ptr() for buffer in buffers]


def fast_decode_plan(
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
    non_blocking=True,
    fixed_split_size=None,
    disable_split_kv=False,
    global_override_indptr_cpu=None,
):
    assert global_override_indptr_cpu is not None, "without it the plan waits for the device"
    assert len(indices) <= len(self._paged_kv_indices_buf)
    self._write_plan(global_override_indptr_cpu, len(last_page_len), fixed_split_size, disable_split_kv)


# -- SGLang -----------------------------------------------------------------------------------------------------------

FLASHINFER = "srt/layers/attention/flashinfer_backend.py"
FLASHATTENTION = "srt/layers/attention/flashattention_backend.py"
TRITON = "srt/layers/attention/triton_backend.py"
BASE = "srt/layers/attention/base_attn_backend.py"
FORWARD = "srt/model_executor/forward_batch_info.py"


@dataclass
class KVWriteLoc:
    loc: torch.Tensor
    swa_loc: torch.Tensor | None = None

    @classmethod
    def for_batch(cls, forward_batch, swa_loc=None):
        return cls(forward_batch.out_cache_loc, swa_loc)

    @classmethod
    def for_layer(cls, forward_batch, layer, swa_loc=None):
        return cls.for_batch(forward_batch, swa_loc)


Mode = build(FORWARD, "ForwardMode", {"IntEnum": IntEnum, "auto": auto})


def stock_flashinfer(scope):
    scope |= {
        "ForwardMode": Mode,
        "partial": partial,
        "fast_decode_plan": fast_decode_plan,
        "torch": torch,
        "envs": SimpleNamespace(SGLANG_OPT_FLASHINFER_VERIFY_HOST_PLAN=SimpleNamespace(get=lambda: False)),
    }
    scope["DecodeMetadata"] = lambda wrappers, swa_out_cache_loc=None: SimpleNamespace(decode_wrappers=wrappers)
    methods = (
        "init_forward_metadata_out_graph",
        "init_forward_metadata",
        "_prepare_cuda_graph_metadata",
        "get_cuda_graph_seq_len_fill_value",
        "_kv_write_scales",
    )
    backend = build(FLASHINFER, "FlashInferAttnBackend", scope, methods)

    def init(self, runner):
        pool = runner.req_to_token_pool
        self.req_to_token_pool, self.token_to_kv_pool = pool, runner.token_to_kv_pool
        self.num_wrappers, self.decode_uses_dequant_workspace, self.use_sliding_window_kv_pool = 1, False, False
        self.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: False)
        self.decode_use_tensor_cores = self.disable_cuda_graph_kv_split = runner.deterministic
        self.decode_split_tile_size = 16 if runner.deterministic else None
        self.decode_backend = self.prefill_backend = "fa2"
        self.workspace_buffer = torch.empty(64, dtype=torch.uint8)
        self.kv_last_page_len = torch.ones(16, dtype=torch.int32)
        self.dispatch_reason, self.decode_cuda_graph_metadata, self.forward_metadata = None, {}, None
        self.decode_wrappers = [BatchDecodeWithPagedKVCacheWrapper(self.workspace_buffer, backend="fa2")]
        self.indices_updater_decode = SimpleNamespace(
            num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, data_type=torch.float32, q_data_type=torch.float32
        )

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.cuda_graph_kv_indices = [torch.zeros(max_num_tokens * CONTEXT, dtype=torch.int32)]

    backend.__init__, backend.init_cuda_graph_state = init, init_cuda_graph_state
    backend.forward_extend = lambda self, q, k, v, layer, forward_batch, save_kv_cache=True: "stock extend"
    return backend


def decode_attention_fwd(
    q,
    k_buffer,
    v_buffer,
    o,
    kv_indptr,
    kv_indices,
    attn_logits,
    attn_lse,
    num_kv_splits,
    max_kv_splits,
    sm_scale,
    k_scale,
    v_scale,
    logit_cap=0.0,
    sinks=None,
    xai_temperature_len=-1,
    has_mla=False,
    use_pdl=False,
    page_size=1,
    score_mod=None,
    aux_tensors=None,
    enable_lean=None,
    lean_Mp=None,
    lean_Lp=None,
    lean_Op=None,
    lean_locks=None,
    uneven_batch=None,
):
    """SGLang's Triton decode: a list is cut into ``num_kv_splits`` parts, whose log-sum-exps are natural.

    Parts that are not in use are not written: whatever lay there stays.
    """
    assert max_kv_splits == attn_logits.shape[2] and q.shape[0] <= min(kv_indptr.shape[0] - 1, attn_logits.shape[0])
    for b in range(q.shape[0]):
        begin, end = kv_indptr[b : b + 2].tolist()
        splits, length = int(num_kv_splits[b]), end - begin
        part = ceil_div(ceil_div(length, splits), MIN_BLOCK_KV) * MIN_BLOCK_KV
        cells = kv_indices[begin:end]
        k, v = (x[cells].float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_buffer, v_buffer))
        logits = torch.einsum("hd,nhd->hn", q[b].float(), k) * (sm_scale * k_scale)
        for number, start in enumerate(range(0, length, part)):
            attn_lse[b, :, number] = torch.logsumexp(logits[:, start : start + part], 1)
        o[b] = torch.einsum("hn,nhd->hd", logits.softmax(1), v * v_scale).to(q.dtype)


class Translator:
    """SGLang's funnel for stock's own lists."""

    def __init__(self, req_to_token):
        self.req_to_token = req_to_token

    def pack_read_stream(self, plan, *, req_pool_indices, seq_lens, indptr, out, kv_start_idx=None, kind=None):
        for b, row in enumerate(req_pool_indices.tolist()):
            out[indptr[b] : indptr[b + 1]] = self.req_to_token[row, : int(seq_lens[b])].to(out.dtype)


def stock_triton(scope):
    scope |= {"dataclass": dataclass, "torch": torch, "ForwardMode": Mode}
    scope["maybe_create_verify_mask"] = lambda **_: None
    build(TRITON, "ForwardMetadata", scope)
    methods = (
        "init_forward_metadata_out_graph",
        "_init_forward_metadata_out_graph",
        "_fill_cuda_graph_swa_out_cache_loc",
        "_apply_cuda_graph_metadata",
        "_build_cuda_graph_forward_metadata",
        "_update_decode_kv_buffers",
        "_fill_kv_indptr_and_indices",
        "init_forward_metadata",
        "init_cuda_graph_state",
        "get_num_kv_splits",
        "get_cuda_graph_seq_len_fill_value",
        "_set_kv_buffer",
    )
    backend = build(TRITON, "TritonAttnBackend", scope, methods)

    def init(self, runner):
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_index_translator = Translator(self.req_to_token)
        self.kv_indptr, self.window_kv_indptr = torch.zeros(17, dtype=torch.int32), None
        self.skip_prefill = self.use_sliding_window_kv_pool = self.use_mla = self.use_pdl = self.is_draft_runner = False
        self.sliding_window_size = self.swa_v_head_dim = self.num_draft_tokens = None
        self.dcp_size, self.num_head, self.num_kv_head, self.v_head_dim = 1, HEADS, KV_HEADS, DIM
        self.device, self.max_context_len = "cpu", CONTEXT
        self.enable_deterministic, self.static_kv_splits, self.device_core_count = True, False, 4
        self.split_tile_size = 16
        self.max_kv_splits = -(-CONTEXT // self.split_tile_size)
        self.lean_total_programs, self.lean_block_m = 1, 1
        self.forward_metadata, self.decode_attention_fwd = None, decode_attention_fwd

    backend.__init__ = init
    backend.forward_extend = lambda self, q, k, v, layer, forward_batch, save_kv_cache=True, **_: "stock extend"
    return backend


def paged_kernel():
    """FlashAttention's double, which serves whole servers too."""
    path = Path(__file__).parents[1] / "engine/flashattention_on_cpu/flashattention_on_cpu.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OF_FP8 = torch.float32  # as the portable backend's outputs are
    return module


paged = paged_kernel()


def stock_flash_attention(scope):
    scope |= {"dataclass": dataclass, "torch": torch, "ForwardMode": Mode, "Optional": Optional}
    scope |= {"AttentionType": SimpleNamespace(ENCODER_ONLY="encoder_only")}
    scope["flash_attn_with_kvcache"] = lambda *args, **options: paged.flash_attn_with_kvcache(*args, **options)
    for function in ("paged_view", "paged_kv_view"):
        build("srt/mem_cache/layout/paged_view.py", function, scope)
    metadata = build(FLASHATTENTION, "FlashAttentionMetadata", scope)
    methods = (
        "_compute_scheduler_metadata",
        "_mxfp8_sf_kwargs",
        "_capture_unified_verify_metadata",
        "init_forward_metadata_in_graph",
        "init_forward_metadata_out_graph",
        "_init_full_cg_decode_metadata",
        "_spec_read_seq_len_delta",
        "get_paged_mha_kv_cache",
        "prepare_paged_mha_query",
        "forward_decode",
        "init_cuda_graph_state",
        "_bind_metadata_buffers",
        "_apply_cuda_graph_metadata",
        "get_cuda_graph_seq_len_fill_value",
    )
    backend = build(FLASHATTENTION, "FlashAttentionBackend", scope, methods)

    def init(self, runner):
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.kv_index_translator = SimpleNamespace(is_translating=False, reads_are_translated=False)
        self.forward_metadata, self.decode_cuda_graph_metadata, self.device = None, {}, "cpu"
        self.use_mla = self.has_swa = self.is_encoder_decoder = self.use_sliding_window_kv_pool = False
        self.kv_cache_is_mxfp8 = self.is_prefill_aware_swa = self.has_softcap = self.fa_skip_kv_cache = False
        self._disable_scheduler_metadata_precompute = self._decode_uses_static_max_seqlen_k = False
        self.local_attn_builder, self.attention_chunk_size, self.full_cg_prefill_metadata = None, None, None
        self.kv_cache_dtype, self.kv_cache_dtype_str = runner.kv_cache_dtype, runner.kv_cache_dtype_str
        self.page_size, self.max_context_len = runner.page_size, CONTEXT
        self.max_num_pages = ceil_div(CONTEXT, self.page_size)
        self.topk = self.speculative_num_steps = self.speculative_step_id = 0
        self.speculative_num_draft_tokens, self.fa_impl_ver = None, 3
        self.num_splits = self.decode_num_splits = int(runner.deterministic)
        self.head_dim, self.num_attention_heads, self.num_kv_heads = DIM, HEADS, KV_HEADS
        self._get_scheduler_metadata = paged.get_scheduler_metadata

    backend.__init__ = init
    backend.needs_cpu_seq_lens = False
    backend.forward_extend = lambda self, q, k, v, layer, forward_batch, save_kv_cache=True, **_: "stock extend"
    return {"FlashAttentionBackend": backend, "FlashAttentionMetadata": metadata}


def stock_torch_native(scope):
    class TorchNativeAttnBackend(scope["AttentionBackend"]):
        def __init__(self, runner):
            self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool

        def init_forward_metadata(self, forward_batch):
            pass

        def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
            return "stock extend"

    return TorchNativeAttnBackend


CAPTURED = [None]
"""Which variant of a decode step is being captured, last; None is none."""


@contextmanager
def capturing(variant):
    CAPTURED.append(variant)
    yield
    CAPTURED.pop()


def modules() -> dict[str, ModuleType]:
    scope = {"Enum": Enum, "ABC": object, "ForwardMode": Mode, "debug_kernel_api": lambda function: function}
    ends = build(BASE, "SharedReadEnds", scope)
    base = build(BASE, "AttentionBackend", scope)
    where = {"AttentionBackend": base, "SharedReadEnds": ends, "KVWriteLoc": KVWriteLoc}
    attention = "sglang.srt.layers.attention"
    contents = {
        f"{attention}.base_attn_backend": {"AttentionBackend": base, "SharedReadEnds": ends},
        f"{attention}.flashinfer_backend": {
            "FlashInferAttnBackend": stock_flashinfer(dict(where)),
            "BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper,
        },
        f"{attention}.flashattention_backend": stock_flash_attention(dict(where)),
        f"{attention}.triton_backend": {"TritonAttnBackend": stock_triton(dict(where))},
        f"{attention}.torch_native_backend": {"TorchNativeAttnBackend": stock_torch_native(where)},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
        "sglang.srt.model_executor.runner_utils.capture_mode": {"get_capture_attention_variant": lambda: CAPTURED[-1]},
        "sglang.kernels.ops.attention.decode_attention": {"_MIN_BLOCK_KV": MIN_BLOCK_KV},
    }
    out = {}
    for name, values in contents.items():
        out[name] = ModuleType(name)
        out[name].__dict__.update(values)
    return out


BACKENDS = ("scored", "flashinfer", "flashattention", "triton", "torch_native")


def doubled() -> SimpleNamespace:
    """Import our backends over the doubles; the process's own modules are as before afterwards."""
    names = [f"lethe_sglang.attention.{name}" for name in BACKENDS]
    doubles = modules()
    before = {name: sys.modules.pop(name, None) for name in (*names, *doubles)}
    sys.modules.update(doubles)
    try:
        return SimpleNamespace(**{name.rsplit(".", 1)[1]: importlib.import_module(name) for name in names})
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
            elif name in names:
                delattr(lethe_sglang.attention, name.rsplit(".", 1)[1])


ours = doubled()


BUDGETS = (5, 12, 5, 20, 12)
SUM = Accumulation(decay=0.9)

# -- a small server ---------------------------------------------------------------------------------------------------


@cache
def noise(*name, shape=()):
    generator = torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))
    return torch.randn(shape, generator=generator)


class World(MiniPool):
    """Rows and cells as a server has them: grouped heads, random keys, states; prefixes may be shared.

    ``stored`` keeps keys and values as bytes of that type, as SGLang does with fp8; ``rounded`` only rounds them to it.
    """

    def __init__(self, page=1, window=None, stored=None, rounded=None, budgets=BUDGETS, **options):
        super().__init__(num_layers=LAYERS, page=page, pages=600 // page, context=CONTEXT, **options)
        self.stored, self.rounded = stored, rounded
        count = LAYERS * self.cells.blocks
        shape = (count, KV_HEADS, DIM)
        cache = self.as_stored(torch.full(shape, GARBAGE))
        self.cells = Cells(
            key=cache,
            value=cache.clone(),
            score=torch.full((count,), GARBAGE),
            position=torch.zeros(count, dtype=torch.int32),
            memory=torch.full((count,), GARBAGE),
            num_layers=LAYERS,
            blocks=self.cells.blocks,
            dtype=stored,
        )
        self.budgets, narrow = budgets, narrow_layers(budgets)
        self.ledger = Ledger(len(self.req_to_token), LAYERS, page, 6, 8, "cpu", window=window, narrow=narrow)

    def as_stored(self, x):
        if self.stored is not None:
            return x.to(self.stored).view(torch.uint8)
        return x if self.rounded is None else x.to(self.rounded).float()

    def allocate(self, row):
        position = self.seq.setdefault(row, 0)
        if position % self.page == 0:
            self.last = {**getattr(self, "last", {}), row: self.free.pop()}
        self.req_to_token[row, position] = self.last[row] * self.page + position % self.page
        self.seq[row] = position + 1

    def write(self, row, position):
        """Append a prompt token with its K, V and score in every layer."""
        self.allocate(row)
        for layer in range(LAYERS):
            cell = layer * self.cells.blocks + int(self.req_to_token[row, position])
            self.cells.key[cell] = self.as_stored(noise("k", row, layer, position, shape=(KV_HEADS, DIM)))
            self.cells.value[cell] = self.as_stored(noise("v", row, layer, position, shape=(KV_HEADS, DIM)))
            self.cells.score[cell] = 0.01 * noise("s", row, layer, position).abs()
            self.cells.memory[cell] = 0.0

    def admit(self, row, length, prefix, budgets, shared_with=None):
        if shared_with is not None:
            self.req_to_token[row, :prefix] = self.req_to_token[shared_with, :prefix]
            self.seq[row] = prefix
        for position in range(self.seq.get(row, 0), length):
            self.write(row, position)
        return self.ledger.open(f"r{row}", row, prefix, budgets, length)

    def due(self):
        return [s for s in self.ledger.requests.values() if self.seq[s.row] >= s.due_at]

    def runner(self, deterministic=False):
        pool = SimpleNamespace(cells=self.cells, start_layer=0, set_kv_buffer=self.store, get_key_buffer=None)
        pool.get_kv_buffer = lambda layer: (self.cells.of_layer(layer).keys, self.cells.of_layer(layer).values)
        rows = SimpleNamespace(req_to_token=self.req_to_token, size=len(self.req_to_token) - 1)
        return SimpleNamespace(
            token_to_kv_pool=pool,
            req_to_token_pool=rows,
            deterministic=deterministic,
            page_size=self.page,
            kv_cache_dtype=self.stored or torch.float32,
            kv_cache_dtype_str="auto" if self.stored is None else "fp8",
        )

    def store(self, layer, where, k, v, *scales):
        cells = layer.layer_id * self.cells.blocks + where.loc
        self.cells.key[cells], self.cells.value[cells] = self.as_stored(k), self.as_stored(v)

    def decode_batch(self, rows, **more):
        """Allocate one token for each row and describe the step as SGLang does."""
        for row in rows:
            self.allocate(row)
        seq = [self.seq[row] for row in rows]
        slots = [int(self.req_to_token[row, n - 1]) for row, n in zip(rows, seq, strict=True)]
        return forward_batch(rows, seq, slots, **more)


def forward_batch(rows, seq, slots, **more):
    seq_lens = torch.tensor(seq)
    fields = {
        "forward_mode": Mode.DECODE,
        "batch_size": len(rows),
        "req_pool_indices": torch.tensor(rows),
        "seq_lens": seq_lens,
        "seq_lens_cpu": seq_lens.clone(),
        "seq_lens_sum": sum(seq),
        "positions": seq_lens - 1,
        "out_cache_loc": torch.tensor(slots),
        "encoder_lens": None,
        "spec_info": None,
        "kv_loc_plan": None,
    }
    return SimpleNamespace(**(fields | more))


def make_layer(number, **more):
    fields = {
        "layer_id": number,
        "scaling": 0.4,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "tp_v_head_num": KV_HEADS,
        "head_dim": DIM,
        "qk_head_dim": DIM,
        "v_head_dim": DIM,
        "logit_cap": 0.0,
        "k_scale": None,
        "v_scale": None,
        "k_scale_float": None,
        "v_scale_float": None,
        "xai_temperature_len": -1,
        "is_cross_attention": False,
        "sliding_window_size": -1,
        "attn_type": "decoder",
    }
    return SimpleNamespace(**(fields | more))


def step_inputs(rows, seq):
    """Query, key and value of every layer for one decode step; padded rows have their own."""

    def stack(kind, layer, heads):
        return torch.stack([noise(kind, r, layer, n, shape=(heads, DIM)) for r, n in zip(rows, seq, strict=True)])

    return [
        (stack("q", layer, HEADS).view(len(rows), -1), stack("dk", layer, KV_HEADS), stack("dv", layer, KV_HEADS))
        for layer in range(LAYERS)
    ]


def same_states(mine, ref):
    """Compare the states of all cells but the padding block's, which absorb what nobody reads."""
    for state, expected in ((mine.cells.score, ref.cells.score), (mine.cells.memory, ref.cells.memory)):
        mine_real, real = (s.view(LAYERS, -1)[:, mine.page :] for s in (state, expected))
        torch.testing.assert_close(mine_real, real, rtol=1e-4, atol=1e-6)


def forward(backend, batch, inputs, layers):
    return [backend.forward_decode(q, k, v, layer, batch) for layer, (q, k, v) in zip(layers, inputs, strict=True)]


class Unreadable:
    """Host state that a replayed graph cannot see."""

    def __getattr__(self, name):
        raise AssertionError(f"a captured graph does not read host state: {name}")


class GraphRunner:
    """SGLang's decode graph runner: static inputs, one capture a batch size, padded replays.

    A replay runs what was captured on what lies at the captured addresses; Python state of that moment is put back.
    """

    def __init__(self, backend, ledger, sizes=(2, 4)):
        self.backend, self.ledger, self.captured = backend, ledger, {}
        backend.init_cuda_graph_state(max(sizes), max(sizes))
        fill = backend.get_cuda_graph_seq_len_fill_value()
        self.layers = [make_layer(n) for n in range(LAYERS)]
        zeros = torch.zeros(max(sizes), dtype=torch.int64)
        self.static = {
            "req_pool_indices": zeros.clone(),
            "seq_lens": zeros + fill,
            "seq_lens_cpu": zeros + fill,
            "positions": zeros.clone(),
            "out_cache_loc": zeros.clone(),
        }
        self.inputs = step_inputs([0] * max(sizes), [1] * max(sizes))
        self.variants = ours.scored.ScoreVariants(ledger.phase) if ledger.phase.every > 1 else None
        for size, variant in product(sizes, self.variants.capture_labels if self.variants else (None,)):
            batch = self.view(size, encoder_lens=None, seq_lens_sum=size * fill)
            with capturing(variant):
                backend.init_forward_metadata_out_graph(batch, in_capture=True)
            inputs = [tuple(x[:size] for x in one) for one in self.inputs]
            self.captured[size, variant] = (batch, inputs, backend.forward_metadata)
            self.run(size, variant)

    def view(self, size, **more):
        static = {name: buffer[:size] for name, buffer in self.static.items()}
        fields = {"forward_mode": Mode.DECODE, "batch_size": size, "spec_info": None, "kv_loc_plan": None}
        return SimpleNamespace(**(fields | static | {"encoder_lens": None, "seq_lens_sum": None} | more))

    def run(self, size, variant):
        batch, inputs, metadata = self.captured[size, variant]
        now, self.backend.forward_metadata = self.backend.forward_metadata, metadata
        requests, self.ledger.requests = self.ledger.requests, Unreadable()
        phase = self.ledger.phase
        if variant is not None:
            self.ledger.phase = SimpleNamespace(every=phase.every, by_length=phase.by_length)
        with capturing(variant):
            self.backend.init_forward_metadata_in_graph(batch)
            outputs = forward(self.backend, batch, inputs, self.layers)
        self.ledger.requests, self.ledger.phase, self.backend.forward_metadata = requests, phase, now
        return outputs

    def replay(self, batch, inputs):
        raw = batch.batch_size
        size = min(n for n, _ in self.captured if n >= raw)
        padding = {"seq_lens": 1, "seq_lens_cpu": 1}
        for name, buffer in self.static.items():
            buffer[:raw] = getattr(batch, name)
            buffer[raw:size] = padding.get(name, 0)
        for mine, given in zip(self.inputs, inputs, strict=True):
            for buffer, values in zip(mine, given, strict=True):
                buffer[:raw] = values
        self.backend.init_forward_metadata_out_graph(self.view(size))
        variant = self.variants.select(batch) if self.variants else None
        return [output[:raw] for output in self.run(size, variant)]


class Server:
    """A world and a backend over it, with the rows of the step as the scheduler would name them."""

    def __init__(self, make, deterministic=False, every=1, by_length=False, **options):
        self.world = World(**options)
        self.world.ledger.phase.configure(every, by_length)
        self.rows: list[int] = []
        self.backend = make(self.world.runner(deterministic), self.world, lambda: self.rows)
        self.backend.scored.kernels = Launched(self.backend.scored.kernels)
        STREAM.clear()
        self.layers = [make_layer(n) for n in range(LAYERS)]
        self.run = self.eager

    def capture(self, sizes=(2, 4, 8)):
        self.graphs = GraphRunner(self.backend, self.world.ledger, sizes)
        self.run = self.graphs.replay

    def eager(self, batch, inputs):
        self.backend.init_forward_metadata(batch)
        return forward(self.backend, batch, inputs, self.layers)

    def step(self, rows, policy):
        world, self.rows = self.world, list(rows)
        if due := world.due():
            world.round(due, policy)
        world.ledger.flush()
        batch = world.decode_batch(rows)
        new = not any(row in world.ledger.requests for row in rows)
        world.ledger.phase.advance(batch.seq_lens.tolist(), new)
        return self.run(batch, step_inputs(rows, batch.seq_lens.tolist()))

    def admit(self):
        """Private and shared prefixes, a request with a budget of its own, one that is not evicted from."""
        budgets = self.world.budgets
        self.world.admit(1, 30, 0, budgets)
        self.world.admit(2, 33, 16, budgets)
        self.world.admit(3, 25, 16, budgets, shared_with=2)
        self.world.admit(4, 21, 0, None)
        self.world.admit(5, 28, page_ceil(8, self.world.page), scale(budgets, 8, 3))
        self.world.write(6, 0)  # its first decode step: the ledger has not seen it
        self.prefilled()

    def prefilled(self):
        """Tell the backend of prefills, whose tokens have their states already."""
        rows = sorted(self.world.seq)
        prefill = forward_batch(rows, [self.world.seq[row] for row in rows], [], forward_mode=Mode.EXTEND)
        prefill.out_cache_loc = None
        self.backend.scored.begin(prefill)


def portable(accumulation=SUM):
    def make(runner, world, rows):
        return ours.torch_native.LetheTorchNativeBackend(runner, runner.token_to_kv_pool, world.ledger, accumulation)

    return make


def compare(mine, reference, steps=26, policy=None):
    """Drive both servers over changing batches, rounds in between, and compare everything after every step."""
    policy = policy or LethePolicy()
    reference.world.ledger.multiple = mine.world.ledger.multiple
    rounds = 0
    for server in (mine, reference):
        server.admit()
    for number in range(steps):
        rows = [(1, 2, 3, 4, 5, 6), (2, 3, 5), (3, 1), (5,)][number % 4]
        rounds += len(mine.world.due())
        outputs, expected = mine.step(rows, policy), reference.step(rows, policy)
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
        same_states(mine.world, reference.world)
        assert torch.equal(mine.world.req_to_token, reference.world.req_to_token), "the rounds kept different tokens"
    assert rounds >= 6, "too few rounds to mean anything"


def compare_scaled(mine, graph, **options):
    """An fp8 cache stores ``k / k_scale``: the same keys at a scale must give the same outputs and scores."""
    reference = Server(portable(), **options)
    reference.world.ledger.multiple = mine.world.ledger.multiple
    scales = {"k_scale": torch.tensor(0.5), "k_scale_float": 0.5, "v_scale": torch.tensor(0.25), "v_scale_float": 0.25}
    mine.layers = [make_layer(n, **scales) for n in range(LAYERS)]
    if graph:
        mine.capture()
        mine.graphs.layers[:] = mine.layers
    for server in (mine, reference):
        server.admit()
    mine.world.cells.key.mul_(2.0)
    mine.world.cells.value.mul_(4.0)
    store = mine.world.store
    mine.backend.token_to_kv_pool.set_kv_buffer = lambda layer, where, k, v, *_: store(layer, where, 2 * k, 4 * v)
    for _ in range(4):
        outputs, expected = mine.step((1, 2, 3), LethePolicy()), reference.step((1, 2, 3), LethePolicy())
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
        same_states(mine.world, reference.world)


def meta(values):
    """Tensors among attributes, moved where they have no values."""
    return {name: value.to("meta") for name, value in values.items() if isinstance(value, torch.Tensor)}


def launches_of_a_step(backend, patch):
    """Run a decode step over tensors without values, which nothing can read back; return the kernels it launches."""
    launched, scored = [], backend.scored
    for name in ("start_states", "schedule", "score"):
        patch.setattr(scored.kernels, name, lambda *args, name=name: launched.append(name))
    fills = {True: " with indptr", False: ""}
    kinds = {True: "fill_slots", False: "fill_cells"}
    patch.setattr(scored.kernels, "fill_lists", lambda *args: launched.append(kinds[args[2] is None] + fills[args[-1]]))
    scored.__dict__.update(meta(vars(scored)))
    scored.ledger = SimpleNamespace(table=scored.ledger.table.to("meta"), phase=scored.ledger.phase)
    scored.pool.cells = scored.pool.cells._replace(**meta(scored.pool.cells._asdict()))
    scored.pool.set_kv_buffer = lambda *args: launched.append("store")
    batch = SimpleNamespace(**vars(forward_batch([1, 2], [5, 6], [3, 4])))
    batch.__dict__.update(meta(vars(batch)))
    backend.init_forward_metadata_in_graph(batch)
    inputs = [tuple(x.to("meta") for x in one) for one in step_inputs([1, 2], [5, 6])]
    forward(backend, batch, inputs, [make_layer(n) for n in range(LAYERS)])
    return launched
