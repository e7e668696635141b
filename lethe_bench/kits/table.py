"""The kits: which mixin of ``sglang.test.kits`` each is, and what it needs on a CPU and without a download.

The kits are clients, and are imported when they run: nothing here needs SGLang.
"""

from __future__ import annotations

import importlib
import json
import random
import unittest
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from lethe_bench.servers import Server

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

REPLY_SECONDS = 900
"""A request may take so long; the kits think of a GPU."""

TOY, SPEAKS = "models/reasoner-dev", "smollm2"
"""Models: one that is quick, for kits that do not read what it says, and one that answers in English."""


def _few_nodes(kit: Any) -> None:
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


def _random_turns(kit: Any) -> None:
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
        Why a test may pass on stock and fail with eviction, or the other way round, by the test's name.
    model
        What it runs on unless something else is asked for.
    alone
        Whether it flushes, pauses, aborts or counts what is cached, so that nothing may run beside it.
    """

    module: str
    mixin: str | Callable[[ModuleType], type]
    attributes: Mapping[str, Any] = MappingProxyType({})
    adapt: Callable[[ModuleType], None] | None = None
    adapted: str = ""
    by_design: Mapping[str, str] = MappingProxyType({})
    model: str = SPEAKS
    alone: bool = False

    def cases(self, server: Server, model: str) -> list[unittest.TestCase]:
        """Return the tests of this kit, against a running server."""
        module: Any = importlib.reload(
            importlib.import_module(f"sglang.test.kits.{self.module}_kit")
        )  # not adapted twice
        if hasattr(module, "_REQUEST_TIMEOUT"):
            module._REQUEST_TIMEOUT = REPLY_SECONDS
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
        names = unittest.TestLoader().getTestCaseNames(type("", (mixin, unittest.TestCase), {}))
        # A class for each test: some write what they ask for into their class, and tests may run at once.
        return [type(mixin.__name__, (mixin, unittest.TestCase), {**facts, **self.attributes})(name) for name in names]


PRUNED = (
    "cells of the reply were evicted; nothing with holes enters the prefix tree, so the next turn finds no reply there"
)
OTHER_TEXT = (
    "the test waits up to 1,000 tokens for the model to begin a line; after rounds the reply is another text, which "
    "may do so or not"
)
KL = {"kl_div_max_samples": 4, "kl_div_thres": 0.005}
SHORT, LONG = 24, 96
"""Tokens of a reply that no round reaches, and of one that many do."""

KITS = {
    "api_contract": Kit("basic_api_contract", "BasicAPIContractMixin", model=TOY),
    "json_constrained": Kit("json_constrained", "JSONConstrainedMixin"),
    "matched_stop": Kit("matched_stop", "MatchedStopMixin", by_design={"test_finish_stop_str": OTHER_TEXT}),
    "abort_all": Kit(
        "abort_timeout",
        "AbortAllMixin",
        {"abort_all_max_new_tokens": 4000, "abort_all_num_requests": 16, "abort_all_sleep": 8},
        adapted="16 requests of 4,000 tokens, 8 s",
        model=TOY,
        alone=True,
    ),
    "decode_correctness": Kit("basic_decode_correctness", "BasicDecodeCorrectnessMixin"),
    "json_mode": Kit("json_mode", "JSONModeMixin"),
    "pause": Kit(
        "pause_generation",
        "PauseResumeInPlaceMixin",
        {"pause_num_requests": 8, "pause_max_new_tokens": 512, "pause_ignore_eos": True},
        adapted="8 requests of 512 tokens",
        model=TOY,
        alone=True,
    ),
    "cache_hit_short": Kit(
        "cache_hit",
        _turns(SHORT),
        adapt=_random_turns,
        adapted=f"4 clients, random prompts of 64 tokens, replies of {SHORT}: no round is due",
        model=TOY,
        alone=True,
    ),
    "cache_hit_long": Kit(
        "cache_hit",
        _turns(LONG),
        adapt=_random_turns,
        adapted=f"the same, replies of {LONG}: many rounds",
        by_design={"test_multiturn_cache_hit": PRUNED},
        model=TOY,
        alone=True,
    ),
    "kl_short": Kit(
        "kl_divergence",
        "KLDivergenceMixin",
        {**KL, "kl_div_prefill_max_new_tokens": SHORT, "kl_div_decode_max_new_tokens": SHORT},
        adapt=_random_prompts,
        adapted=f"4 random prompts of 96 tokens, replies of {SHORT}, threshold 0.005: no round is due",
        model=TOY,
        alone=True,
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
        model=TOY,
        alone=True,
    ),
    "radix_tree": Kit(
        "radix_cache_server",
        _method("radix_attention", "run_radix_attention_test"),
        adapt=_few_nodes,
        adapted="40 nodes of up to 48 tokens",
        model=TOY,
        alone=True,
    ),
    "regex_constrained": Kit("regex_constrained", "RegexConstrainedMixin"),
    "ebnf_constrained": Kit("ebnf_constrained", "EBNFConstrainedMixin"),
    "anthropic_messages": Kit("anthropic_messages", "AnthropicMessagesMixin"),
    "scheduler_stress": Kit("basic_scheduler_stress", "BasicSchedulerStressMixin"),
}

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
