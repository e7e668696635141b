"""Accuracy against memory on live servers: every problem to every arm, one line per reply, resumable at any kill."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from lethe_bench.accuracy.datasets import Item
from lethe_bench.accuracy.experiment import Arm, Experiment
from lethe_bench.accuracy.live import check_server, held, held_by_stock, state_of, switch
from lethe_bench.accuracy.prompts import Prompts
from lethe_bench.accuracy.store import Store
from lethe_bench.servers import Server, ServerError, explained
from lethe_sglang.config import ConfigError
from lethe_sglang.files import read_lines

FETCH_REQUESTS, FETCH_SECONDS = 32, 5.0
"""Replies, or seconds, after which the server is asked what they held (it remembers 1,024) and they are written."""


class Job(NamedTuple):
    """One reply to get."""

    item: Item
    sample: int
    limit: int


@dataclass(kw_only=True)
class Run:
    """One pass over what is missing.

    Attributes
    ----------
    experiment, store
        What to run, and where results go.
    prompts
        The model's tokenizer.
    items
        Problems per task.
    only
        Names of the arms to run; empty is all.
    port
        Where the first server listens, on 127.0.0.1; the next ones take the ports after it.
    servers
        How many servers of the plugin run side by side, each taking the next arm.
    say
        Takes one line of progress at a time.
    """

    experiment: Experiment
    store: Store
    prompts: Prompts
    items: dict[str, list[Item]]
    only: tuple[str, ...] = ()
    port: int = 31000
    servers: int = 1
    say: Callable[[str], None] = print
    _limits: dict[str, int] = field(default_factory=dict)
    _running: list[Server] = field(default_factory=list)
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> None:
        """Start the stock server for ``full``, then the evicting server for the other arms, where replies are missing.

        Raises
        ------
        ConfigError
            If existing replies are to other questions.
        ServerError
            If a server fails; what was answered before is kept.
        """
        arms = [arm for arm in self.experiment.every_arm() if not self.only or arm.name in self.only]
        for kind in ("stock", "lethe"):
            todo = [(arm, self.missing(arm)) for arm in arms if (arm.index is None) == (kind == "stock")]
            traced = {arm.name: self._untraced(arm) for arm, _ in todo if arm.index is not None}
            if any(jobs for _, jobs in todo) or any(traced.values()):
                self._serve(kind, todo, traced)
        self.say(f"{len(arms)} arms are done; now: lethe eval report {self.store.directory}")

    def missing(self, arm: Arm) -> list[Job]:
        """Return the replies that an arm still lacks."""
        lines = {(line["id"], line["sample"]): line for line in read_lines(self.store.generations(arm.name))}
        jobs = []
        for task in self.experiment.tasks:
            for item, sample in itertools.product(self.items[task.label], range(self.experiment.samples_of(task))):
                if (line := lines.get((item.id, sample))) is None:
                    jobs.append(Job(item, sample, self._limit(item, self.experiment.limit_of(task))))
                elif line["question"] != item.prompt:
                    raise ConfigError(
                        f"--out {self.store.directory}: {arm.name} answered another {item.id}; the "
                        "problems have changed, give another directory"
                    )
        return jobs

    def _limit(self, item: Item, limit: int | str) -> int:
        if isinstance(limit, int):
            return limit
        if item.id not in self._limits:
            self._limits[item.id] = math.ceil(float(limit[:-1]) * (self.prompts.length(item.reference) + 1))
        return self._limits[item.id]

    def _untraced(self, arm: Arm) -> list[Item]:
        done = {line["id"] for line in read_lines(self.store.traces) if line["arm"] == arm.name}
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*self.items.values()))
        first = itertools.islice((item for item in in_turn if item is not None), self.experiment.trace)
        return [item for item in first if item.id not in done]

    def _serve(self, kind: str, todo: list[tuple[Arm, list[Job]]], traced: dict[str, list[Item]]) -> None:
        """Work through the arms on as many servers of a kind as there are arms for, ``servers`` at most."""
        config = self.store.directory / "server.yaml" if kind == "lethe" else None
        if config is not None:
            config.write_text(yaml.safe_dump(self.experiment.server_config(), sort_keys=False), encoding="utf-8")
        queue = deque((arm, jobs) for arm, jobs in todo if jobs or traced.get(arm.name))
        count = min(self.servers, len(queue))
        if count <= 1:
            self._work(kind, 0, config, queue, traced)
            return
        with ThreadPoolExecutor(count) as pool:
            workers = [pool.submit(self._work, kind, i, config, queue, traced) for i in range(count)]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:
                queue.clear()
                for server in self._running:  # what its worker then says is a consequence, not the cause
                    server.stop()
                raise

    def _work(
        self,
        kind: str,
        number: int,
        config: Path | None,
        queue: deque[tuple[Arm, list[Job]]],
        traced: dict[str, list[Item]],
    ) -> None:
        """Take arms from the queue until it is empty, on one server."""
        port = self.port + number
        command = self.experiment.server_command(port, config)
        offline = {"HF_HUB_OFFLINE": "1"} if Path(self.experiment.model_path).is_dir() else {}
        log = self.store.directory / "logs" / (f"{kind}-{number}.log" if number else f"{kind}.log")
        self.say(f"starting the {kind} server" + (f" {number}" if number else ""))
        with Server(command, port, log, offline) as server, explained(server):
            self._running.append(server)
            facts = check_server(server, evicts=kind == "lethe")
            if number == 0:
                self.store.note_server(kind, {"command": self.experiment.readable(command), **facts})
            try:
                while True:
                    try:
                        arm, jobs = queue.popleft()
                    except IndexError:
                        break
                    self._answer(server, arm, jobs)
                    self._trace(server, arm, traced.get(arm.name, []))
            except TimeoutError:
                raise ServerError(f"no answer within {self.experiment.server.timeout:g} s (server.timeout)") from None

    def _answer(self, server: Server, arm: Arm, jobs: list[Job]) -> None:
        if not jobs:
            return
        if arm.index is None:
            server.post("/flush_cache?timeout=60", {})
        else:
            switch(server, arm)
        path = self.store.generations(arm.name)
        segment = 1 + max((line["segment"] for line in read_lines(path)), default=0)
        began = fetched = time.monotonic()
        ready: list[dict[str, Any]] = []
        done = right = 0
        with _bar(len(jobs), arm.name) as bar:
            try:
                for batch in self._replies(server, jobs):
                    ready += [{**line, "segment": segment, "at": round(time.monotonic() - began, 3)} for line in batch]
                    done, right = done + len(batch), right + sum(line["ok"] for line in batch)
                    bar.set_postfix(right=f"{right / max(done, 1):.3f}", refresh=False)
                    bar.update(len(batch))
                    late = time.monotonic() - fetched > FETCH_SECONDS
                    if late or len(ready) >= FETCH_REQUESTS or done == len(jobs):
                        self._keep(server, arm, ready)
                        ready, fetched = [], time.monotonic()
            except BaseException:
                with contextlib.suppress(Exception):  # the server may still know what the last replies held
                    self._keep(server, arm, ready)
                raise

    def _keep(self, server: Server, arm: Arm, lines: list[dict[str, Any]]) -> None:
        """Write replies with what they held."""
        if not lines:
            return
        if arm.index is None:
            memory = {line["rid"]: held_by_stock(line["tokens"]) for line in lines}
        else:
            memory = held(server, lines)
        kept = [{**line, "memory": memory[line["rid"]]} for line in lines]
        self.store.append(self.store.generations(arm.name), kept)

    def _replies(self, server: Server, jobs: list[Job]) -> Iterator[list[dict[str, Any]]]:
        """Keep ``concurrency`` requests open and yield marked replies as they come, none where that takes long."""
        pool = ThreadPoolExecutor(self.experiment.concurrency)
        queue, waiting = iter(jobs), set[Future[dict[str, Any]]]()
        try:
            while True:
                free = 2 * self.experiment.concurrency - len(waiting)
                for job in itertools.islice(queue, free):  # tokenizers do not like threads: encode here
                    waiting.add(pool.submit(self._ask, server, job, self._encode(job.item)))
                if not waiting:
                    return
                finished, waiting = wait(waiting, timeout=FETCH_SECONDS, return_when=FIRST_COMPLETED)
                yield [self._marked(future.result()) for future in finished]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, item: Item) -> list[int]:
        with self._encoding:
            return self.prompts.encode(item.prompt)

    def _ask(self, server: Server, job: Job, prompt: list[int]) -> dict[str, Any]:
        sampling = self.experiment.sampling
        rid = f"{uuid.uuid4().hex[:12]}/{job.item.id}/{job.sample}"
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": job.limit,
            "skip_special_tokens": False,
        }
        if sampling.temperature > 0:
            params["sampling_seed"] = sampling.seed * 2**32 + zlib.crc32(f"{job.item.id}/{job.sample}".encode())
        body = {"input_ids": prompt, "rid": rid, "sampling_params": params}
        reply = json.loads(server.post("/generate", body, self.experiment.server.timeout))
        return {"job": job, "rid": rid, "text": reply["text"], "meta": reply["meta_info"]}

    def _marked(self, reply: dict[str, Any]) -> dict[str, Any]:
        job, text, meta = reply["job"], reply["text"], reply["meta"]
        item, finish = job.item, meta["finish_reason"]
        if finish["type"] not in ("stop", "length"):
            raise ServerError(f"{item.id}: the server gave up: {finish.get('message', finish['type'])}")
        return {
            "id": item.id,
            "sample": job.sample,
            "task": item.task,
            "question": item.prompt,
            "answer": item.answer,
            "output": text,
            "ok": item.grade(text.removesuffix(self.prompts.end)),
            "tokens": meta["completion_tokens"],
            "prompt_tokens": meta["prompt_tokens"],
            "finish": finish["type"],
            "limit": job.limit,
            "seconds": round(meta.get("e2e_latency", 0.0), 3),
            "rid": reply["rid"],
        }

    def _trace(self, server: Server, arm: Arm, items: list[Item]) -> None:
        """Ask a few problems one by one on the arm that records kept sets."""
        if arm.index is None or not items:
            return
        switch(server, arm)
        limits = {task.label: self.experiment.limit_of(task) for task in self.experiment.tasks}
        for item in items:
            job = Job(item, 0, self._limit(item, limits[item.task]))
            reply = self._ask(server, job, self._encode(item))
            rounds = [
                {name: entry[name] for name in ("round", "prefix", "tail", "kept")}
                for entry in state_of(server)["kept"]
                if entry["rid"] == reply["rid"]
            ]
            meta = reply["meta"]
            line = {
                "arm": arm.name,
                "id": item.id,
                "rid": reply["rid"],
                "prompt_tokens": meta["prompt_tokens"],
                "tokens": meta["completion_tokens"],
                "rounds": rounds,
            }
            self.store.append(self.store.traces, [line])


def _bar(total: int, name: str) -> Any:
    """Progress bar; a log file gets a line every half minute."""
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=name, unit="reply", mininterval=every, dynamic_ncols=True)
