"""The front doors of a program: sgl.Engine, an SGLang frontend program, the openai client, curl."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import textwrap
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MODEL, WARM
from problems import prompt
from promtool import lint
from routes import ANSWER, PLACES, PROBLEM, ROUTES

from lethe_sglang.cli import top
from lethe_sglang.engine.metrics import NAMES, PREFIX

CPU_DEMO = ("--kv-evict", "lethe", "--kv-evict-config", "cpu-demo")


@pytest.fixture(scope="module")
def server(start):
    server = start("--enable-metrics", "--page-size", "16", *CPU_DEMO).wait()
    yield server
    server.check_healthy()


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.mark.proves("page sizes", "chat, completions, streaming, logprobs, frontend programs")
def test_openai_chat(server, client):
    reply = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": PROBLEM}], temperature=0, max_tokens=400
    )
    assert reply.choices[0].message.content == ANSWER
    assert server.lethe()["last_finished"]["rounds"] >= 10


@pytest.mark.proves("chat, completions, streaming, logprobs, frontend programs")
def test_openai_chat_streams(client):
    stream = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": PROBLEM}], temperature=0, max_tokens=400, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == ANSWER and len(pieces) > 50


@pytest.mark.proves("chat, completions, streaming, logprobs, frontend programs")
def test_openai_completions_with_logprobs_and_custom_params(server, client):
    reply = client.completions.create(
        model="m",
        prompt=prompt(PROBLEM),
        temperature=0,
        max_tokens=120,
        logprobs=1,
        extra_body={"custom_params": {"kv_evict": {"mode": "none"}}},
    )
    assert ANSWER.startswith(reply.choices[0].text.strip())
    assert len(reply.choices[0].logprobs.token_logprobs) == 120
    assert server.lethe()["last_finished"]["rounds"] == 0, "mode none was evicted from"


def test_openai_bad_override_is_a_400(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=r"custom_params\.kv_evict\.budget"):
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": PROBLEM}],
            max_tokens=4,
            extra_body={"custom_params": {"kv_evict": {"budget": 1}}},
        )


def test_curl(server):
    assert shutil.which("curl")
    body = {"model": "m", "messages": [{"role": "user", "content": PROBLEM}], "temperature": 0, "max_tokens": 400}
    out = subprocess.run(
        [
            "curl",
            "-s",
            f"{server.url}/v1/chat/completions",
            "-H",
            "content-type: application/json",
            "-d",
            json.dumps(body),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert json.loads(out.stdout)["choices"][0]["message"]["content"] == ANSWER


def asking(path: str, kv_evict) -> dict:
    """A route's request with this override in its body."""
    body = json.loads(json.dumps(ROUTES[path]))
    home = body
    for key in PLACES.get(path, ()):
        home = home[key]
    home["custom_params"] = {"kv_evict": kv_evict}
    return body


def answered(server, path: str, body: dict | bytes, **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}{path}", data, headers), timeout=120
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def pruned_by(server, *requests) -> int:
    """Put requests (path, body, headers) at once; returns how many of them were evicted from."""
    before = server.lethe()["requests_pruned"]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda asked: answered(server, asked[0], asked[1], **asked[2]), requests))
    assert [status for status, _ in answers] == [200] * len(requests), answers
    return server.lethe()["requests_pruned"] - before


def test_an_override_is_honoured_on_every_route_that_generates(server):
    assert pruned_by(server, *((path, body, {}) for path, body in ROUTES.items())) == len(ROUTES)
    assert pruned_by(server, *((path, asking(path, "none"), {}) for path in ROUTES)) == 0
    named = itertools.cycle(({"X_KV_Evict": "none"}, {"X_Request_Id_KV_Evict": '{"budget": 384}'}))
    assert pruned_by(server, *((path, ROUTES[path], header) for path, header in zip(ROUTES, named, strict=False))) == 0


JUNK = (
    *(1, -1, 10**30, 512.5, True, [], [[[]]], {"budget": {}}, {"budget": "9" * 5000}, {"budget": 1}, {"mode": []}),
    *({"\u2028": 1}, {"k" * 5000: 1}, "x" * 5000, {"mode": "none", "budget": 96}, {"budget": 385}),
    json.loads("[" * 200 + "]" * 200),
)


def test_junk_is_a_400_on_every_route_and_nobody_is_hurt(server):
    for path in ROUTES:
        for number, junk in enumerate(JUNK):
            status, text = answered(server, path, {**asking(path, junk), "stream": number % 2 == 0})
            assert (status, len(text) < 2000) == (400, True), (path, junk, text)
            assert "kv_evict" in text or junk == 10**30, (path, junk, text)
        for raw in (b'{"custom_params": {"kv_evict": {"budget": NaN}}}', b'{"custom_params": {"kv_evict": "\xff"}}'):
            assert answered(server, path, raw)[0] == 400
        for value in ("off", "{", '{"budget": 1}', "9" * 5000, "\xff"):
            status, text = answered(server, path, ROUTES[path], X_KV_Evict=value)
            assert status == 400 and "X-KV-Evict" in text, (path, value, text)
        assert answered(server, path, asking(path, "none"), X_KV_Evict="on")[0] == 400
    assert pruned_by(server, ("/generate", ROUTES["/generate"], {})) == 1


def test_metrics_and_server_info_report_eviction(server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    for name in ("kv_evict_rounds_total", "kv_evict_blocks_freed_total", "kv_evict_evicted_cells_total"):
        assert f"sglang:{name}" in text
    report = server.lethe()
    assert report["policy"] == "lethe" and report["layers"] == [48] * 4
    size = report["auxiliary_bytes"]
    cells = size["pool"] // (2 * 64 * 4)
    assert size["states"] == 4 * cells, "lethe declares one state: 4 bytes a cell"
    assert size["table"] < 0.01 * size["pool"]
    assert "Auxiliary memory" in server.log.read_text(errors="replace"), "not reported at start"


def test_what_is_scraped_is_what_the_ledger_says(server):
    server.generate(prompt(PROBLEM), tokens=100)
    page, report = top.scrape(server.url), server.lethe()
    found = {name.removeprefix(PREFIX): page[name] for name in page.samples}
    assert report["rounds"] >= 2 and report["blocks_freed_total"] >= 16
    assert found["rounds_total"] == report["rounds"]
    assert found["blocks_freed_total"] == report["blocks_freed_total"]
    assert found["requests_pruned_total"] == report["requests_pruned"]
    assert found["requests_retracted_total"] == report["requests_retracted"]
    assert page.by(f"{PREFIX}evicted_cells_total", "layer_group") == {"0-3": sum(report["tokens_evicted_per_layer"])}
    assert found["round_seconds_count"] == report["round_launches"]
    assert found["score_mass_dropped_ratio_count"] == report["rounds"] and 0 < report["score_mass_dropped"] < 1
    assert found["round_seconds_sum"] == pytest.approx(report["round_seconds"], abs=1e-6)
    assert found["budget_tokens"] == report["budget_tokens"] == 48 and found["layers"] == 4
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        families = re.split("(?=^# HELP )", response.read().decode(), flags=re.MULTILINE)
    ours = "".join(family for family in families if family.startswith(f"# HELP {PREFIX}"))
    assert lint(ours) == [] and all(f"# HELP {name} " in ours for name in NAMES)


def at_once(*calls) -> list:
    """What calls return that are made at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_every_native_reply_says_what_eviction_did_to_it(server):
    body = {"text": prompt(PROBLEM), "sampling_params": {"temperature": 0, "max_new_tokens": 120, "n": 2}}
    told, short, none, streamed, both = at_once(
        lambda: server.generate(prompt(PROBLEM), tokens=120)["meta"],
        lambda: server.generate(prompt(PROBLEM), tokens=5)["meta"],
        lambda: server.generate(prompt(PROBLEM), tokens=120, kv_evict="none")["meta"],
        lambda: server.post("/generate", {**body, "stream": True})["text"],
        lambda: server.post("/generate", body),
    )
    records = {record["rid"]: record for record in server.get("/kv_evict/requests")["requests"]}
    record = records[told["id"]]
    assert told["kv_evict"] == {
        "rounds": record["rounds"],
        "tokens_evicted": sum(record["evicted_per_layer"]) / 4,
        "tokens_held": told["kv_evict"]["tokens_held"],
        "share": 48,
    }
    assert record["rounds"] >= 2 and record["evicted_per_layer"][0] > 30
    assert len(PROBLEM) + 32 <= told["kv_evict"]["tokens_held"] <= record["held_peak"] < record["stock_peak"]
    pages = -(-(short["prompt_tokens"] + 5) // 16) * 16
    assert short["kv_evict"] == {"rounds": 0, "tokens_evicted": 0.0, "tokens_held": pages, "share": None}
    assert "kv_evict" not in none
    chunks = [json.loads(line[6:])["meta_info"] for line in streamed.split("\n\n") if line.startswith("data: {")]
    last = [chunk for chunk in chunks if chunk["finish_reason"]]
    assert len(last) == 2 < len(chunks) and [chunk for chunk in chunks if "kv_evict" in chunk] == last
    for meta in (*last, *(reply["meta_info"] for reply in both)):
        assert meta["kv_evict"] == told["kv_evict"] and meta["completion_tokens"] == 120


def test_an_aborted_request_says_what_had_happened_to_it(server):
    body = {"text": prompt(PROBLEM), "rid": "gone", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, "/generate", body)
        while server.lethe()["requests_running"] == 0:
            assert not reply.done()
        server.post("/abort_request", {"rid": "gone"})
        told = reply.result()["meta_info"]
    assert told["finish_reason"]["type"] == "abort" and told["kv_evict"]["tokens_held"] >= len(PROBLEM)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_openai_usage_says_what_eviction_did(client, route):
    create = (client.chat.completions if route == "chat" else client.completions).create
    asked = {"messages": [{"role": "user", "content": PROBLEM}]} if route == "chat" else {"prompt": prompt(PROBLEM)}
    asked |= {"model": "m", "temperature": 0, "max_tokens": 120}

    def streamed(**more):
        stream = create(**asked, **more, stream=True, stream_options={"include_usage": True})
        *chunks, usage = [chunk.usage for chunk in stream]
        assert chunks and not any(chunks)
        return usage

    none = {"extra_body": {"custom_params": {"kv_evict": "none"}}}
    one, two, none, *streams = at_once(
        lambda: create(**asked).usage,
        lambda: create(**asked, n=2).usage,
        lambda: create(**asked, **none).usage,
        streamed,
        lambda: streamed(n=2),
    )
    assert one.kv_evict["rounds"] >= 2 and one.kv_evict["share"] == 48
    assert two.kv_evict == [one.kv_evict] * 2 and not hasattr(none, "kv_evict")
    assert [usage.kv_evict for usage in streams] == [one.kv_evict, two.kv_evict]
    assert [usage.completion_tokens for usage in streams] == [120, 240]


@pytest.mark.proves("chat, completions, streaming, logprobs, frontend programs")
def test_an_sglang_frontend_program(server):
    program = textwrap.dedent(f"""
        import sglang as sgl

        @sgl.function
        def solve(s, problem):
            s += "<bos>" + problem + "|"
            s += sgl.gen("chain", max_tokens=400, temperature=0)

        @sgl.function
        def branch(s, problem):
            s += "<bos>" + problem + "|"
            forks = s.fork(2)
            for f in forks:
                f += sgl.gen("part", max_tokens=150, temperature=0)
            s["parts"] = [f["part"] for f in forks]

        @sgl.function
        def choose(s, problem):
            s += "<bos>" + problem + "|"
            s += sgl.select("first", choices=["{ANSWER[:3]}", "zzz"])

        sgl.set_default_backend(sgl.RuntimeEndpoint("{server.url}"))
        assert solve.run(problem="{PROBLEM}")["chain"] == "{ANSWER}"
        parts = branch.run(problem="{PROBLEM}")["parts"]
        assert parts[0] == parts[1] and "{ANSWER}".startswith(parts[0]) and len(parts[0]) > 100, parts
        assert choose.run(problem="{PROBLEM}")["first"] == "{ANSWER[:3]}"
        print("frontend ok")
    """)
    out = WARM.run(["-c", program])
    assert "frontend ok" in out.stdout, out.stdout[-2000:] + out.stderr[-3000:]


@pytest.mark.proves("sgl.Engine and SGLang's offline_throughput")
def test_offline_engine(tmp_path):
    program = tmp_path / "offline.py"
    program.write_text(
        textwrap.dedent(f"""
        import sglang as sgl

        if __name__ == "__main__":
            engine = sgl.Engine(
                model_path="{MODEL}", max_total_tokens=2048, disable_radix_cache=True, page_size=8,
                kv_evict="lethe", kv_evict_config={{"rounds": {{"interval": 16}}, "lethe": {{"half_life": 7}}}},
                kv_evict_budget=48,
            )
            try:
                out = engine.generate("{prompt(PROBLEM)}", {{"temperature": 0, "max_new_tokens": 300}})
                info = engine.get_server_info()["internal_states"][0]["lethe"]
                assert info["rounds"] > 5 and info["budget_tokens"] == 48, info
                assert min(info["tokens_evicted_per_layer"]) > 100, info
                assert out["meta_info"]["completion_tokens"] > 100, out
                print("engine ok")
            finally:
                engine.shutdown()
    """)
    )
    out = WARM.run([program])
    assert "engine ok" in out.stdout, out.stdout[-2000:] + out.stderr[-3000:]
