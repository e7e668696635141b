"""The front doors of a program: sgl.Engine, an SGLang frontend program, the openai client, curl."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import textwrap
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MODEL, WARM
from problems import prompt
from routes import ANSWER, PLACES, PROBLEM, ROUTES

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


def test_openai_chat(server, client):
    reply = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": PROBLEM}], temperature=0, max_tokens=400
    )
    assert reply.choices[0].message.content == ANSWER
    assert server.lethe()["last_finished"]["rounds"] >= 10


def test_openai_chat_streams(client):
    stream = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": PROBLEM}], temperature=0, max_tokens=400, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == ANSWER and len(pieces) > 50


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
