"""Which decode steps are replayed from CUDA graphs, and how large the largest of them is."""

from __future__ import annotations

from typing import Any

from lethe_sglang.engine.guard import graph_backend, on_cuda

MOST_CAPTURED = 512
"""Largest batch of which a decode graph is captured unless the operator says so: SGLang's own on its largest GPUs."""


def captures(resolved: Any) -> bool:
    """Whether decode steps are replayed from CUDA graphs."""
    return graph_backend(resolved, "decode") not in (None, "disabled")


def graph_batches(resolved: Any) -> list[int] | None:
    """Return the batch sizes of decode graphs where eviction wants more than SGLang's own, else None.

    SGLang takes its largest from the GPU's memory, for requests that hold all they have read. Requests that are evicted
    from hold a fraction of that, so more of them run, and a batch beyond the largest graph runs eagerly: 32 layers of
    launches from Python. Larger graphs cost 2 MB a request of memory by SGLang's reckoning (256 to 512 on 80 GB: 0.5
    GB), and each size some start-up time, so there are fewer sizes than SGLang would have.
    """
    graphs = resolved.cuda_graph_config.decode
    largest = min(4 * graphs.max_bs, MOST_CAPTURED, resolved.max_running_requests or MOST_CAPTURED)
    if (
        not (on_cuda(resolved) and captures(resolved))
        or largest <= graphs.max_bs
        or resolved.disable_cuda_graph_padding
    ):
        return None
    steps = (size for size in range(16, largest, 16) if size > graphs.max_bs and (size <= 256 or size % 32 == 0))
    return [*graphs.bs, *steps, largest]
