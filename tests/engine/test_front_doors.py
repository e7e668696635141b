"""The front doors of a program: sgl.Engine, an SGLang frontend program, the openai client, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap

import pytest
from conftest import MODEL, WARM
from problems import prompt, walk

PROBLEM, ANSWER = walk(3, steps=44)
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


def test_metrics_and_server_info_report_eviction(server):
    import urllib.request

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
