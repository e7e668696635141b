"""What is refused at start, and the option to change. One table serves the check and the support page (``support``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lethe_sglang.cache.layout import request_bound
from lethe_sglang.config import ConfigError, EvictionConfig, parse_request

if TYPE_CHECKING:
    from lethe_sglang.config.schema import DebugConfig

BACKENDS = ("torch_native", "flashinfer", "triton", "fa3")
"""Attention backends that decode over packed rows."""

_WHOLE = ("auto", "float32", "bf16", "bfloat16", "float16")
_FP8 = ("fp8_e4m3", "fp8_e5m2")


class Refusal(NamedTuple):
    """One unsupported feature.

    Attributes
    ----------
    feature
        What it is called.
    refused
        Whether a resolved configuration uses it.
    instead
        What to change.
    why
        One clause for the support matrix.
    """

    feature: str
    refused: Callable[[Any], bool]
    instead: str
    why: str


_BY_POSITION = "backs rows up by position"
_OTHER_LAUNCHER = "starts schedulers by a launcher of its own"
_FLAGS = {
    "enable_pdmux": ("PD multiplexing", "prefill and decode share a step"),
    "enable_hierarchical_cache": ("hierarchical cache", _BY_POSITION),
    "enable_lmcache": ("LMCache", _BY_POSITION),
    "enable_flexkv": ("FlexKV", _BY_POSITION),
    "enable_unified_cache_external_linker": ("external cache linker", _BY_POSITION),
    "radix_cache_backend": ("custom radix cache backend", "unknown ownership of rows"),
    "enable_kv_cache_sharding": ("KV cache sharding", "a rank holds some pages only"),
    "enable_mixed_chunk": ("mixed chunk", "decode rows ride an extend batch"),
    "enable_two_batch_overlap": ("two-batch overlap", "splits the decode batch"),
    "speculative_algorithm": ("speculative decoding", "draft and verify steps write several tokens a step"),
    "dllm_algorithm": ("diffusion LLM", "rewrites tokens"),
    "enable_page_major_kv_layout": ("page-major KV layout", "layers are not contiguous"),
    "enable_unified_memory": ("unified memory pool", "slots are virtual"),
    "enable_hisparse": ("HiSparse", "slots are virtual"),
    "enable_return_routed_experts": ("routed-expert capture", "captures by slot"),
    "smg_grpc_mode": ("SMG's gRPC server", f"{_OTHER_LAUNCHER}; --grpc-port serves gRPC beside HTTP"),
    "use_ray": ("Ray", _OTHER_LAUNCHER),
    "elastic_ep_backend": ("elastic expert parallelism", "ranks join that have not proven that they evict"),
    "encoder_only": ("encoder-only servers", "there is nothing to evict"),
    "enable_torch_compile": ("torch.compile", "not tried with packed rows; decode steps are replayed from CUDA graphs"),
    "prefill_only_disable_kv_cache": ("embedding-only or prefill-only KV", "there is nothing to evict"),
}
"""Options that may not be given: SGLang's name of the option -> what it is called, and why."""


def _flag(option: str, feature: str, why: str) -> Refusal:
    """Refuse an option that is off unless it is given."""
    remove = f"remove --{option.replace('_', '-')}"
    return Refusal(feature, lambda c: getattr(c, option) not in (None, False), remove, why)


REFUSALS = (
    *(_flag(option, *words) for option, words in _FLAGS.items()),
    Refusal(
        "devices other than a CPU and NVIDIA GPUs",
        lambda c: str(c.device or "cpu").split(":")[0] not in ("cpu", "cuda"),
        "set --device to cuda or cpu",
        "rounds and scores have kernels for these",
    ),
    Refusal(
        "prefill/decode disaggregation",
        lambda c: c.disaggregation_mode != "null",
        "set --disaggregation-mode null",
        "KV is transferred by row",
    ),
    Refusal(
        "data-parallel attention",
        lambda c: c.attn_dp_size > 1 or bool(c.enable_dp_attention),
        "remove --enable-dp-attention and set --attn-dp-size 1; --dp-size alone works",
        "ranks of one tensor-parallel group hold different requests, and rounds average scores over that group",
    ),
    Refusal("pipeline parallelism", lambda c: c.pp_size > 1, "set --pp-size 1", "a rank holds some layers only"),
    Refusal(
        "decode context parallelism",
        lambda c: c.dcp_size > 1 or c.attn_cp_size > 1,
        "set --dcp-size 1 and --attn-cp-size 1",
        "a rank holds some positions only",
    ),
    Refusal(
        "streaming sessions",
        lambda c: c.enable_streaming_session or c.enable_session_radix_cache,
        "remove --enable-streaming-session and --enable-session-radix-cache",
        "hands rows over between requests",
    ),
    Refusal(
        "fp4 and mxfp8 KV cache",
        lambda c: c.kv_cache_dtype not in (*_WHOLE, *_FP8),
        "set --kv-cache-dtype auto",
        "the score reads keys of one scale a layer",
    ),
    Refusal(
        "fp8 KV cache without a GPU",
        lambda c: c.kv_cache_dtype in _FP8 and not on_cuda(c),
        "set --kv-cache-dtype auto",
        "SGLang's needs AMX and its own attention",
    ),
    Refusal("KV canary", lambda c: c.kv_canary != "none", "set --kv-canary none", "hashes KV by slot"),
    Refusal(
        "several tokenizer workers",
        lambda c: c.tokenizer_worker_num > 1,
        "set --tokenizer-worker-num 1",
        "per-request options are checked in the main process",
    ),
    Refusal(
        "full CUDA graphs of prefill",
        lambda c: graph_backend(c, "prefill") == "full",
        "leave the prefill CUDA graph's backend unset",
        "private prompts score outside the graph",
    ),
)
"""What a resolved configuration may not use."""

REQUESTS = (
    Refusal(
        "beam search",
        lambda params: params.get("beam_width") not in (None, 0, 1),
        "leave sampling_params.beam_width out",
        "the rows of its beams share blocks, and a round would move them for one",
    ),
)
"""What one request may not ask for, by its sampling parameters."""

ENVIRONMENT = (
    ("SGLANG_RUST_SERVER", "per-request options are checked in the Python front end"),
    ("SGLANG_USE_HND_KVCACHE", "needs the NHD layout"),
    ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "the pool must be backed when it is built"),
    ("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "it would capture plans that the host makes anew at every step"),
)

MODELS = (
    ("MLA / DSA attention", lambda m: m.attention_arch.name != "MHA"),
    ("sliding-window attention", lambda m: bool(m.is_hybrid_swa) or bool(getattr(m, "sliding_window_size", None))),
    ("encoder-decoder", lambda m: bool(m.is_encoder_decoder)),
    ("linear attention, mamba and hybrids", lambda m: _is_hybrid_linear(m)),
    ("embedding and reward models", lambda m: not m.is_generation),
    ("keys and values of different width", lambda m: m.head_dim != m.v_head_dim),
    ("caps on attention logits", lambda m: bool(getattr(m.hf_config, "attn_logit_softcapping", None))),
)


def _is_hybrid_linear(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


def check_options(resolved: Any, uniform: bool = False) -> None:
    """Refuse unsupported options of a resolved configuration.

    Parameters
    ----------
    resolved
        SGLang's arguments.
    uniform
        Whether all layers keep as many tokens.

    Raises
    ------
    ConfigError
        One line: what is refused and what to change, for every refusal.
    """
    found = [f"{r.feature} ({r.why}): {r.instead}" for r in REFUSALS if r.refused(resolved)]
    found += [f"{name} ({why}): unset it" for name, why in ENVIRONMENT if os.environ.get(name, "0").lower() in _TRUE]
    prefill, decode = attention_backends(resolved)
    legal = legal_backends(resolved, uniform)
    if prefill not in legal or decode not in legal:
        other = prefill if prefill not in legal else decode
        why = unfit(resolved, other, uniform) if other in BACKENDS else ""
        instead = ", or budget.allocation to uniform" if why == PER_LAYER else ""
        found.append(f"attention backend {other}{why}: set --attention-backend to {' or '.join(legal)}{instead}")
    elif prefill != decode:
        found.append(
            f"different attention backends for prefill ({prefill}) and decode ({decode}): set --attention-backend alone"
        )
    if found:
        raise ConfigError(f"--kv-evict does not work with {'; '.join(found)} - or use --kv-evict none")


_TRUE = ("1", "true", "yes", "on")


def on_cuda(resolved: Any) -> bool:
    """Whether the server runs on an NVIDIA GPU."""
    return str(resolved.device or "").startswith("cuda")


PER_LAYER = " with budgets that differ by layer, which one page table cannot hold"


def unfit(resolved: Any, backend: str | None, uniform: bool) -> str:
    """Say why one of ``BACKENDS`` does not serve, as the rest of a sentence; Triton's interpreter serves a CPU."""
    if not on_cuda(resolved):
        serves = backend == "torch_native" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
        return "" if serves else f" on device {resolved.device}"
    if backend != "fa3":
        return ""
    if not uniform:
        return PER_LAYER
    if resolved.kv_cache_dtype == "fp8_e5m2":
        return " with --kv-cache-dtype fp8_e5m2"
    from sglang.srt.runtime_context import get_platform

    fits = get_platform().device_capability[0] in (8, 9)
    return "" if fits else " on this GPU, which is not of compute capability 8 or 9"


def legal_backends(resolved: Any, uniform: bool) -> tuple[str, ...]:
    """Return the attention backends a server may use where it runs."""
    return tuple(backend for backend in BACKENDS if not unfit(resolved, backend, uniform))


def attention_backends(resolved: Any) -> tuple[str | None, str | None]:
    """Return the backends of prefill and decode."""
    return (
        resolved.prefill_attention_backend or resolved.attention_backend,
        resolved.decode_attention_backend or resolved.attention_backend,
    )


def graph_backend(resolved: Any, phase: str) -> str | None:
    """Return the CUDA graph backend of ``prefill`` or ``decode``, None where there is no such option."""
    backend: str | None = getattr(getattr(resolved.cuda_graph_config, phase, None), "backend", None)
    return backend


def check_request(params: Mapping[str, Any]) -> None:
    """Refuse sampling parameters of a request that do not work with eviction; the server answers HTTP 400.

    Raises
    ------
    ConfigError
        One line: what is refused and what to change.
    """
    found = [f"{r.feature} ({r.why}): {r.instead}" for r in REQUESTS if r.refused(params)]
    if found:
        raise ConfigError(f"a server with --kv-evict does not take {'; '.join(found)}")


def check_debug(resolved: Any, debug: DebugConfig, measures: bool) -> None:
    """Refuse checks and the measuring of a profile where they would be wrong or silently do nothing.

    Raises
    ------
    ConfigError
        One line with the option to change.
    """
    if measures and not resolved.disable_overlap_schedule:
        raise ConfigError("lethe profile: counts a step too many under overlap; set --disable-overlap-schedule")
    if measures and resolved.dp_size > 1:
        raise ConfigError("lethe profile: measures on one replica; set --dp-size 1")
    _, decode = attention_backends(resolved)
    if measures and decode != "torch_native":
        raise ConfigError(f"lethe profile: needs --attention-backend torch_native, the server uses {decode}")
    replays = any(graph_backend(resolved, phase) not in (None, "disabled") for phase in ("prefill", "decode"))
    if debug.shadow and on_cuda(resolved) and replays:
        raise ConfigError("debug.shadow: compares no step that a CUDA graph replays; set --disable-cuda-graph")


def check_model(model: Any) -> None:
    """Refuse unsupported models.

    Raises
    ------
    ConfigError
        One line naming what the model uses.
    """
    found = [name for name, refused in MODELS if refused(model)]
    if found:
        raise ConfigError(
            f"--kv-evict does not support this model: {', '.join(found)}; legal: decoder-only models with multi-head "
            "or grouped-query attention in every layer - or use --kv-evict none"
        )


def check_defaults(preferred: dict[str, Any] | None, config: EvictionConfig, context_length: int) -> None:
    """Refuse sampling parameters of every request that no request may ask for.

    Raises
    ------
    ConfigError
        One line that names the flag and the parameter.
    """
    try:
        check_request(preferred or {})
        parse_request((preferred or {}).get("custom_params"), config, context_length)
    except ConfigError as error:
        raise ConfigError(f"--preferred-sampling-params: {error}") from None


def check_pool(config: EvictionConfig, page_size: int, tokens: int) -> None:
    """Refuse floors of which the pool cannot hold one: no round could ever make room then.

    Raises
    ------
    ConfigError
        One line that names the option and the largest legal value.
    """
    least = request_bound(config.budget.tokens, config.rounds.interval, page_size)
    if config.rounds.by_pressure and least > tokens:
        largest = tokens - least + config.budget.tokens
        raise ConfigError(
            f"budget.tokens: got {config.budget.tokens}, with which a request at its floor holds up to {least} tokens, "
            f"but the pool has {tokens}; the largest that fits with this rounds.interval is {largest}"
            if largest >= 2
            else f"rounds.interval: got {config.rounds.interval}, for which the pool of {tokens} tokens has no room; "
            "make it smaller, or the pool larger (--max-total-tokens, --mem-fraction-static)"
        )
