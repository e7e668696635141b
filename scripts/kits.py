"""Run the test kits that SGLang ships against stock SGLang and against a server that evicts; write a page of both.

python scripts/kits.py [KIT ...] [--arm ARM] [--model MODEL]     all kits and both arms, unless some are named

A kit is a mixin of ``sglang.test.kits`` with test methods; SGLang's own tests mix it into a class that has started a
server. Here every method runs once per arm, on one server a arm that all kits share. What was found stays in
``docs/results/kits/kits.json``: a run of some kits replaces theirs and leaves the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import random
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from lethe_bench import machine, models
from lethe_bench.servers import Server, launch_command, some_free_port
from lethe_sglang.processes import ending_on_signals

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "results" / "kits" / "kits.json"
PAGE = ROOT / "docs" / "results" / "kits.md"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
CONFIG = {"budget": {"tokens": 32}, "rounds": {"interval": 8}, "requests": {"max_budget": 8192}}
"""So small that rounds come in answers of 64 tokens, which is what most kits ask for."""

SHARED = ("--max-total-tokens", "16384", "--max-running-requests", "48", "--disable-cuda-graph")
ARMS = {"stock": SHARED, "evicting": (*SHARED, "--kv-evict", "lethe", "--kv-evict-config", json.dumps(CONFIG))}
TOKENS = range(20, 48)
"""Of random prompts; every model has them."""

LIMIT = 150
"""Seconds after which all requests of a test are aborted."""

_COLUMNS = 160


def _few_nodes(kit: ModuleType) -> None:
    """Shrink the tree of requests to what the context, the vocabulary and a CPU can take."""
    whole = kit.gen_radix_tree
    random.seed(1)

    def nodes() -> list[dict[str, Any]]:
        found = whole(num_nodes=40, chunk_len=48)
        return [node | {"input_ids": [TOKENS[i % len(TOKENS)] for i in node["input_ids"]]} for node in found]

    kit.gen_radix_tree = nodes


def _random_prompts(kit: ModuleType) -> None:
    """Replace LongBench, which is a download, by random tokens."""

    def prompts(**_: Any) -> list[list[int]]:
        rng = random.Random(1)
        return [[rng.choice(TOKENS) for _ in range(96)] for _ in range(4)]

    importlib.import_module("sglang.test.kl_test_utils").get_input_ids = prompts  # type: ignore[attr-defined]


def _random_turns(kit: ModuleType) -> None:
    """Replace ShareGPT, which is a download, by random tokens."""

    def rows(input_len: int, num_prompts: int, **_: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(prompt=[random.choice(TOKENS) for _ in range(input_len)]) for _ in range(num_prompts)]

    kit.sample_random_requests = rows


def _method(name: str, function: str, **arguments: Any) -> Callable[[ModuleType], type]:
    """Return what makes a mixin of a kit that is a function."""

    def mixin(kit: ModuleType) -> type:
        def test(self: Any) -> None:
            more = {"model_path": self.model, **arguments} if arguments else {}
            getattr(kit, function)(self.base_url, **more)

        return type(name, (), {f"test_{name}": test})

    return mixin


def _turns(tokens: int) -> Callable[[ModuleType], type]:
    more = {"num_clients": 4, "request_length": 64, "output_length": tokens}
    return _method("multiturn_cache_hit", "run_multiturn_cache_hit_test", **more)


class Kit(NamedTuple):
    """One mixin, or a function made one, and what it needs here.

    Attributes
    ----------
    module
        Under ``sglang.test.kits``, without ``_kit``.
    mixin
        Its class, or what makes one of the module.
    attributes
        Of the class that it is mixed into.
    adapt
        Changes the module before it is used.
    adapted
        What the page says of the two above.
    by_design
        Why a test that passes on stock may fail with eviction, by the test's name.
    """

    module: str
    mixin: str | Callable[[ModuleType], type]
    attributes: Mapping[str, Any] = MappingProxyType({})
    adapt: Callable[[ModuleType], None] | None = None
    adapted: str = ""
    by_design: Mapping[str, str] = MappingProxyType({})

    def cases(self, server: Server, model: str) -> list[unittest.TestCase]:
        """Return the tests of this kit, against a running server."""
        module = importlib.reload(importlib.import_module(f"sglang.test.kits.{self.module}_kit"))  # not adapted twice
        if self.adapt:
            self.adapt(module)
        mixin = getattr(module, self.mixin) if isinstance(self.mixin, str) else self.mixin(module)
        import openai

        facts = {
            "base_url": server.url,
            "model": model,
            "api_key": "none",
            "client": openai.Client(api_key="none", base_url=f"{server.url}/v1"),
            "process": SimpleNamespace(poll=lambda: server.status),
        }
        case = type(mixin.__name__, (mixin, unittest.TestCase), {**facts, **self.attributes})
        return [case(name) for name in unittest.TestLoader().getTestCaseNames(case)]


PRUNED = (
    "cells of the reply were evicted; nothing with holes enters the prefix tree, so the next turn finds no reply there"
)
KL = {"kl_div_max_samples": 4, "kl_div_thres": 0.005}
SHORT, LONG = 24, 96
"""Tokens of a reply that no round reaches, and of one that many do."""

KITS = {
    "api_contract": Kit("basic_api_contract", "BasicAPIContractMixin"),
    "json_constrained": Kit("json_constrained", "JSONConstrainedMixin"),
    "matched_stop": Kit("matched_stop", "MatchedStopMixin"),
    "abort_all": Kit(
        "abort_timeout",
        "AbortAllMixin",
        {"abort_all_max_new_tokens": 4000, "abort_all_num_requests": 16, "abort_all_sleep": 8},
        adapted="16 requests of 4,000 tokens, 8 s",
    ),
    "decode_correctness": Kit("basic_decode_correctness", "BasicDecodeCorrectnessMixin"),
    "json_mode": Kit("json_mode", "JSONModeMixin"),
    "pause": Kit(
        "pause_generation",
        "PauseResumeInPlaceMixin",
        {"pause_num_requests": 8, "pause_max_new_tokens": 512, "pause_ignore_eos": True},
        adapted="8 requests of 512 tokens",
    ),
    "cache_hit_short": Kit(
        "cache_hit",
        _turns(SHORT),
        adapt=_random_turns,
        adapted=f"4 clients, random prompts of 64 tokens, replies of {SHORT}: no round is due",
    ),
    "cache_hit_long": Kit(
        "cache_hit",
        _turns(LONG),
        adapt=_random_turns,
        adapted=f"the same, replies of {LONG}: many rounds",
        by_design={"test_multiturn_cache_hit": PRUNED},
    ),
    "kl_short": Kit(
        "kl_divergence",
        "KLDivergenceMixin",
        {**KL, "kl_div_prefill_max_new_tokens": SHORT, "kl_div_decode_max_new_tokens": SHORT},
        adapt=_random_prompts,
        adapted=f"4 random prompts of 96 tokens, replies of {SHORT}, threshold 0.005: no round is due",
    ),
    "kl_long": Kit(
        "kl_divergence",
        "KLDivergenceMixin",
        {**KL, "kl_div_prefill_max_new_tokens": LONG, "kl_div_decode_max_new_tokens": LONG},
        adapt=_random_prompts,
        adapted=f"the same, replies of {LONG}: many rounds",
        by_design={
            "test_input_output_logprobs_match_prefill_cache_hit": "a pruned reply is compared with its prefill, which "
            "sees the whole cache; that the two differ is what eviction costs",
            "test_input_output_logprobs_match_decode_cache_hit": PRUNED,
        },
    ),
    "radix_tree": Kit(
        "radix_cache_server",
        _method("radix_attention", "run_radix_attention_test"),
        adapt=_few_nodes,
        adapted="40 nodes of up to 48 tokens",
    ),
    "regex_constrained": Kit("regex_constrained", "RegexConstrainedMixin"),
    "ebnf_constrained": Kit("ebnf_constrained", "EBNFConstrainedMixin"),
    "anthropic_messages": Kit("anthropic_messages", "AnthropicMessagesMixin"),
    "scheduler_stress": Kit("basic_scheduler_stress", "BasicSchedulerStressMixin"),
}

WITHOUT_ROUNDS = ("api_contract", "cache_hit_short", "kl_short")
"""Kits whose replies are too short for a round, for the servers here."""

NOT_RUN = {
    "abort_timeout (waiting, running)": "need servers of their own: their time limits would end the others' requests",
    "streaming_session": "streaming sessions are refused with eviction ([support](../support.md))",
    "reasoning": "needs a model that thinks in tags and answers in English; no such model is small enough here",
    "eval_accuracy, lm_eval, unified_radix_cache": "GSM8K and its like: a download, and beyond so small a model",
    "mmmu_vlm, vlm_perf": "need a model that sees",
    "spec_decoding, spec_server": "speculative decoding, refused with eviction ([support](../support.md))",
    "pd_parity": "prefill and decode on two servers, refused with eviction ([support](../support.md))",
    "fwd_occupancy, perf_bench": "measure a GPU",
    "dsa_metadata, attention_unittest": "test attention kernels of a GPU, no server",
    "prefix_cache_branching": "of hybrid models, whose states are cached in chunks",
}


@contextlib.contextmanager
def limited(server: Server, seconds: float) -> Iterator[None]:
    """Abort all requests of the server if the block takes longer: no kit has a time limit for all that it does."""

    def abort() -> None:
        with contextlib.suppress(OSError):
            server.post("/abort_request", {"abort_all": True}, timeout=10)

    timer = threading.Timer(seconds, abort)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def outcome(case: unittest.TestCase, server: Server) -> dict[str, Any]:
    """Run one test; return ``error``, empty if it passed, and the seconds and rounds that it took."""
    result, before, started = unittest.TestResult(), _rounds(server), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), limited(server, LIMIT):
        case.run(result)
    seconds = time.monotonic() - started
    if wrong := result.failures + result.errors:
        with contextlib.suppress(OSError):  # a test of pauses that fails leaves the server paused
            server.post("/continue_generation", {}, timeout=10)
    error = next(iter(_reasons(wrong[0][1]) if wrong else []), "")
    return {"error": error, "seconds": round(seconds, 1), "rounds": _rounds(server) - before}


def run(kit: Kit, server: Server, model: str) -> dict[str, dict[str, Any]]:
    """Run all tests of a kit; return their outcomes by name."""
    outcomes = {}
    for case in kit.cases(server, model):
        name = case.id().rpartition(".")[2]
        outcomes[name] = outcome(case, server)
        print(f"  {name}: {outcomes[name]}", flush=True)
        if server.status is not None:
            raise SystemExit(f"the server ended in {name}")
    return outcomes


def verdict(kit: Kit, test: str, stock: dict[str, Any] | None, evicting: dict[str, Any] | None) -> tuple[str, str]:
    """Return what to call two outcomes of a test, and why."""
    if stock is None or evicting is None:
        return "not compared", ""
    if bool(stock["error"]) == bool(evicting["error"]):
        return ("equal", "") if not stock["error"] else ("fails in both", stock["error"])
    if stock["error"]:
        return "passes only with eviction", stock["error"]
    return ("by design", kit.by_design[test]) if test in kit.by_design else ("FAULT", evicting["error"])


def page(found: dict[str, Any]) -> str:
    """Return the page of what was found."""
    rows, counts, adapted = [], {}, []
    for name, kit in KITS.items():
        stock, evicting = (found["arms"].get(arm, {}).get(name, {}) for arm in ARMS)
        if kit.adapted and (stock or evicting):
            adapted.append(f"- `{name}`: {kit.adapted}.")
        for test in {**stock, **evicting}:
            word, why = verdict(kit, test, stock.get(test), evicting.get(test))
            counts[word] = counts.get(word, 0) + 1
            cells = [_cell(arm.get(test)) for arm in (stock, evicting)]
            rounds = evicting.get(test, {}).get("rounds", "")
            rows.append(
                f"| `{name}` | `{test.removeprefix('test_')}` | {' | '.join(cells)} | {rounds} | {word} | {why} |"
            )
    missing = [f"`{name}`" for name in KITS if not all(name in found["arms"].get(arm, {}) for arm in ARMS)]
    total = ", ".join(f"{number} {word}" for word, number in sorted(counts.items(), key=lambda item: -item[1]))
    cpu, sglang, config = found["machine"]["cpu"], found["versions"]["sglang"], json.dumps(CONFIG)
    lines = [
        "# SGLang's own test kits",
        "",
        "SGLang ships tests of a running server (`sglang.test.kits`). `python scripts/kits.py` runs each against stock",
        "SGLang and a server that evicts. A small model fails some of them without us: the comparison is the point.",
        "",
    ]
    if rows:
        lines += [
            f"Written by `python scripts/kits.py --model {found['model']}`, on {cpu} (no GPU).",
            f"SGLang {sglang}. Both servers have `{' '.join(SHARED)}`",
            f"and SGLang's strict memory checks; the evicting one `{config}`,",
            "so that rounds come even in short answers (`rounds`: how many came during the test).",
            "",
            f"**{len(rows)} tests: {total}.**",
            "",
            "| kit | test | stock | evicting | rounds | verdict | why |",
            "| --- | --- | --- | --- | ---: | --- | --- |",
            *rows,
            "",
        ]
    if missing:
        lines += [f"**Not yet run:** {', '.join(missing)}.", ""]
    if adapted:
        lines += ["Where a kit was made smaller, or its data would have been a download:", "", *adapted, ""]
    lines += ["## Kits that cannot run here", "", "| kit | why |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {why} |" for name, why in NOT_RUN.items()), ""])


def main() -> None:
    """Run the kits that were named against the arms that were named, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("kits", nargs="*", metavar="KIT", help=f"of {', '.join(KITS)} (default: all)")
    parser.add_argument("--arm", choices=ARMS, help="one arm only")
    parser.add_argument("--model", default="smollm2", help=f"{models.LEGAL} (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page of what was found before, run nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.kits) - set(KITS)):
        parser.error(f"KIT {unknown[0]}: not a kit; legal: {', '.join(KITS)}")
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    if options.page:
        _write(found)
        return
    if found.get("model") != options.model:
        found = {"model": options.model, "arms": {}}
    found |= {"machine": machine.machine(), "versions": machine.versions()}
    with ending_on_signals():
        for arm in [options.arm] if options.arm else ARMS:
            measure(arm, options.kits or list(KITS), found)


def measure(arm: str, kits: list[str], found: dict[str, Any]) -> None:
    """Start the server of an arm, run the kits and write the page after each."""
    model, port = str(models.directory(found["model"])), some_free_port()
    log = Path(tempfile.gettempdir(), f"kits-{arm}.log")
    with Server(launch_command(model, port, *ARMS[arm]), port, log, ENVIRONMENT) as server:
        print(f"{arm}: ready after {server.ready_seconds:.0f} s, log {log}", flush=True)
        for name in kits:
            print(name, flush=True)
            found["arms"].setdefault(arm, {})[name] = run(KITS[name], server, model)
            _write(found)


def _write(found: dict[str, Any]) -> None:
    FOUND.parent.mkdir(parents=True, exist_ok=True)
    FOUND.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


def _rounds(server: Server) -> int:
    """Return the rounds of the server so far; 0 of stock SGLang."""
    with contextlib.suppress(OSError):  # a server that has ended is seen by its status
        return int(server.get("/server_info")["internal_states"][0].get("lethe", {}).get("rounds", 0))
    return 0


def _reasons(trace: str) -> list[str]:
    """Return the message of a traceback as one short line that a table can hold, without names of this machine."""
    lines = [line for line in trace.splitlines() if line and not line.startswith((" ", "Traceback"))]
    text = " ".join(lines[0].split()).replace("|", "/").replace(str(Path.home()), "~")
    return [text if len(text) <= _COLUMNS else text[: _COLUMNS - 3] + "..."]


def _cell(found: dict[str, Any] | None) -> str:
    return "-" if found is None else "fails" if found["error"] else "passes"


if __name__ == "__main__":
    main()
