"""Test aid: CUDA graphs on a CPU, of recorded operations, under SGLang's own decode graph runner.

With this folder on ``PYTHONPATH`` every SGLang process loads it as a plugin. What a captured graph breaks is Python
between kernels: a value computed at capture is frozen, a tensor made anew has another address. So a capture records
every operation with its tensors: torch's, launches of Triton's interpreter, runs of FlashInfer's and FlashAttention's
doubles, and what observers are shown of a layer's lists. A replay carries the recorded operations out on the same
tensors and writes their results where the recorded ones lie; no other Python of the model or of an attention backend
runs. Batch buckets, padding and metadata are SGLang's.

``GRAPHS_ON_CPU_PLANT`` plants a fault that only a graph shows: ``integer`` reads the lengths of the batch on the host
while a graph is captured, ``tensor`` has a tensor of them that nobody writes again.
"""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "unique_dim", "_unique2", "masked_select", "is_nonzero"}
RECORDING: list[Graph] = []


def tensors(values):
    if isinstance(values, torch.Tensor):
        return [values]
    values = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


class Graph(TorchDispatchMode):
    """Operations in order, with their arguments and where their results lie."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name}: a graph that is being captured cannot wait for the device")
        result = function(*args, **(kwargs or {}))
        if not function.is_view and name not in ALLOCATES:
            self.add(lambda: function(*args, **(kwargs or {})), result)
        return result

    def add(self, step, result):
        self.steps.append((step, tensors(result)))

    def replay(self):
        for step, results in self.steps:
            for there, made in zip(results, tensors(step()), strict=True):
                if made is not there:
                    there.copy_(made)


def recorded(function):
    """Make a function one operation of a graph: its inside is not looked at."""

    def call(*args, **kwargs):
        if not RECORDING:
            return function(*args, **kwargs)
        graph = RECORDING[-1]
        with _disable_current_modes():
            result = function(*args, **kwargs)
        graph.add(lambda: function(*args, **kwargs), result)
        return result

    return call


class RecordedGraphs:
    """SGLang's graph backend: one recording a shape."""

    def __init__(self, cuda_graph_runner, **options):
        self.graphs = {}

    @contextlib.contextmanager
    def capture_session(self, stream):
        yield

    def capture_one(self, shape_key, forward_fn, capture_inputs=None, post_warmup_hook=None):
        for _ in range(2):
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        graph = Graph()
        RECORDING.append(graph)
        with graph:
            output = forward_fn()
        RECORDING.pop()
        self.graphs[shape_key] = graph, output
        print(f"graphs_on_cpu: captured {shape_key}: {len(graph.steps)} operations", flush=True)

    def can_run(self, forward_batch, shape_key):
        return shape_key in self.graphs

    @contextlib.contextmanager
    def replay_session(self):
        yield

    def replay(self, shape_key, static_forward_batch, **kwargs):
        graph, output = self.graphs[shape_key]
        graph.replay()
        return output

    def cleanup(self):
        self.graphs.clear()


@contextlib.contextmanager
def no_stream(stream=None):
    yield SimpleNamespace(stream=stream)


class Event:
    def record(self, stream=None):
        pass

    wait = synchronize = record


def register():
    """Give SGLang's decode graph runner a CPU to capture on."""
    from lethe_cpu.platform import PlatformCapabilities, PortableCpuPlatform
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runner
    from triton.runtime.interpreter import InterpretedFunction

    from lethe_sglang.attention.scored import ScoredBackend

    def capture(*, model_runner):
        made = runner.DecodeCudaGraphRunner(model_runner)
        return cuda_graph_setup.GraphCapture(runner=made, memory_phase="decode", memory_usage_gb=0, capture_time=0)

    PortableCpuPlatform.capabilities = PlatformCapabilities(graph_capture=True)
    PortableCpuPlatform.get_full_graph_backend_cls = lambda self: RecordedGraphs
    cuda_graph_setup.capture_decode_graph = model_runner.capture_decode_graph = capture
    runner.graph_capture, runner.get_or_create_global_graph_capture_stream = no_stream, lambda: None
    torch.cpu.is_current_stream_capturing = lambda: bool(RECORDING)
    torch.cpu.Event = getattr(torch.cpu, "Event", Event)
    InterpretedFunction.run = recorded(InterpretedFunction.run)
    ScoredBackend._show_lists = recorded(ScoredBackend._show_lists)
    with contextlib.suppress(ImportError):
        import flashinfer_on_cpu as double

        wrapper = double.BatchDecodeWithPagedKVCacheWrapper
        wrapper.forward_return_lse = recorded(wrapper.forward_return_lse)
        wrapper.forward = recorded(wrapper.forward)
    with contextlib.suppress(ImportError):
        import flashattention_on_cpu as paged

        paged.flash_attn_with_kvcache = recorded(paged.flash_attn_with_kvcache)
    if plant := os.environ.get("GRAPHS_ON_CPU_PLANT"):
        _plant(plant)


def _plant(what):
    from lethe_sglang.attention.scored import ScoredDecode

    batch_of = ScoredDecode.batch_of

    def stale(self, forward_batch):
        batch = batch_of(self, forward_batch)
        if what == "integer":
            with _disable_current_modes():
                lengths = batch.seq_lens.tolist()
            return batch._replace(seq_lens=torch.tensor(lengths))
        made = self.__dict__.setdefault("planted", {})
        return batch._replace(seq_lens=made.setdefault(len(batch.rows), batch.seq_lens.clone()))

    ScoredDecode.batch_of = stale
