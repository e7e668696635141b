"""A settled launch of rounds, timed on a GPU: ``python -m lethe_bench.gpu.settled``.

Unlike the point ``round`` of ``lethe gpu kernels``, in which every packed cell moves, this is ``run_round`` whole: the
host's part, upload, all kernels, and only those cells move that are not at home. Cells are those of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from lethe_bench.gpu.counts import SETTLED, Server, Setting
from lethe_bench.machine import versions
from lethe_sglang.config import from_mapping

KV_HEADS, HEAD_DIM = 8, 128


def setting_of(requests: int) -> Setting:
    """Return the launch of so many requests: what a budget of 1,024 leaves beside the recent window."""
    return Setting(requests, layers=32, kept=716, interval=128)


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Time launches of rounds of all requests.

    Returns
    -------
    dict
        Medians over ``repeats`` in microseconds: ``device_us`` between events on the stream, ``host_us`` until the host
        is free again; and every time that they are of.
    """
    policy = from_mapping({}).built_policy
    server = Server(setting._replace(repeats=repeats), policy, "cuda", (KV_HEADS, HEAD_DIM), torch.bfloat16)
    for _ in range(SETTLED):
        server.round(server.plans())
    device, host = [], []
    for _ in range(repeats):
        plans = server.plans()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        server.round(plans)
        end.record()
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
    times = {"device_us": [1e3 * time for time in device[1:]], "host_us": [1e6 * time for time in host[1:]]}
    medians = {name: round(statistics.median(found), 1) for name, found in times.items()}
    return {**medians, "each": {name: [round(time, 1) for time in found] for name, found in times.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a JSON line a batch."""
    parser = argparse.ArgumentParser(prog="python -m lethe_bench.gpu.settled", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args(argv)
    for requests in (1, 16, 64):
        setting = setting_of(requests)
        line = {"setting": setting._asdict(), "gpu": torch.cuda.get_device_name(), "versions": versions()}
        print(json.dumps({**line, **measure(setting, args.repeats)}), flush=True)


if __name__ == "__main__":
    main()
