"""The goals that a GPU has to confirm, each in one command of under eight minutes: ``lethe gpu goal``.

=======  ===========================================================================================================
ample    what lethe costs where memory is no matter: decode throughput of a batch of 64, at 1k, 2k and 4k tokens
full     what eviction gains where it is all that matters: output throughput at a full pool, answers of 16k tokens
round    a round of 64 requests, settled
stall    the longest step among rounds, less its neighbours
=======  ===========================================================================================================

``full`` is a window of a steady state, because 16k tokens of output take longer than eight minutes. In that state the
requests that run are of every age. So those that run first are sent *grown*: one of age ``a`` has a prompt as long as
what it would hold by then, and the other ``16,384 - a`` tokens left to generate. Ages are spread evenly (a golden-ratio
sequence, so that any first few are, too). Without eviction such a request holds ``a`` tokens; with it no more than its
budget and the tokens since its last round, so it is sent with those, its prompt may be evicted, and its first round is
due as many steps on as its age says. Behind the grown ones wait fresh requests, with a short prompt and a whole answer.
The window opens when SGLang's estimate of what running requests will still need has settled, and what is counted in
it is all output by the scheduler's clock, prefills and retractions included. What it cannot show: how long a server
takes to get there, and what its first answers wait.
"""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from lethe_bench.gpu.base import OUT, PORT, rounds_of, serving
from lethe_bench.gpu.goal import Bound, Goal, Sample
from lethe_bench.gpu.grid import BUDGET, INTERVAL
from lethe_bench.gpu.models import MODELS, write_model
from lethe_bench.gpu.steps import Step, stalls, throughput, watch
from lethe_bench.machine import readable
from lethe_bench.servers import Server, ServerError, launch_command

MODEL = "llama-3.1-8b"
BATCH, PROMPT = 64, 64
ENDS, SLACK = 16, 64
"""Steps left out at both ends of a window; tokens that each request has left when it closes."""

MILLISECONDS = 1e3

COMMON = ("--load-format", "dummy", "--decode-log-interval", "1", "--disable-prefill-cuda-graph")
"""Of every server. Prefill graphs take long to capture, and prefill is in no number but ``full``'s, in long chunks."""


class Serving(Goal):
    """A goal that servers are measured for; what they are given is their arguments behind the common ones."""

    arguments: ClassVar[tuple[str, ...]]
    config: ClassVar[dict[str, Any]]

    def arms(self, samples: Sequence[Sample]) -> list[str]:
        """See the base class."""
        return ["stock", "lethe"]

    def command(self, arm: str, samples: Sequence[Sample]) -> list[str]:
        """Command line of an arm's server."""
        own = [*COMMON, *self.arguments]
        if arm == "stock-same":
            own += ["--attention-backend", next((b for b in _backends(samples, "lethe")), "(that of lethe)")]
        if arm == "lethe":
            own += ["--kv-evict", "lethe", "--kv-evict-config", json.dumps(self.config)]
        return launch_command(str(OUT / MODEL), PORT, *own)

    def runs(self, arm: str, samples: Sequence[Sample] = ()) -> str:
        """See the base class."""
        return shlex.join(readable(self.command(arm, samples), str(OUT / MODEL)))

    def sample(self, arm: str, samples: Sequence[Sample], left: Callable[[], float]) -> Sample:
        """See the base class."""
        write_model(OUT / MODEL, MODELS[MODEL])
        with serving(self.command(arm, samples), ready_within=left()) as server:
            info = server.get("/server_info")
            before = rounds_of(server, arm == "lethe")
            found = self.measured(server, arm, int(info["max_total_num_tokens"]), left)
            rounds = rounds_of(server, arm == "lethe") - before
        return {
            "backend": info.get("attention_backend"),
            "pool": info["max_total_num_tokens"],
            "ready_seconds": round(server.ready_seconds, 1),
            "rounds": rounds,
            **found,
        }

    def measured(self, server: Server, arm: str, pool: int, left: Callable[[], float]) -> Sample:
        """Put a load on a server and return what is found.

        Raises
        ------
        ServerError
            If the load is not what it should be, or more time is needed than is left.
        """
        raise NotImplementedError

    def loaded(
        self,
        server: Server,
        requests: Sequence[tuple[int, int]],
        found: Callable[[list[Step]], list[Step] | None],
        left: Callable[[], float],
    ) -> list[Step]:
        """Send requests, all at once, and return the steps that are looked for; then abort what is left of them.

        Parameters
        ----------
        requests
            Tokens of each prompt, and of its answer.
        found
            As in :func:`~lethe_bench.gpu.steps.watch`.
        """
        ids, offset, draw = MODELS[MODEL].vocabulary, server.log.stat().st_size, random.Random(1)
        body = {
            "input_ids": [[draw.randrange(2, ids) for _ in range(length)] for length, _ in requests],
            "sampling_params": [
                {"temperature": 0, "max_new_tokens": output, "ignore_eos": True} for _, output in requests
            ],
        }
        pool = ThreadPoolExecutor(1)
        try:
            load = pool.submit(server.post, "/generate", body, left() + 1)
            steps = watch(server, offset, found, load, left())
            server.post("/abort_request", {"abort_all": True})
            with contextlib.suppress(TimeoutError):
                load.exception(min(30.0, left()))
        finally:  # a load that hangs ends with the server
            pool.shutdown(wait=False, cancel_futures=True)
        server.post("/flush_cache?timeout=30", {})
        return steps


class Ample(Serving):
    """What lethe costs where memory is no matter."""

    name: ClassVar[str] = "ample"
    asks: ClassVar[str] = (
        "ample memory, uniform budgets, batch 64, 1k to 4k tokens: decode throughput at least 97 % of stock's at its "
        "own defaults, and of stock's on the backend that lethe uses"
    )
    sizes: ClassVar[str] = (
        "lists as long as stock's (a budget of 4,000, rounds from there on), so what is seen is what lethe costs and "
        "not what it saves; 256 steps around 1k, 2k and 4k tokens, the rungs that a climb from 1k to 4k would pass, in "
        "a fifth of its time; one decode graph, of the one batch size; prefill is in no number"
    )
    bound: ClassVar[Bound] = Bound(0.97, "of stock's decode throughput", at_least=True)
    repeats: ClassVar[int] = 2
    arm_seconds: ClassVar[float] = 70
    lengths: ClassVar[tuple[int, ...]] = (1024, 2048, 4096)
    steps: ClassVar[int] = 256
    arguments: ClassVar[tuple[str, ...]] = ("--max-total-tokens", "294912", "--cuda-graph-bs-decode", "64")
    config: ClassVar[dict[str, Any]] = {
        "budget": {"tokens": 4000, "allocation": "uniform"},
        "retain": {"prompt": "evict"},
    }

    def arms(self, samples: Sequence[Sample]) -> list[str]:
        """Leave stock on lethe's backend out where that is stock's own."""
        same = {_ for arm in ("stock", "lethe") for _ in _backends(samples, arm)}
        arms = {sample["arm"] for sample in samples}
        return ["stock", "lethe", *(["stock-same"] if len(same) > 1 or not {"stock", "lethe"} <= arms else [])]

    def measured(self, server: Server, arm: str, pool: int, left: Callable[[], float]) -> Sample:
        """See the base class."""
        self.loaded(
            server, [(PROMPT, self.steps + SLACK)] * BATCH, self.window, left
        )  # compiles what does at first use
        found = {}
        for length in self.lengths:
            requests = [(length - self.steps // 2, self.steps + SLACK)] * BATCH
            steps = self.loaded(server, requests, self.window, left)
            times = sorted(step.seconds * MILLISECONDS for step in steps)
            found[str(length)] = {
                "tokens_per_s": throughput(steps),
                "steps": len(steps),
                "step_ms": {"median": statistics.median(times), "largest": times[-1]},
            }
        return {"at": found}

    def window(self, steps: list[Step]) -> list[Step] | None:
        """Return the steps of the whole batch, but for those at both ends, once they are there."""
        return _inner(steps, self.steps)

    def judged(self, repeat: dict[str, Sample]) -> dict[str, float]:
        """See the base class."""
        speed = {arm: {n: found["tokens_per_s"] for n, found in s["at"].items()} for arm, s in repeat.items()}
        return {
            f"{length} tokens, of {arm}'s": speed["lethe"][length] / at[length]
            for arm, at in speed.items()
            if arm != "lethe"
            for length in at
        }


class Full(Serving):
    """What eviction gains at a full pool."""

    name: ClassVar[str] = "full"
    asks: ClassVar[str] = (
        "pool full, an 8B model, answers of 16k tokens: at least 3x stock's output throughput at a mean budget of 1,024"
    )
    sizes: ClassVar[str] = (
        "all of the GPU's memory that SGLang takes for KV; a steady state with requests of every age, which are sent "
        "grown, and fresh ones waiting; 600 steps until SGLang's reserve for running requests has settled, then three "
        "windows of 5 s; contexts bounded at 20k tokens, because rows of 128k would take memory from both"
    )
    bound: ClassVar[Bound] = Bound(3.0, "times stock's output throughput", at_least=True)
    repeats: ClassVar[int] = 2
    arm_seconds: ClassVar[float] = 100
    output: ClassVar[int] = 16384
    settle: ClassVar[int] = 600
    windows: ClassVar[int] = 3
    window_seconds: ClassVar[float] = 5.0
    drift: ClassVar[float] = 0.15
    """How far the last window's throughput may be from the first's for the state to pass as steady."""

    arguments: ClassVar[tuple[str, ...]] = ("--context-length", "20480")
    config: ClassVar[dict[str, Any]] = {
        "budget": {"tokens": BUDGET, "allocation": "uniform"},
        "rounds": {"interval": INTERVAL},
        "retain": {"prompt": "evict"},
    }

    def requests(self, arm: str, pool: int) -> list[tuple[int, int]]:
        """Return prompt and answer of each request: as many grown ones as the pool holds, then fresh ones."""
        found: list[tuple[int, int]] = []
        held = 0
        for number in range(pool):
            age = int(self.output * ((number + 1) * 0.6180339887498949 % 1))
            own = min(age, BUDGET - age % INTERVAL) if arm == "lethe" else age
            held += PROMPT + own + (INTERVAL if arm == "lethe" else 0)
            if held > pool:
                break
            found.append((max(PROMPT, own) if arm == "lethe" else PROMPT + own, self.output - age))
        return found + [(PROMPT, self.output)] * max(BATCH, len(found) // 2)

    def measured(self, server: Server, arm: str, pool: int, left: Callable[[], float]) -> Sample:
        """See the base class."""
        requests = self.requests(arm, pool)
        steps = self.loaded(server, requests, self.window, left)
        if not min(step.waiting for step in steps):
            raise ServerError("the pool was not full: a step had no request waiting")
        windows = [throughput(part) for part in _parts(steps, self.window_seconds)]
        moved = windows[-1] / windows[0] - 1
        return {
            "sent": {"grown": sum(output < self.output for _, output in requests), "all": len(requests)},
            "tokens_per_s": throughput(steps),
            "windows": windows,
            "steps": len(steps),
            "step_ms": statistics.median(step.seconds for step in steps) * MILLISECONDS,
            "running": statistics.fmean(step.running for step in steps),
            "held": statistics.fmean(step.held for step in steps),
            "prefills": sum(step.prefills for step in steps),
            "void": f"not steady, {moved:+.0%} from first window to last" if abs(moved) > self.drift else None,
        }

    def window(self, steps: list[Step]) -> list[Step] | None:
        """Return the steps of all windows, once they are there."""
        parts = _parts(steps[self.settle :], self.window_seconds)
        return [step for part in parts[: self.windows] for step in part] if len(parts) >= self.windows else None

    def judged(self, repeat: dict[str, Sample]) -> dict[str, float]:
        """See the base class."""
        return {"of stock's": repeat["lethe"]["tokens_per_s"] / repeat["stock"]["tokens_per_s"]}


class Round(Goal):
    """A face of ``lethe_bench.gpu.settled``."""

    name: ClassVar[str] = "round"
    asks: ClassVar[str] = "a round of 64 requests under 2 ms, on the device and until the host is free again"
    sizes: ClassVar[str] = (
        "the cells of Llama-3.1-8B: 32 layers of 716 packed cells, what a budget of 1,024 leaves beside the recent "
        "window; settled, so that only cells move that are not at home"
    )
    bound: ClassVar[Bound] = Bound(2000, "us")
    repeats: ClassVar[int] = 3
    arm_seconds: ClassVar[float] = 20
    launches: ClassVar[int] = 12

    def arms(self, samples: Sequence[Sample]) -> list[str]:
        """See the base class."""
        return ["lethe"]

    def runs(self, arm: str, samples: Sequence[Sample] = ()) -> str:
        """See the base class."""
        return f"{self.launches} settled launches of rounds, as python -m lethe_bench.gpu.settled times them"

    def sample(self, arm: str, samples: Sequence[Sample], left: Callable[[], float]) -> Sample:
        """See the base class."""
        from lethe_bench.gpu import settled

        return settled.measure(settled.setting_of(BATCH), self.launches)

    def judged(self, repeat: dict[str, Sample]) -> dict[str, float]:
        """See the base class."""
        return {name: repeat["lethe"][name] for name in ("device_us", "host_us")}


class Stall(Serving):
    """The longest step among rounds."""

    name: ClassVar[str] = "stall"
    asks: ClassVar[str] = "no stall over 5 ms in a step"
    sizes: ClassVar[str] = (
        "64 requests that decode 1,536 tokens in step, so that their rounds come as close together as they can, one in "
        "128 steps each from 512 tokens on; a stall is what a step takes longer than the median of the 64 around it, "
        "by the scheduler's clock; stock's are beside it, which the machine makes by itself, and are not judged"
    )
    bound: ClassVar[Bound] = Bound(5.0, "ms", of_each=True)
    repeats: ClassVar[int] = 3
    arm_seconds: ClassVar[float] = 65
    steps: ClassVar[int] = 1536
    arguments: ClassVar[tuple[str, ...]] = ("--max-total-tokens", "131072", "--cuda-graph-bs-decode", "64")
    config: ClassVar[dict[str, Any]] = {
        "budget": {"tokens": 512, "allocation": "uniform"},
        "rounds": {"interval": INTERVAL},
    }

    def measured(self, server: Server, arm: str, pool: int, left: Callable[[], float]) -> Sample:
        """See the base class."""
        before = rounds_of(server, arm == "lethe")
        steps = self.loaded(server, [(PROMPT, self.steps + SLACK)] * BATCH, self.window, left)
        if arm == "lethe" and rounds_of(server, True) == before:
            raise ServerError("no round was run")
        found = sorted((seconds * MILLISECONDS for seconds in stalls(steps)), reverse=True)
        return {
            "steps": len(steps),
            "step_ms": statistics.median(step.seconds for step in steps) * MILLISECONDS,
            "longest_stalls_ms": found[:16],
            "over_bound": sum(stall > self.bound.value for stall in found),
        }

    def window(self, steps: list[Step]) -> list[Step] | None:
        """Return the steps of the whole batch, but for those at both ends, once they are there."""
        return _inner(steps, self.steps)

    def judged(self, repeat: dict[str, Sample]) -> dict[str, float]:
        """See the base class."""
        return {"longest stall of lethe": repeat["lethe"]["longest_stalls_ms"][0]}


GOALS: dict[str, Goal] = {goal.name: goal for goal in (Ample(), Full(), Round(), Stall())}


def _backends(samples: Sequence[Sample], arm: str) -> list[str]:
    """Return the attention backend that an arm's servers said they use."""
    return [sample["backend"] for sample in samples if sample["arm"] == arm]


def _inner(steps: Sequence[Step], count: int) -> list[Step] | None:
    """Return the first ``count`` steps of the whole batch without a prefill before them, less ``ENDS`` at both ends."""
    whole = [step for step in steps if step.running == BATCH and not step.prefills][:count]
    return whole[ENDS:-ENDS] if len(whole) == count else None


def _parts(steps: Sequence[Step], seconds: float) -> list[list[Step]]:
    """Cut steps into parts of so many seconds each; what is left over at the end is in none."""
    parts: list[list[Step]] = []
    part: list[Step] = []
    for step in steps:
        part.append(step)
        if sum(step.seconds for step in part) >= seconds:
            parts.append(part)
            part = []
    return parts
