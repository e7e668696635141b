"""Loads on real servers, one server after the other: the arms of a repeat, then the next repeat.

What is done already is not done again: every measurement is kept at once, and the same command goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np

from lethe_bench.gpu.greedy import digest
from lethe_bench.load.plan import Sweep
from lethe_bench.machine import CpuMeter
from lethe_bench.servers import Server, ServerError, explained
from lethe_bench.throughput.measure import DECODE, SERVER_FACTS, evicted, parse_log, read_from, warm_up
from lethe_sglang.config import ConfigError
from lethe_sglang.files import Journal, read_lines

_FORMAT = 2
"""Of samples; raised when they come to have another number."""

_PROGRESS = 100
"""Points of a curve that are kept."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One load on one arm, once.

    Attributes
    ----------
    arm, repeat, load
        Which arm; which repeat, from 1; how many requests came at once.
    numbers
        What was measured: times in seconds, counts, tokens per second; ``server_cpu`` in CPU seconds of all the
        server's processes per output token, which waiting for a core does not lengthen.
    ttfts
        Time to first token of each request that came (s).
    progress
        Output tokens of the long requests since then: pairs of seconds and tokens.
    replies
        A digest of the token ids of each reply, those of the long requests first.
    server
        Arguments of the server that its defaults decided.
    others_cpu
        Share of the machine's CPU time that other processes took meanwhile, in [0, 1].
    """

    arm: str
    repeat: int
    load: int
    numbers: dict[str, float]
    ttfts: list[float]
    progress: list[tuple[float, int]]
    replies: list[str]
    server: dict[str, Any]
    others_cpu: float


class Samples:
    """The samples in a results directory.

    Parameters
    ----------
    out
        The directory.
    settings
        What they are of; samples of something else are not mixed in.

    Raises
    ------
    ConfigError
        If it holds some of something else.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        path, header = out / "samples.jsonl", json.loads(json.dumps({"format": _FORMAT, **settings}))
        if (kept := read_lines(path)[:1]) not in ([], [header]):
            differ = [name for name in header if kept[0].get(name) != header[name]]
            raise ConfigError(f"--out {out}: holds samples of another run (other {', '.join(differ)}); give another")
        self._journal = Journal(path, header)
        self.found = [Sample(**line) for line in self._journal.read()]

    def add(self, sample: Sample) -> None:
        """Keep one more."""
        self._journal.add([asdict(sample)])
        self.found.append(sample)


def asked(plan: Sweep, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that a plan asks for; a directory may hold more."""
    return [s for s in samples if s.repeat <= plan.repeats and s.arm in plan.arms and s.load in plan.loads]


def missing(plan: Sweep, samples: Sequence[Sample]) -> Iterator[tuple[int, str, list[int]]]:
    """Yield the servers that are still needed: repeat, arm, and the loads that it lacks."""
    known = {(sample.repeat, sample.arm, sample.load) for sample in samples}
    for repeat in range(1, plan.repeats + 1):
        for arm in plan.arms[::-1] if plan.one_server and repeat % 2 == 0 else plan.arms:
            if loads := [load for load in plan.loads if (repeat, arm, load) not in known]:
                yield repeat, arm, loads


def run(plan: Sweep, samples: Sequence[Sample], vocabulary: int, say: Callable[[str], None]) -> Iterator[Sample]:
    """Measure what is missing, and yield each sample as it is done.

    Parameters
    ----------
    plan
        What to measure; call ``plan.check()`` first.
    samples
        What is there.
    vocabulary
        Token ids of the model.
    say
        Takes one line of progress at a time.

    Raises
    ------
    ServerError
        If a server fails, or a request does not get all of its tokens.
    """
    turns = list(missing(plan, list(samples)))
    for several in [turns] if plan.one_server and turns else [[turn] for turn in turns]:
        repeat, arm, _ = several[0]
        first = plan.arms[0] if plan.one_server else arm
        say(f"repeat {repeat}, {first}: starting the server")
        with TemporaryDirectory(prefix="lethe-load-") as folder:
            offline = {"HF_HUB_OFFLINE": "1"} if Path(plan.model_path).is_dir() else {}
            server = Server(plan.server_command(first), plan.port, Path(folder) / "server.log", offline)
            with explained(server), server:
                warm_up(server, plan)
                for repeat, arm, loads in several:
                    if plan.one_server:
                        server.post("/kv_evict", plan.change(arm))
                    for load in loads:
                        say(f"repeat {repeat}, {arm}: {load} at once")
                        yield measure(server, plan, arm, repeat, load, vocabulary)


def measure(server: Server, plan: Sweep, arm: str, repeat: int, load: int, vocabulary: int) -> Sample:
    """Put one load on a server that has nothing to do.

    Raises
    ------
    ServerError
        If a request does not get all of its tokens, or the server is not what the arm needs.
    """
    server.post("/flush_cache?timeout=60", {})
    before, offset, meter = server.get("/server_info"), server.log.stat().st_size, CpuMeter(server, itself=True)
    prompts, others = plan.prompts(load, vocabulary)
    long = Requests(server, prompts, plan.output_len, plan.timeout, plan.moment)
    come = Requests(server, others, plan.arriving[1], plan.timeout)
    pool = ThreadPoolExecutor(1)
    held = 0
    try:
        if plan.long:
            reading = pool.submit(long.read)
            while not long.reached.wait(0.1):
                if reading.done():
                    reading.result()
                    raise ServerError(f"{arm}: the long requests were over too early")
            steps = DECODE.findall(read_from(server.log, max(offset, server.log.stat().st_size - 8192)))
            held = int(steps[-1][1]) if steps else 0
        come.read()
        if plan.long:
            reading.result()
    finally:  # at Ctrl-C the thread ends with the server
        pool.shutdown(wait=False, cancel_futures=True)
    others_cpu, server_cpu, after = meter.others(), meter.server(), server.get("/server_info")
    counted = evicted(before, after, arm) or {}
    pressure = counted.get("pressure") or {}
    seconds, start = come.ended - come.began, long.tokens_at(come.began)
    meanwhile = long.tokens_at(come.ended) - start
    numbers = {
        "seconds": seconds,
        "output_throughput": (load * plan.arriving[1] + meanwhile) / seconds,
        "ttft_median": statistics.median(come.ttfts),
        "ttft_p90": float(np.quantile(come.ttfts, 0.9)),
        "held_before": held,
        **asdict(parse_log(read_from(server.log, offset))),
        "rounds": counted.get("rounds", 0),
        "round_seconds": counted.get("round_seconds", 0.0),
        "events": pressure.get("events", 0),
        "tokens_evicted": sum(counted.get("tokens_evicted_per_layer", [0])),
    }
    output = load * plan.arriving[1] + sum(map(len, long.replies))
    numbers["server_cpu"] = server_cpu / output
    if plan.long:
        numbers |= {"long_tokens": meanwhile, "long_rate": meanwhile / seconds, "long_seconds": long.ended - long.began}
    curve = [(at - come.began, tokens - start) for at, tokens in long.progress if come.began <= at <= come.ended]
    return Sample(
        arm=arm,
        repeat=repeat,
        load=load,
        numbers=numbers,
        ttfts=come.ttfts,
        progress=curve[:: len(curve) // _PROGRESS + 1],
        replies=[digest(ids) for ids in long.replies + come.replies],
        server={name: after[name] for name in SERVER_FACTS if name in after},
        others_cpu=round(others_cpu, 3),
    )


class Requests:
    """Greedy requests that are sent at once, all of which get the same number of tokens.

    Parameters
    ----------
    server
        Where to.
    prompts
        Token ids of each.
    output
        Tokens of each answer.
    timeout
        Longest time without an event, in seconds.
    tokens
        Output tokens of all at which ``reached`` is set.

    Attributes
    ----------
    reached
        Set when they have so many output tokens, all together.
    began, ended
        When they were sent and when the last token came (``time.monotonic`` seconds).
    ttfts
        Time to first token of each (s).
    progress
        When something came, and the output tokens of all by then.
    replies
        Token ids.
    """

    def __init__(self, server: Server, prompts: list[list[int]], output: int, timeout: float, tokens: int = 0) -> None:
        self.server, self.prompts, self.output, self.timeout, self.tokens = server, prompts, output, timeout, tokens
        self.reached = Event()
        self.began = self.ended = 0.0
        self.progress: list[tuple[float, int]] = []
        self.replies: list[list[int]] = [[] for _ in prompts]
        self._first: dict[int, float] = {}

    @property
    def ttfts(self) -> list[float]:
        """Time to first token of each (s)."""
        return [self._first[number] - self.began for number in range(len(self.prompts))]

    def read(self) -> None:
        """Send them, and return when all answers are there.

        Raises
        ------
        ServerError
            If one does not get all of its tokens.
        """
        sampling = {"temperature": 0, "max_new_tokens": self.output, "ignore_eos": True}
        body = {"input_ids": self.prompts, "sampling_params": sampling, "stream": True}
        total, self.began = 0, time.monotonic()
        for event in self.server.stream("/generate", body, self.timeout):
            if "output_ids" not in event:
                raise ServerError(f"the server gave a request up: {event.get('error', event)}")
            if new := event["output_ids"]:
                self.ended = time.monotonic()
                self._first.setdefault(event["index"], self.ended)
                self.replies[event["index"]] += new
                total += len(new)
                self.progress.append((self.ended, total))
                if total >= self.tokens:
                    self.reached.set()
        if short := [len(reply) for reply in self.replies if len(reply) != self.output]:
            raise ServerError(
                f"{len(short)} of {len(self.prompts)} requests got another number of tokens than {self.output}, one of "
                f"them {short[0]}; if the model's context is too short, lower --output-len"
            )

    def tokens_at(self, moment: float) -> int:
        """Return how many output tokens all had at a moment."""
        return max((tokens for at, tokens in self.progress if at <= moment), default=0)
