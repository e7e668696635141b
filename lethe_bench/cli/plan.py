"""``lethe plan``: what a deployment will hold, from the model's configuration alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lethe_bench.cli.options import integer, number
from lethe_bench.deployment import GIB, Deployment
from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.allocation.profile import load
from lethe_sglang.config import ConfigError, EvictionConfig, resolve

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class _Model(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    weights_bytes: int


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe plan``."""
    parser = subparsers.add_parser(
        "plan",
        description="Print blocks per request, requests that fit and their ratio to stock SGLang, from the model's "
        "configuration and the memory; nothing is loaded or started.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", metavar="PATH", required=True, help="directory or Hugging Face name of the model")
    add("--context", metavar="C", type=integer(2), required=True, help="tokens of a request at its end")
    add(
        "--prompt",
        metavar="N",
        type=integer(0),
        default=0,
        help="those of them that are prompt and never evicted (default: %(default)s)",
    )
    add("--gpu-mem", metavar="GIB", type=number(0, above=True), required=True, help="memory of one GPU, in GiB")
    add(
        "--mem-fraction",
        metavar="X",
        type=number(0, 1, above=True),
        default=0.88,
        help="share of it for weights and KV cache, SGLang's --mem-fraction-static (default: %(default)s)",
    )
    add(
        "--weights-gib",
        metavar="GIB",
        type=number(0),
        help="weights of the whole model (default: size of the weight files)",
    )
    add("--tp", metavar="N", type=integer(1), default=1, help="tensor-parallel GPUs (default: %(default)s)")
    add("--dtype", choices=sorted(_BYTES), help="of the KV cache (default: the model's)")
    add("--page-size", metavar="N", type=integer(1), default=1, help="tokens (default: %(default)s)")
    add("--policy", metavar="NAME", help="policy; beats the one in the configuration")
    add("--config", metavar="FILE|JSON|PRESET", help="eviction settings, as for --kv-evict-config")
    add("--budget", metavar="N", type=integer(2), help="mean tokens kept per layer; beats budget.tokens")
    add("--profile", metavar="FILE", type=Path, help="a profile, to print the budget of every layer")
    add(
        "--concurrency",
        metavar="N",
        type=integer(1),
        help="print the budget with which so many requests fit, and under pressure what each of them keeps",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan and return the exit status.

    Raises
    ------
    ConfigError
        If an option or the model cannot be used.
    """
    config = resolve(args.policy, args.config, args.budget, None if args.profile is None else str(args.profile))
    model = _model(args.model_path, args.weights_gib, args.dtype)
    if model.heads % args.tp:
        raise ConfigError(f"--tp {args.tp}: does not divide the model's {model.heads} query heads")
    plan = Deployment(
        layers=model.layers,
        kv_heads=max(model.kv_heads // args.tp, 1),
        head_dim=model.head_dim,
        element_bytes=_BYTES[model.dtype],
        state_bytes=_state_bytes(config),
        pool_bytes=int(args.gpu_mem * GIB * args.mem_fraction) - model.weights_bytes // args.tp,
        config=config,
        context=args.context,
        prompt=args.prompt,
        page_size=args.page_size,
    )
    plan.check()
    print("\n".join(_lines(plan, args, model)))
    return 0


def _lines(plan: Deployment, args: argparse.Namespace, model: _Model) -> list[str]:
    config = plan.config
    ratio = plan.requests / plan.stock_requests if plan.stock_requests else float("inf")
    pool, weights = plan.pool_bytes / GIB, model.weights_bytes / args.tp / GIB
    lines = [
        f"model                {plan.layers} layers, {plan.kv_heads} KV heads of {plan.head_dim} a rank, {model.dtype}",
        f"memory of a rank     {args.gpu_mem:g} GiB x {args.mem_fraction:g}: weights {weights:.2f}, KV {pool:.2f} GiB",
        f"policy               {config.policy}, budget {config.budget.tokens}, interval {config.rounds.interval}",
        "",
        f"                     {'stock':>10} {'evicting':>10}",
        f"bytes of a block     {plan.stock_token_bytes:>10} {plan.token_bytes:>10}",
        f"blocks of the pool   {plan.stock_blocks:>10} {plan.blocks:>10}",
        f"blocks of a request  {plan.context:>10} {plan.request_blocks:>10}",
        f"requests that fit    {plan.stock_requests:>10} {plan.requests:>10}   ratio {ratio:.2f}",
    ]
    if plan.first_round >= plan.context - 1:
        lines.append(f"a request is first evicted from at {plan.first_round} tokens, so nothing is evicted here;")
        lines[-1] += " take a smaller budget or rounds.interval"
    if config.rounds.by_pressure:
        lines.append(f"nothing is evicted up to {plan.full_requests} requests at full length; at the floor")
        lines[-1] += f" {plan.requests} fit"
    if config.rounds.by_pressure and args.concurrency is not None:
        share = plan.share_for(args.concurrency) if args.concurrency <= plan.requests else 0
        kept = "all that they hold" if share is None else f"{share} tokens, the prompt not counted"
        waits = f"of {args.concurrency} requests {args.concurrency - plan.requests} wait, the others are at the floor"
        lines.append(waits if share == 0 else f"{args.concurrency} requests at once keep {kept}")
    if args.concurrency is not None:
        lines.append(f"budget for {args.concurrency} requests at once: {plan.budget_for(args.concurrency)} tokens")
    if args.profile is not None:
        layers = from_config(config, plan.layers, load(args.profile, f"--profile {args.profile}"))
        lines.append(f"tokens kept per layer: {', '.join(str(k + config.recent) for k in layers)}")
    return lines


def _state_bytes(config: EvictionConfig) -> int:
    policy = config.built_policy
    return 4 * ((policy.accumulation is not None) + policy.uses_position + policy.uses_memory)


def _model(model_path: str, weights_gib: float | None, dtype: str | None) -> _Model:
    data = _read_config(model_path)
    data = {**data, **data.get("text_config", {})}
    try:
        heads = int(data["num_attention_heads"])
        kv_heads = int(data.get("num_key_value_heads") or heads)
        head_dim = int(data.get("head_dim") or data["hidden_size"] // heads)
        layers = int(data["num_hidden_layers"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"--model-path {model_path}: its config.json names no num_hidden_layers, num_attention_heads and head size"
        ) from None
    found = dtype or str(data.get("torch_dtype") or data.get("dtype") or "bfloat16")
    if found not in _BYTES:
        raise ConfigError(f"--dtype: the model's is {found}; give one of {', '.join(sorted(_BYTES))}")
    size = _weights(model_path) if weights_gib is None else int(weights_gib * GIB)
    return _Model(layers, heads, kv_heads, head_dim, found, size)


def _read_config(model_path: str) -> dict[str, Any]:
    path = Path(model_path) / "config.json"
    if not path.is_file() and not Path(model_path).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model_path, "config.json"))
        except Exception:  # every kind of failure of a network and a hub: the model is not to be had
            raise ConfigError(
                f"--model-path {model_path}: no model there, and not on the hub; give a directory with a config.json"
            ) from None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"--model-path {model_path}: no readable config.json; give a model's directory") from None
    return dict(data)


def _weights(model_path: str) -> int:
    files = [f for f in Path(model_path).glob("*") if f.suffix in (".safetensors", ".bin", ".gguf")]
    if not files:
        raise ConfigError(f"--weights-gib: needed, {model_path} has no weight files to measure")
    return sum(f.stat().st_size for f in files)
