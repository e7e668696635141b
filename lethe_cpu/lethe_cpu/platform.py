"""The portable CPU platform and the entry points that activate it.

SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) needs the CPU build of sgl-kernel and runs best with AMX. Without
that build, and without an accelerator, SGLang 0.5.23 starts no server at all. This platform fills the gap: every
operator takes its plain torch form. It is slow and complete: overlap scheduling, the radix cache, paging, chunked
prefill, tensor parallelism (over gloo) and data parallelism all run.
"""

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

MEMORY_FRACTION = 0.4
"""Share of the machine's memory that weights and KV cache may take, all ranks together (the OS needs the rest)."""

MAX_TOTAL_TOKENS = 65536
"""KV cache slots when the user names no number; a CPU decodes too slowly to fill more."""

CORES_OF_RANKS = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's variable for the cores of each rank, such as ``0,1|2,3``."""


def activate() -> str | None:
    """Name the platform class where nothing better can run, as SGLang's platform discovery asks.

    Returns
    -------
    str or None
        The qualified name of the platform class; None if PyTorch sees an accelerator, or if the user chose SGLang's
        own CPU engine.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or torch.accelerator.is_available():
        return None
    return "lethe_cpu.platform:PortableCpuPlatform"


def register() -> None:
    """Let a model's heads be split over tensor-parallel ranks as on a GPU (a general plugin, run in every process).

    On device ``cpu`` SGLang pads the heads of a model with fewer KV heads than ranks, but pads its weights only in
    its own CPU engine: such a model fails to load. Unpadded, KV heads are replicated over ranks.
    """
    if activate() is not None:
        target = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"
        HookRegistry.register(target, _keep_heads, HookType.REPLACE)


def _keep_heads(model_config: Any, load_config: Any, tp_size: int) -> Any:
    return model_config


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """CPU through plain torch operators: no Triton, no graphs, no sgl-kernel."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open; what the user set is kept.

        Parameters
        ----------
        server_args
            SGLang's recorder over ``ServerArgs``: reads see the values resolved so far, writes declare defaults.
        """
        if server_args.attention_backend == "intel_amx":  # SGLang's choice for any CPU; it needs sgl-kernel
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.dtype == "auto":  # half precision is emulated, hence slower, in plain torch
            server_args.dtype = "float32"
        ranks = server_args.tp_size * server_args.dp_size
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = MEMORY_FRACTION / ranks
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        server_args.sleep_on_idle = True  # a spinning scheduler would take a core from the model
        if ranks > 1:
            _share_cores(ranks)

    def init_backend(self) -> None:
        """Use, in a worker process, as many threads as each rank has cores, or ``OMP_NUM_THREADS``."""
        ranks = len(os.environ.get(CORES_OF_RANKS, "").split("|"))
        cores = len(os.sched_getaffinity(0)) // ranks
        torch.set_num_threads(max(1, min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores))))

    def get_default_attention_backend(self) -> str:
        """Return the one attention backend that is plain torch."""
        return "torch_native"

    def get_device(self, device_id: int = 0) -> str:
        """Return ``"cpu"``; SGLang splits the name as text where ``--device`` is left out."""
        return "cpu"


def _share_cores(ranks: int) -> None:
    """Say which cores each rank owns; left open, SGLang refuses more ranks than the machine has NUMA nodes."""
    cores = sorted(os.sched_getaffinity(0))
    groups = [cores[rank::ranks] or cores for rank in range(ranks)]
    os.environ.setdefault(CORES_OF_RANKS, "|".join(",".join(map(str, group)) for group in groups))
