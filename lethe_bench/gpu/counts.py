"""What a launch of rounds costs, counted without a GPU: ``python -m lethe_bench.gpu.counts``.

Launches, uploads and host time are those of tensors without values (device ``meta``) through the Triton launchers, none
of which starts anything: every call that would launch a kernel on a GPU is counted. How many cells move is counted on
CPU tensors, from what the reference would copy, after rounds enough for a steady state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_sglang.cache import rounds
from lethe_sglang.cache.layout import RoundPlan
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.cache.rounds import run_round
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels import reference
from lethe_sglang.kernels.common import Cells
from lethe_sglang.kernels.triton import Kernel, launchers
from lethe_sglang.policies import policy_names

SETTLED = 3
"""Rounds of every request before the one that is counted."""

REPEATS = 30
"""Launches whose host time is taken, after one that is not."""

NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_to_copy")
"""What allocates, or copies from the host (counted by itself)."""


class Setting(NamedTuple):
    """One launch: requests, layers, cells kept per layer by each, tokens between two rounds; and rounds besides."""

    requests: int
    layers: int
    kept: int
    interval: int
    per_layer: bool = False
    repeats: int = 0

    @property
    def budgets(self) -> tuple[int, ...]:
        """k_l: equal, or three quarters in the upper half of the layers and five quarters in the lower."""
        low, high = self.kept * 3 // 4, self.kept * 5 // 4
        halves = (high,) * (self.layers // 2) + (low,) * (self.layers - self.layers // 2)
        return halves if self.per_layer else (self.kept,) * self.layers


class Server:
    """Rows and cells of requests that decode in step, on a device."""

    def __init__(
        self,
        setting: Setting,
        policy: Any,
        device: str,
        cell: tuple[int, int] = (1, 4),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.setting, self.policy, self.device = setting, policy, device
        self.context = setting.kept + (SETTLED + 3 + setting.repeats) * setting.interval + 8
        blocks = setting.requests * self.context + 1
        states = {
            "score": policy.accumulation is not None,
            "position": policy.uses_position,
            "memory": policy.uses_memory,
        }
        cells, generator = setting.layers * blocks, torch.Generator().manual_seed(0)
        made = {}
        for name, wanted in states.items():
            kind = torch.int32 if name == "position" else torch.float32
            made[name] = torch.rand(cells, generator=generator).to(kind).to(device) if wanted else None
        keys = torch.zeros(cells, *cell, device=device, dtype=dtype)
        self.cells = Cells(keys, keys.clone(), **made, num_layers=setting.layers, blocks=blocks)
        slots = torch.arange(1, blocks, dtype=torch.int32).view(setting.requests, self.context)
        self.req_to_token = torch.cat([torch.zeros_like(slots[:1]), slots]).to(device)
        self.ledger = Ledger(setting.requests + 1, setting.layers, 1, 8, setting.interval, device)
        for row in range(1, setting.requests + 1):
            self.ledger.open(f"r{row}", row, 0, setting.budgets)
        self.committed = 0

    def plans(self) -> list[RoundPlan]:
        """Go on to the next round of all requests."""
        states = list(self.ledger.requests.values())
        self.committed = max(state.due_at for state in states)
        return [self.ledger.plan(state, self.committed, state.budgets) for state in states]

    def round(self, plans: Sequence[RoundPlan]) -> None:
        """Carry it out."""
        run_round(plans, self.cells, self.req_to_token, self.policy)
        for state, plan in zip(list(self.ledger.requests.values()), plans, strict=True):
            self.ledger.commit(state, plan)


class Counted(TorchDispatchMode):  # type: ignore[misc]
    """Counts torch's kernels on a device, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.uploads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        there = [x for x in _tensors([result, args, kwargs or {}]) if x.device.type == "meta"]
        if there and name == "_to_copy":
            self.uploads += args[0].device.type == "cpu"
            self.kernels[name] += args[0].device.type == "meta"
        elif there and not function.is_view and name not in NOTHING:
            self.kernels[name] += 1
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    values = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def count(setting: Setting, policy_name: str = "lethe", **options: Any) -> dict[str, Any]:
    """Count one launch of rounds.

    Returns
    -------
    dict
        ``launches`` of torch and of Triton, how many of both the policy's own ``ranking`` takes, ``uploads``,
        ``host_us`` (median of ``REPEATS``), and of the cells kept the share that ``moved``.
    """
    section = {policy_name: options} if options else {}
    policy = from_mapping({"policy": policy_name, **section}).built_policy
    rank, ranking, triton, of_ranking = type(policy).rank, Counted(), list[str](), list[str]()

    def launched(self: Any, *rest: Any) -> None:
        triton.append(self.function.__name__)

    def ranked(self: Any, candidates: Any) -> Any:
        before = len(triton)
        with ranking:
            ranks = rank(self, candidates)
        of_ranking.extend(triton[before:])
        return ranks

    with (
        mock.patch.object(rounds, "kernels_for", lambda device: launchers),
        mock.patch.object(Kernel, "launch", launched),
    ):
        server = Server(setting, policy, "meta")
        for _ in range(SETTLED):
            server.round(server.plans())
        triton.clear()
        with Counted() as counted, mock.patch.object(type(policy), "rank", ranked):
            server.round(server.plans())
        found = {
            "torch": sum(counted.kernels.values()),
            "triton": len(triton),
            "launches": sum(counted.kernels.values()) + len(triton),
            "ranking": sum(ranking.kernels.values()) + len(of_ranking),
            "uploads": counted.uploads,
            "kernels": dict(counted.kernels) | dict(Counter(triton)),
        }
        times = []
        for _ in range(REPEATS):
            plans = server.plans()
            began = time.perf_counter()
            run_round(plans, server.cells, server.req_to_token, policy)
            times.append(time.perf_counter() - began)
    return {**found, "host_us": round(1e6 * statistics.median(times[1:])), "moved": moved(setting, policy)}


def moved(setting: Setting, policy: Any) -> float:
    """Return which share of the kept cells a settled round moves."""
    moves: list[float] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

        def repack(self, buffers: Any, source: torch.Tensor, destination: torch.Tensor, *rest: Any) -> None:
            moves.append(float((source != destination).float().mean()))
            reference.repack(buffers, source, destination)

    server = Server(setting, policy, "cpu")
    server.cells.key.normal_(generator=torch.Generator().manual_seed(1))
    with mock.patch.object(rounds, "kernels_for", lambda device: Watched()):
        for _ in range(SETTLED + 1):
            server.round(server.plans())
    return round(moves[-1], 4)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a JSON line for every policy, and for the default one for every setting."""
    parser = argparse.ArgumentParser(prog="python -m lethe_bench.gpu.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kept", type=int, default=512)
    parser.add_argument("--interval", type=int, default=64)
    args = parser.parse_args(argv)
    setting = Setting(args.requests, args.layers, args.kept, args.interval)
    for per_layer in (False, True):
        line = count(setting._replace(per_layer=per_layer))
        print(json.dumps({"policy": "lethe", "budgets": "per layer" if per_layer else "uniform", **line}))
    for name in policy_names():
        if name != "lethe":
            small = setting._replace(requests=min(args.requests, 2), kept=min(args.kept, 64), layers=8)
            print(json.dumps({"policy": name, "budgets": "uniform", **count(small, name)}))


if __name__ == "__main__":
    main()
