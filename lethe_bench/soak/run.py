"""The soak itself: a stock server is recorded, then waves of traffic go to one that evicts."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lethe_bench.servers import Server, launch_command, some_free_port
from lethe_bench.soak import client
from lethe_bench.soak.client import Recorded
from lethe_bench.soak.ends import ended_under_load, kill, of_session, scheduler
from lethe_bench.soak.traffic import QUESTIONS, SWITCHES, WAVE, Request, Wave, untouched
from lethe_bench.soak.verdict import Memory, Soaked, alarms

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CONFIG = {"budget": {"tokens": 48}, "rounds": {"interval": 8}}
FLUSH_SECONDS = 20.0
"""An idle server lets go of everything within this time."""

UPDATED = "Weights were updated, but the cache was not flushed"
"""SGLang's answer if a request waits for its grammar, which keeps even a paused server busy; the weights are new."""

PAUSED_SECONDS = 0.3
"""How long generation stays paused."""


@dataclass
class Soak:
    """One soak.

    Attributes
    ----------
    model
        Directory of the model.
    out
        Directory of logs.
    tokens
        Length of a long reply.
    pool
        Tokens of the KV pool.
    say
        Takes a line of progress.
    """

    model: Path
    out: Path
    tokens: int = 192
    pool: int = 240
    say: Callable[[str], None] = print
    found: Soaked = field(default_factory=Soaked)

    def server(self, name: str, *more: str) -> Server:
        """Return a server that is yet to start."""
        port = some_free_port()
        shared = ("--max-total-tokens", str(self.pool), "--random-seed", "0", "--max-running-requests", "8")
        command = launch_command(str(self.model), port, *shared, *more)
        return Server(command, port, self.out / f"{name}.log", {**STRICT, **QUIET})

    def evicting(self, name: str) -> Server:
        """Return a server with eviction that is yet to start."""
        return self.server(name, "--kv-evict", "lethe", "--kv-evict-config", json.dumps(CONFIG))

    def record(self) -> Recorded:
        """Record what a stock server answers to requests that eviction must leave alone."""
        self.say("recording a stock server")
        prompts = [untouched(question, 1)["text"] for question in QUESTIONS]
        params = untouched("", self.tokens // 5)["sampling_params"]
        del params["custom_params"]
        body = {"text": prompts, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 2}
        with self.server("stock") as server:
            replies = json.loads(server.post("/generate", body))
        return Recorded(dict(zip(prompts, map(client.decided, replies), strict=True)))

    def run(self, waves: Iterable[Wave], seconds: float, recorded: Recorded) -> None:
        """Send waves for a time, to the end of the last one; then end that server, and another one, under load."""
        with self.evicting("soak") as server:
            self.say("the traffic begins")
            Traffic(server, recorded, self.found, self.model, self.say).run(waves, seconds)
            faults = {"SIGTERM": self._fault(server, "SIGTERM", lambda: server.pid)}
        self.found.faults = faults
        with self.evicting("killed") as server:
            faults["kill -9 of the scheduler"] = self._fault(server, "SIGKILL", lambda: scheduler(server.pid))

    def beside(self, waves: Iterable[Wave], seconds: float, recorded: Recorded) -> None:
        """Send waves to a stock server for a time: what it does under the same traffic is not the plugin's."""
        self.found.beside = beside = Soaked()
        with self.server("beside") as server:
            self.say("the same traffic at a stock server")
            Traffic(server, recorded, beside, self.model, self.say, evicts=False).run(waves, seconds)

    def _fault(self, server: Server, signal: str, victim: Callable[[], int]) -> str:
        self.say(f"{signal} under load")
        bodies = [untouched(question, self.tokens // 2) for question in QUESTIONS[:3]]
        return ended_under_load(server, bodies, lambda: kill(victim(), signal))


class Traffic:
    """Waves at a running server.

    Parameters
    ----------
    server
        It evicts, and is idle.
    recorded
        What untouched replies are compared with.
    found
        Takes what happens.
    model
        Directory of the weights that an update loads.
    say
        Takes a line of progress.
    evicts
        Whether the server is not a stock one, which has no rounds to switch.
    """

    def __init__(
        self,
        server: Server,
        recorded: Recorded,
        found: Soaked,
        model: Path,
        say: Callable[[str], None] = print,
        *,
        evicts: bool = True,
    ) -> None:
        self.server, self.recorded, self.found, self.model, self.say = server, recorded, found, model, say
        self.evicts = evicts
        self._read, self._lock = 0, threading.Lock()

    def run(self, waves: Iterable[Wave], seconds: float) -> None:
        """Send waves until so many seconds have gone, or the server has.

        An interruption is kept in what was found and raised again, with the server's requests left to it.
        """
        began = time.monotonic()
        pool = ThreadPoolExecutor(WAVE)
        try:
            for wave in waves:
                self._wave(pool, wave)
                self.found.seconds = time.monotonic() - began
                self.idle()
                counts = {**self.found.effects, "errors": sum(self.found.errors.values())}
                said = ", ".join(f"{count} {name}" for name, count in counts.items())
                self.say(f"{self.found.seconds:6.0f} s  wave {wave.number}: {said}")
                if self.found.seconds >= seconds or self.server.status is not None:
                    return
                self.act(wave.then)
        except (KeyboardInterrupt, SystemExit):
            self.found.interrupted = True
            self.server.stop(grace=0)  # so that the pool's threads come back
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _wave(self, pool: ThreadPoolExecutor, wave: Wave) -> None:
        requests = [pool.submit(self.put, request) for request in wave.requests]
        for wait, act in wave.control:
            time.sleep(wait)
            self.act(act)
        for request in requests:
            request.result()

    def put(self, request: Request) -> None:
        """Put one request and keep what came of it."""
        try:
            reply = client.put(self.server, request)
        except Exception as error:  # whatever it is, it is an outcome
            self._failed(request.kind, error)
            return
        with self._lock:
            self.found.done[request.kind] += 1
            if request.kind == "none":
                self.found.compared += self.recorded.tokens(request.body["text"])
                if not self.recorded.same(request.body["text"], reply["output_ids"]):
                    self.found.different.append(request.rid)

    def act(self, name: str) -> None:
        """Do one act of control and keep what came of it."""
        if name in SWITCHES and not self.evicts:
            return
        acts: dict[str, Callable[[], object]] = {
            "retract": lambda: self._paused("retract"),
            "pause": lambda: self._paused("in_place"),
            "weights": lambda: self._paused("retract", self._update_weights),
            "flush": self._flush,
            "pressure": lambda: self._switch(name),
            "always": lambda: self._switch(name),
        }
        try:
            acts[name]()
        except Exception as error:  # as above
            self._failed(name, error)
        else:
            with self._lock:
                self.found.done[name] += 1

    def idle(self) -> None:
        """Flush, which is refused while anything is held; sample memory; read the log and the server's counts."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self.server.status is None and not self._flush():
            if time.monotonic() > deadline:
                self.found.errors[f"a leak: an idle server refuses to flush for {FLUSH_SECONDS:g} s"] += 1
                break
            time.sleep(0.2)
        else:
            self.found.done["flush when idle"] += 1
        with self.server.log.open(errors="replace") as log:
            log.seek(self._read)
            self.found.alarms += alarms(log.read())
            self._read = log.tell()
        if (status := self.server.status) is not None:
            self.found.errors[f"the server ended with status {status}"] += 1
            return
        self.found.memory.append(Memory(self.found.seconds, of_session(self.server.pid)))
        if not self.evicts:
            return
        counts = self.server.get("/server_info")["internal_states"][0]["lethe"]
        pressed = counts["pressure"] or {"events": 0}  # nothing is said while rounds do not wait for it
        self.found.effects = {
            "rounds": counts["rounds"],
            "events of pressure": max(self.found.effects.get("events of pressure", 0), pressed["events"]),
            "requests retracted": counts["requests_retracted"],
        }

    def _flush(self) -> bool:
        try:
            return "flushed" in self.server.post("/flush_cache", {}, client.TIMEOUT).lower()
        except urllib.error.HTTPError as error:
            with error:
                return False

    def _paused(self, mode: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.server.post("/pause_generation", {"mode": mode}, client.TIMEOUT)
        try:
            time.sleep(PAUSED_SECONDS)
            meanwhile()
        finally:
            self.server.post("/continue_generation", {}, client.TIMEOUT)

    def _update_weights(self) -> None:
        try:
            text = self.server.post("/update_weights_from_disk", {"model_path": str(self.model)}, client.TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
        answer = json.loads(text)
        if not answer["success"] and not answer["message"].startswith(UPDATED):
            raise client.Wrong(answer["message"])

    def _switch(self, when: str) -> None:
        self.server.post("/kv_evict", {"rounds": {"when": when}}, client.TIMEOUT)

    def _failed(self, name: str, error: Exception) -> None:
        with self._lock:
            self.found.errors[f"{name}: {client.reason(error)}"] += 1
