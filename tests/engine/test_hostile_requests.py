"""What slips past the server's front door is an error of that request, never of anybody else's.

The front door answers HTTP 400 (``test_serving``). The scheduler does not rely on it: the front door of the server here
lets everything through. Later replies are compared, because a corrupted cache shows in answers first.
"""

from __future__ import annotations

import json
import urllib.error

import pytest
from conftest import config
from ending import under_load
from problems import PROMPTS

from lethe_bench.soak.ends import GONE, kill, scheduler

SETTINGS = config(budget={"tokens": 48}, rounds={"interval": 16}, lethe={"half_life": 7})
OPEN_DOOR = (
    "import lethe_sglang.engine.doors as doors, runpy; doors.check_request = doors.open_to = lambda *args: None; "
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)


def replies(server) -> list[str]:
    return [reply["text"] for reply in server.generate_all(PROMPTS[:6], 6, tokens=90)]


@pytest.fixture(scope="module")
def server(start):
    args = ("--max-total-tokens", "4096", "--kv-evict", "lethe", "--kv-evict-config", SETTINGS)
    server = start(*args, entry=("-c", OPEN_DOOR)).wait()
    server.before = replies(server)
    yield server
    server.stop()


@pytest.mark.parametrize("kv_evict", [None, "none"])
def test_a_beam_is_never_evicted_from_and_costs_nobody_a_reply(server, kv_evict):
    params = {"temperature": 0, "max_new_tokens": 70, "beam_width": 3, "custom_params": {"kv_evict": kv_evict}}
    rounds = server.lethe()["rounds"]
    beams = [server.post("/generate", {"text": PROMPTS[0], "sampling_params": params}) for _ in range(2)]
    assert beams[0]["text"] == beams[1]["text"] and server.lethe()["rounds"] == rounds
    server.check_healthy()
    assert replies(server) == server.before


def test_an_illegal_override_is_an_error_of_that_request(server):
    for asked in ({"budget": 1}, {"budget": 10**30}, {"mode": {}}, {"": [[]]}, [], 7, {"budget": True}):
        params = {"max_new_tokens": 8, "custom_params": {"kv_evict": asked}}
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/generate", {"text": PROMPTS[1], "sampling_params": params})
        assert caught.value.code == 400
        assert "custom_params.kv_evict" in json.dumps(json.loads(caught.value.read())), asked
    server.check_healthy()
    assert replies(server) == server.before


def test_a_scheduler_that_is_killed_under_load_takes_its_server_along(server, monkeypatch):
    server.check_healthy()
    outcome, status = under_load(server, monkeypatch, lambda: kill(scheduler(server.pid), "SIGKILL"))
    assert outcome == GONE and status not in (None, 0)
