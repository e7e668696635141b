"""Features of SGLang beside eviction, all at once: two servers with the same options, stock and one that evicts.

The same mixed batch goes to both. Where nothing is evicted (a budget above every length) answers are stock's to the
token, before and after others were evicted from; where the server's own budget evicts, what the feature promises still
holds. ``HttpServerEngineAdapter`` starts both servers.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from conftest import MODEL, WARM
from problems import CHAINS, WALKS
from safetensors.torch import load_file, save_file
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from lethe_bench.servers import some_free_port

BUDGET, INTERVAL, ABOVE = 32, 16, {"budget": 2048}
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|endoftext|>")
PIECES = (*MARKS, "{", "}", '"', ":", "[", "]", " ", "\n")
"""Tokens that the model's vocabulary has room for: its own know neither JSON nor the marks of Qwen3."""

AID = {"PYTHONPATH": str(Path(__file__).with_name("neighbours_on_cpu"))}
LAUNCH = """
import json, sys
import sglang.srt.entrypoints.http_server_engine as http_server_engine
from sglang.srt.plugins import load_plugins
if __name__ == "__main__":
    load_plugins()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http_server_engine.HttpServerEngineAdapter(port=port, **json.loads(sys.argv[-1])).process.join()
"""


def rewritten(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model with tokens for JSON and for thinking, and one with other weights."""
    folder = tmp_path_factory.mktemp("model")

    def tokens(content):
        words = content["model"]["vocab"]
        for number, piece in enumerate(PIECES, start=48):
            del words[f"<unused{number}>"]
            words[piece] = number
        marks = [
            dict(content["added_tokens"][0], id=48 + n, content=PIECES[n], special=False) for n in range(len(MARKS))
        ]
        content["added_tokens"] += marks

    shutil.copytree(MODEL, folder / "model")
    rewritten(folder / "model" / "tokenizer.json", tokens)
    shutil.copytree(folder / "model", folder / "other")
    weights = load_file(MODEL / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {name: w + 0.3 * w.std() * torch.randn_like(w) for name, w in weights.items()},
        folder / "other" / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of rank 4 on all attention projections."""
    folder = tmp_path_factory.mktemp("adapter")
    shapes = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128)}
    torch.manual_seed(1)
    weights = {}
    for layer in range(4):
        for name, (wide, out) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(4, wide) / wide**0.5
            weights[f"{at}.lora_B.weight"] = 0.3 * torch.randn(out, 4)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(shapes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def servers(start, tmp_path_factory, model, adapter):
    """Stock SGLang and one that evicts, with the same neighbours; the latter's gRPC port, too."""
    program = tmp_path_factory.mktemp("launch") / "launch.py"
    program.write_text(LAUNCH)
    options = {
        "model_path": str(model / "model"),
        "max_total_tokens": 3000,
        "sleep_on_idle": True,
        "lora_paths": {"a": str(adapter)},
        "lora_backend": "torch_native",
        "reasoning_parser": "qwen3",
        "tool_call_parser": "qwen25",
        "enable_strict_thinking": True,
        "constrained_json_disable_any_whitespace": True,
        "enable_custom_logit_processor": True,
        "enable_priority_scheduling": True,
        "schedule_policy": "lof",
        "max_running_requests": 12,
    }
    evicting = {
        "kv_evict": "lethe",
        "kv_evict_config": {
            "budget": {"tokens": BUDGET},
            "rounds": {"interval": INTERVAL},
            "lethe": {"half_life": 7},
            "requests": {"max_budget": 2048},
            "debug": {"shadow": True},
        },
        "grpc_port": some_free_port(),
    }
    both = [start(json.dumps(options | more), entry=(str(program),), env=AID) for more in ({}, evicting)]
    for server in both:
        server.wait()
    both[1].grpc_port = evicting["grpc_port"]
    yield both
    both[1].check_healthy()
    assert both[1].lethe()["shadow"]["checks"] > 1000


@pytest.fixture
def stock(servers):
    return servers[0]


@pytest.fixture
def server(servers):
    return servers[1]


LIST = {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{5}$"}, "minItems": 9, "maxItems": 9}
GRAMMARS = {
    "regex": "([a-z]=[0-9];){24}",
    "json_schema": json.dumps(LIST),
    "ebnf": 'root ::= step{24}\nstep ::= [a-z] ">" [a-z] ","',
}
WORDS = {"type": "object", "properties": {"words": LIST}, "required": ["words"], "additionalProperties": False}
BLANKS = ("60", "61")
"""Tokens of a blank and of the end of a line: a tool's schema lets any number of them through."""
NEVER = [13, 14]
"""Tokens that a custom logit processor does not let through: the digits 1 and 2."""


def fits(kind: str, text: str) -> bool:
    """Whether a text is of the grammar of this kind."""
    if kind == "json_schema":
        return len(words := json.loads(text)) == 9 and all(re.fullmatch("[a-z]{5}", word) for word in words)
    return bool(re.fullmatch(GRAMMARS["regex"] if kind == "regex" else "([a-z]>[a-z],){24}", text))


def native(text: str, kv_evict=None, tokens: int = 100, lora: str | None = None, **params) -> tuple[str, dict]:
    """A greedy request to ``/generate``: its path and its body."""
    custom = {**params.pop("custom_params", {}), **({} if kv_evict is None else {"kv_evict": kv_evict})}
    params = {"temperature": 0, "max_new_tokens": tokens, "custom_params": custom, **params}
    return "/generate", {"text": text, "sampling_params": params, "lora_path": lora}


def chat(kv_evict=None, **more) -> tuple[str, dict]:
    """A greedy request to ``/v1/chat/completions`` that thinks for 40 tokens."""
    custom = {"thinking_budget": 40, **({} if kv_evict is None else {"kv_evict": kv_evict})}
    messages = [{"role": "user", "content": "i>e;t>o;e>i;o>t;?t40"}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 200, "custom_params": custom}
    return "/v1/chat/completions", body | more


def mixed(kv_evict) -> dict[str, tuple[str, dict]]:
    """One request of each kind."""
    answer = {"type": "json_schema", "json_schema": {"name": "answer", "schema": LIST}}
    say = {"type": "function", "function": {"name": "say", "parameters": WORDS, "strict": True}}
    path, processed = native(WALKS[3], kv_evict, ignore_eos=True, custom_params={"token_ids": NEVER})
    processed["custom_logit_processor"] = DisallowedTokensLogitsProcessor.to_str()
    return {
        **{
            f"lora {name} {i}": native(WALKS[i], kv_evict, lora=name, ignore_eos=True)
            for name in (None, "a")
            for i in (0, 1)
        },
        **{kind: native(CHAINS[0], kv_evict, 160, **{kind: grammar}) for kind, grammar in GRAMMARS.items()},
        "processor": (path, processed),
        "answer": chat(kv_evict, response_format=answer),
        "tool": chat(kv_evict, tools=[say], tool_choice="required", logit_bias=dict.fromkeys(BLANKS, -100)),
    }


def ask(server, *requests: tuple[str, dict]) -> list[dict]:
    """Put requests at once; returns their replies."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: server.post(*request), requests))


def rounds(reply: dict) -> int:
    return (reply["meta_info"] if "meta_info" in reply else reply["usage"])["kv_evict"]["rounds"]


def said(reply: dict):
    """What a reply says, without ids and times."""
    if "output_ids" in reply:
        return reply["output_ids"]
    message = reply["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return message["reasoning_content"], message["content"], calls


@pytest.fixture(scope="module")
def answers(servers):
    """Replies to the mixed batch by name: stock's, those without eviction, and the evicted ones."""
    stock, server = servers

    def batch(one, kv_evict):
        requests = mixed(kv_evict)
        return dict(zip(requests, ask(one, *requests.values()), strict=True))

    expected, above, evicted, again = (
        batch(stock, None),
        batch(server, ABOVE),
        batch(server, None),
        batch(server, ABOVE),
    )
    for name, reply in expected.items():
        assert said(above[name]) == said(reply) == said(again[name]), name
        assert rounds(above[name]) == rounds(again[name]) == 0
    few = {name: rounds(reply) for name, reply in evicted.items() if rounds(reply) < 3}
    assert not few, f"hardly evicted from: {few}"
    return expected, evicted


@pytest.mark.proves("HttpServerEngineAdapter")
def test_the_adapter_has_started_a_server_that_evicts(stock, server):
    assert server.lethe()["policy"] == "lethe" and "lethe" not in stock.get("/server_info")["internal_states"][0]
    assert "Launch HttpServerEngineAdapter at" in server.log.read_text(errors="replace")


@pytest.mark.proves("LoRA")
def test_adapters_answer_as_in_stock_beside_the_base_model(answers, server, adapter):
    _, evicted = answers
    for replies in answers:
        for i in (0, 1):
            assert said(replies[f"lora None {i}"]) != said(replies[f"lora a {i}"]), "the adapter changes nothing"
    assert server.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(adapter)})["success"]
    (again,) = ask(server, native(WALKS[0], None, lora="b", ignore_eos=True))
    assert said(again) == said(evicted["lora a 0"])
    assert server.post("/unload_lora_adapter", {"lora_name": "b"})["success"]


@pytest.mark.proves("constrained decoding")
@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_grammar_holds_over_rounds(answers, kind):
    for replies in answers:
        assert fits(kind, replies[kind]["text"]), replies[kind]["text"]


@pytest.mark.proves("constrained decoding", "reasoning parsers")
def test_a_schema_holds_after_reasoning(answers):
    for replies in answers:
        thought, text, _ = said(replies["answer"])
        assert len(thought) >= 38 and fits("json_schema", text), (thought, text)


@pytest.mark.proves("tool parsers")
def test_a_tool_is_called_after_reasoning(answers):
    for replies in answers:
        thought, _, calls = said(replies["tool"])
        assert len(thought) >= 38 and calls and {call["name"] for call in calls} == {"say"}, replies["tool"]
        assert fits("json_schema", json.dumps(json.loads(calls[0]["arguments"])["words"]))


@pytest.mark.proves("custom logit processors")
def test_a_processor_is_obeyed(answers):
    for replies in answers:
        assert not set(said(replies["processor"])) & set(NEVER)
    assert set(said(answers[1]["lora None 0"])) & set(NEVER), "these tokens would not have come anyway"


@pytest.mark.proves("priority scheduling")
def test_a_high_priority_preempts_and_nobody_loses_anything(stock, server):
    texts = [*WALKS, *CHAINS[:4]]
    expected = list(map(said, ask(stock, *(native(text, tokens=120, ignore_eos=True) for text in texts[1::2]))))
    low = [native(text, "none" if n % 2 else None, 120, ignore_eos=True) for n, text in enumerate(texts)]
    for _, body in low:
        body["priority"] = 0
    high = native(CHAINS[5], None, 70, ignore_eos=True)
    high[1]["priority"] = 100
    with ThreadPoolExecutor(len(low)) as pool:
        waiting = [pool.submit(server.post, *request) for request in low]
        while server.lethe()["requests_running"] < len(low):
            assert not any(reply.done() for reply in waiting)
            time.sleep(0.02)
        (first,) = ask(server, high)
        replies = [reply.result() for reply in waiting]
    assert rounds(first) >= 1 and first["meta_info"]["num_retractions"] == 0
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) >= 1
    assert list(map(said, replies[1::2])) == expected
    assert min(map(rounds, replies[::2])) >= 3


@pytest.mark.proves("sessions")
def test_a_session_goes_on_from_an_evicted_turn(stock, server):
    def turns(one, kv_evict, session):
        one.post("/open_session", {"capacity_of_str_len": 4000, "session_id": session})
        path, body = native(WALKS[0], kv_evict, 80, ignore_eos=True)
        first = one.post(path, body | {"session_params": {"id": session}})
        path, body = native(CHAINS[0], kv_evict, 60, ignore_eos=True)
        second = one.post(path, body | {"session_params": {"id": session, "rid": first["meta_info"]["id"]}})
        one.post("/close_session", {"session_id": session})
        return first, second

    asked = ((stock, None, "s"), (server, ABOVE, "t"), (server, None, "u"))
    with ThreadPoolExecutor(3) as pool:
        expected, above, evicted = pool.map(lambda one: turns(*one), asked)
    assert list(map(said, above)) == list(map(said, expected))
    assert rounds(evicted[0]) >= 3
    whole = WALKS[0] + evicted[0]["text"] + CHAINS[0].removeprefix("<bos>")
    (reply,) = ask(server, native(whole, None, 60, ignore_eos=True))
    assert said(reply) == said(evicted[1]) and rounds(reply) == rounds(evicted[1]) >= 1


def called(server, body: dict) -> dict:
    """OpenAI's chat over SGLang's gRPC server: the JSON of its answer."""
    text = json.dumps(body).encode()
    size = bytes([len(text) & 127 | 128, len(text) >> 7])  # a message with the text in its first field
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        answer = channel.unary_unary("/sglang.runtime.v1.SglangService/ChatComplete")(b"\x0a" + size + text)
    return json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])


@pytest.mark.proves("gRPC beside HTTP (--grpc-port)")
def test_grpc_evicts_as_http_does(server):
    (path, body), (_, none), (_, wrong) = (chat(kv_evict, max_tokens=90) for kv_evict in (None, "none", {"budget": 1}))
    (expected,) = ask(server, (path, body))
    reply = called(server, body)
    assert said(reply) == said(expected) and rounds(reply) == rounds(expected) >= 2
    assert "kv_evict" not in called(server, none)["usage"]
    try:
        told = json.dumps(called(server, wrong))
    except grpc.RpcError as error:
        told = error.details()
    assert "custom_params.kv_evict.budget" in told


@pytest.mark.proves("weight updates")
def test_weights_change_under_requests_that_run(stock, server, model):
    alone, long = native(WALKS[0], ABOVE, 60, ignore_eos=True), "([a-z]=[0-9];){60}"
    (before,) = ask(server, alone)
    try:
        assert stock.post("/update_weights_from_disk", {"model_path": str(model / "other")})["success"]
        (expected,) = ask(stock, native(WALKS[0], None, 60, ignore_eos=True))
        assert said(expected) != said(before), "the other weights say the same"
        done = server.lethe()["rounds"]
        with ThreadPoolExecutor(5) as pool:
            waiting = [pool.submit(server.post, *native(text, None, 240, ignore_eos=True)) for text in WALKS[:4]]
            follows = pool.submit(server.post, *native(WALKS[4], None, 300, regex=long))
            server.until_rounds(done + 8, *waiting, follows)
            with server.paused("retract"):
                assert not any(reply.done() for reply in [*waiting, follows])
                assert server.post("/update_weights_from_disk", {"model_path": str(model / "other")})["success"]
            replies = [reply.result() for reply in waiting]
        assert re.fullmatch(long, follows.result()["text"]) and rounds(follows.result()) >= 2, "a grammar holds"
        assert min(map(rounds, replies)) >= 5 and {r["meta_info"]["completion_tokens"] for r in replies} == {240}
        assert said(*ask(server, alone)) == said(expected)
    finally:
        for each in (stock, server):
            assert each.post("/update_weights_from_disk", {"model_path": str(model / "model")})["success"]
    assert said(*ask(server, alone)) == said(before)


@pytest.mark.proves("memory release and resume")
def test_memory_is_released_and_taken_again(server):
    both = [native(WALKS[1], kv_evict, 60, ignore_eos=True) for kv_evict in (ABOVE, None)]
    before = list(map(said, ask(server, *both)))
    server.flush()
    server.post("/release_memory_occupation", {})
    server.post("/resume_memory_occupation", {})
    assert list(map(said, ask(server, *both))) == before


@pytest.mark.proves("sgl.Engine and SGLang's offline_throughput")
def test_sglangs_offline_benchmark_evicts(tmp_path):
    turns = [{"conversations": [{"value": text}, {"value": "a"}]} for text in WALKS[:4]]
    (tmp_path / "questions.json").write_text(json.dumps(turns))
    out = WARM.run(
        [
            *("-m", "lethe_sglang.plugin", "sglang.benchmark.offline_throughput", "--model-path", MODEL),
            *("--dataset-path", tmp_path / "questions.json", "--num-prompts", "4", "--sharegpt-output-len", "100"),
            *("--skip-warmup", "--max-total-tokens", "2048", "--decode-log-interval", "1"),
            *("--kv-evict", "lethe", "--kv-evict-budget", "32", "--kv-evict-config", '{"rounds": {"interval": 16}}'),
        ]
    )
    assert out.returncode == 0 and "Total generated tokens" in out.stdout, out.stdout[-2000:] + out.stderr[-3000:]
    assert re.search("lethe rounds: [1-9]", out.stdout + out.stderr)
