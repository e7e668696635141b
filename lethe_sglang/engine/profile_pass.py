"""Which budgets the layers get at a server's start, and the profiling pass that runs for it if there is no profile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.allocation.profile import ModelFingerprint, Profile, digest, load
from lethe_sglang.allocation.rules import NO_SENSITIVITY
from lethe_sglang.config import ConfigError, EvictionConfig
from lethe_sglang.config.schema import FROM_PROFILE
from lethe_sglang.engine import profile_cache

logger = logging.getLogger("lethe_sglang")

MEASURING_SECONDS = 240
"""Prompts that start later are left out of an automatic pass."""

LONGEST_SECONDS = 1800
"""An automatic pass, the model's loading included, that takes longer is given up."""

CARRIED = {
    "tokenizer_path": "--tokenizer-path",
    "tokenizer_mode": "--tokenizer-mode",
    "load_format": "--load-format",
    "model_loader_extra_config": "--model-loader-extra-config",
    "trust_remote_code": "--trust-remote-code",
    "revision": "--revision",
    "json_model_override_args": "--json-model-override-args",
    "context_length": "--context-length",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "download_dir": "--download-dir",
    "device": "--device",
    "base_gpu_id": "--base-gpu-id",
    "gpu_id_step": "--gpu-id-step",
    "tp_size": "--tp-size",
    "mem_fraction_static": "--mem-fraction-static",
    "max_total_tokens": "--max-total-tokens",
    "page_size": "--page-size",
}
"""Server arguments of a pass: what decides which model runs, how, and where. It measures on torch_native alone."""

_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache")
_SAMPLES, _SAMPLE_BYTES = 16, 4096

Make = Callable[[Path], None]


def settle(
    config: EvictionConfig, model: ModelFingerprint, make: Make | None, folder: Path | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return k_l of every layer for the configuration and each of its arms.

    Parameters
    ----------
    config
        The server's configuration.
    model
        The server's model.
    make
        Measures and writes the profile that ``budget.profile: auto`` needs; None checks the rest and leaves those
        arms out.
    folder
        The profiles' cache; None is the user's.

    Raises
    ------
    ConfigError
        If a profile cannot be read or made, is of another model, or budgets do not fit the model.
    """
    profiles: dict[str, Profile] = {}
    budgets = []
    for arm in config.every_arm:
        source, profile = arm.budget.profile, None
        if arm.budget.reads_profile:
            if source == "auto" and make is None:
                continue
            if source not in profiles:
                maker = _refuse if make is not None and arm.budget.allocation == "sensitivity" else make
                profiles[source] = _profile(source, model, maker, folder)
            profile = profiles[source]
        elif arm.budget.allocation in FROM_PROFILE:
            logger.info("KV eviction: budget.profile none: all layers get the same budget")
        budgets.append(from_config(arm, model.layers, profile))
    return tuple(budgets)


def _profile(source: str, model: ModelFingerprint, make: Make | None, folder: Path | None) -> Profile:
    if source == "auto":
        assert make is not None
        return profile_cache.obtain(model, make, folder)
    where = f"budget.profile {source}"
    profile = load(Path(source), where)
    profile.check(model, where)
    if differing := profile.model.numeric_differences(model):
        logger.warning("KV eviction: %s was measured with %s; it is used all the same", where, ", ".join(differing))
    return profile


def _refuse(path: Path) -> None:
    """Stand in for a pass that would not measure what the allocation needs."""
    raise ConfigError(NO_SENSITIVITY)


def fingerprint_of(model: Any, resolved: Any) -> ModelFingerprint:
    """Return a model's fingerprint; two processes with the same arguments get the same.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``.
    resolved
        A view of the resolved server arguments. Its dtype counts: the platform may have settled it after ``model``.
    """
    content = {k: v for k, v in model.hf_config.to_dict().items() if k not in _VOLATILE}
    path = Path(model.model_path)
    commit = getattr(model.hf_config, "_commit_hash", None)
    return ModelFingerprint(
        name=path.resolve().name if path.is_dir() else str(model.model_path),
        architecture=str((model.hf_config.architectures or ["unknown"])[0]),
        config_hash=digest(json.loads(json.dumps(content, sort_keys=True, default=str))),
        weights=sample_weights(path) if path.is_dir() else f"revision:{commit}" if commit else "",
        layers=int(model.num_attention_layers),
        heads=int(model.num_attention_heads),
        kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.head_dim),
        dtype=str(model.dtype if resolved.dtype == "auto" else resolved.dtype).removeprefix("torch."),
        quantization=model.quantization,
    )


def sample_weights(folder: Path) -> str:
    """Hash names, sizes and samples of the weight files: two fine-tunes of one model differ; no file is read whole."""
    found = hashlib.sha256()
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")]
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for i in range(_SAMPLES):
                data.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                found.update(data.read(_SAMPLE_BYTES))
    return f"sampled:{found.hexdigest()[:16]}" if files else ""


def command(server_args: Any, path: Path) -> list[str]:
    """Return the command line of the pass for a server with these arguments."""
    words: list[str] = []
    for name, flag in CARRIED.items():
        value = getattr(server_args, name, None)
        if value is True:
            words.append(flag)
        elif value not in (None, False, "", {}):
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [
        sys.executable,
        "-m",
        "lethe_sglang.cli.main",
        "profile",
        "--model-path",
        str(server_args.model_path),
        "--out",
        str(path),
        "--time-limit",
        str(MEASURING_SECONDS),
        f"--server-args={shlex.join(words)}",
    ]


def run(server_args: Any, path: Path) -> None:
    """Run the pass as a process of its own; its progress goes to this process's standard error.

    Raises
    ------
    ConfigError
        If it fails, takes too long, or the server spans several nodes.
    """
    otherwise = "run lethe profile yourself and give its file to --kv-evict-profile, or set --kv-evict-profile none"
    if server_args.nnodes > 1:
        raise ConfigError(f"budget.profile auto: does not measure over several nodes; {otherwise}")
    logger.info("KV eviction: no profile of this model yet; measuring it once before the server starts")
    status = run_to_end(command(server_args, path), LONGEST_SECONDS)
    if status is None:
        raise ConfigError(f"budget.profile auto: the pass took more than {LONGEST_SECONDS} s; {otherwise}")
    if status:
        raise ConfigError(f"budget.profile auto: lethe profile failed (status {status}, see above); {otherwise}")


def run_to_end(words: list[str], seconds: float) -> int | None:
    """Run a command and return its exit status, None after ``seconds``; nothing of it survives this call."""
    process: subprocess.Popen[bytes] | None = None
    with ended_by_signals():
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ``SystemExit`` inside the block, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
