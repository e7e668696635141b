"""Requests that no server with eviction may serve as asked: an error of that request, never of anybody else's.

The server's own front door refuses them. Behind it the scheduler does not rely on that: the second server here has a
front door that lets everything through.
"""

from __future__ import annotations

import json
import urllib.error

import pytest
from conftest import config
from problems import PROMPTS

SETTINGS = config(budget={"tokens": 48}, rounds={"interval": 16}, rasr={"half_life": 7})
ARGS = ("--max-total-tokens", "4096", "--kv-evict", "lethe", "--kv-evict-config", SETTINGS)
OPEN_DOOR = (
    "import lethe_sglang.engine.front as front, sys; front.check_request = lambda *args: None; "
    "import runpy; runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)
BEAM = {"temperature": 0, "max_new_tokens": 120, "beam_width": 3}


@pytest.fixture(scope="module", params=["closed", "open"])
def server(request, start):
    entry = ("-m", "sglang.launch_server") if request.param == "closed" else ("-c", OPEN_DOOR)
    server = start(*ARGS, entry=entry).wait()
    server.closed = request.param == "closed"
    server.before = [reply["text"] for reply in server.generate_all(PROMPTS, 4)]
    server.flush()
    yield server
    server.check_healthy()
    server.stop()


def error_of(server, text: str, **params) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/generate", {"text": text, "sampling_params": params})
    assert caught.value.code == 400
    return json.dumps(json.loads(caught.value.read()))


def check_others(server) -> None:
    """The scheduler lives, nothing leaks, and later requests get the replies they got before."""
    server.check_healthy()
    assert [reply["text"] for reply in server.generate_all(PROMPTS, 4)] == server.before


@pytest.mark.parametrize("kv_evict", [None, "none"])
def test_beam_search_costs_nobody_a_reply(server, kv_evict):
    params = {**BEAM, "custom_params": {"kv_evict": kv_evict}}
    if server.closed:
        assert "leave sampling_params.beam_width out" in error_of(server, PROMPTS[0], **params)
    else:
        beams = server.post("/generate", {"text": PROMPTS[0], "sampling_params": params})
        rounds = server.lethe()["rounds"]
        again = server.post("/generate", {"text": PROMPTS[0], "sampling_params": params})
        assert server.lethe()["rounds"] == rounds, "a beam was evicted from"
        assert json.dumps(beams).count('"text"') and again["text"] == beams["text"]
    check_others(server)


@pytest.mark.parametrize(
    "asked", [{"budget": 1}, {"budget": 10**30}, {"mode": {}}, {"": [[]]}, [], 7, {"budget": True}]
)
def test_an_illegal_override_is_an_error_of_that_request(server, asked):
    message = error_of(server, PROMPTS[1], max_new_tokens=8, custom_params={"kv_evict": asked})
    assert "custom_params.kv_evict" in message
    check_others(server)
