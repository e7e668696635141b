"""A live server takes a new configuration: while requests run, when it is idle, or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import config
from problems import CHAINS, WALKS

KEY = "sesame"
START = dict(
    budget={"tokens": 96},
    rounds={"interval": 16},
    lethe={"half_life": 7},
    requests={"max_budget": 4096},
    pool={"states": "all"},
    debug={"shadow": True, "record_kept": True},
)
OTHER = dict(
    policy="snapkv",
    budget={"tokens": 40},
    rounds={"interval": 8},
    retain={"sinks": 2, "recent_ratio": 0.2},
    snapkv={"window": 8},
)
FLAGS = ("--max-total-tokens", "4096", "--kv-evict", "lethe", "--kv-evict-config")


@pytest.fixture(scope="module")
def server(start):
    server = start(*FLAGS, config(**START), "--admin-api-key", KEY, key=KEY).wait()
    yield server
    server.check_healthy()
    server.stop()


@pytest.fixture(autouse=True)
def as_at_the_start(server):
    """Every test begins with an idle server in the configuration of the start."""
    server.flush()
    server.post("/kv_evict", {**START, "policy": "lethe", "retain": {"sinks": 4, "recent_ratio": 0.3}})


def refused(server, body, status=400) -> str:
    """Post what is to be refused and return the message; the running configuration stays as it is."""
    before = server.get("/kv_evict")
    with pytest.raises(urllib.error.HTTPError) as error:
        if isinstance(body, bytes):
            server._opener.open(f"{server.url}/kv_evict", data=body)
        else:
            server.post("/kv_evict", body)
    assert error.value.code == status
    assert server.get("/kv_evict") == before and server.lethe()["policy"] == before["configuration"]["policy"]
    message = json.loads(error.value.read())["error"]["message"]
    assert "\n" not in message
    return message


@contextlib.contextmanager
def in_background(server, *asked):
    """Requests that decode while the block runs, and have ended behind it."""
    with ThreadPoolExecutor(len(asked)) as pool:
        work = dict(tokens=320, ignore_eos=True)
        replies = [pool.submit(server.generate, text, kv_evict=kv_evict, **work) for text, kv_evict in asked]
        server.until(lambda report: report["requests_running"] >= len(asked))
        yield replies


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/kv_evict"), ("POST", "/kv_evict"), ("GET", "/kv_evict/requests"), ("POST", "/set_internal_state")],
)
def test_the_verb_is_authorised_as_sglangs_own_control_requests(server, method, path, key):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}{path}", headers=headers, method=method, data=b"{}")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 401


def test_nothing_to_change_is_legal_and_everything_is_told(server):
    told = server.get("/kv_evict")["configuration"]
    assert told["budget"]["tokens"] == 96 and told["retain"]["sinks"] == 4 and told["debug"]["shadow"] is True
    for nothing in ({}, told, {"budget": {"tokens": 96}}):
        assert server.post("/kv_evict", nothing) == {"changed": {}, "effective": "now", "configuration": told}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "kv_evict: not JSON at line 1"),
        (b"\xff", "kv_evict: the body is not UTF-8"),
        (b'{"rounds": {}, "rounds": {}}', 'kv_evict: key "rounds" is given twice'),
        (b"[1]", "kv_evict: got [1], expected a mapping of options"),
        ({"bugdet": {}}, "did you mean budget"),
        ({"budget": {"tokens": 5}}, "kv_evict: budget.tokens: got 5"),
        ({"policy": "leth"}, "did you mean 'lethe'"),
        ({"rounds": {"interval": 1.5}}, "kv_evict: rounds.interval: got 1.5, expected an integer >= 1"),
        (
            {"budget": {"allocation": "list", "layers": [60, 60]}},
            "budget.layers: got 2 values, but the model has 4 layers",
        ),
        ({"budget": {"allocation": "profile", "profile": "nowhere"}}, "budget.profile nowhere"),
        ({"rounds": {"interval": 8}, "debug": {"shadow": False}}, "debug.shadow: settled when the server starts"),
        ({"pool": {"states": "policy"}}, "pool.states: settled when the server starts"),
        (
            {"budget": {"tokens": 4090}, "rounds": {"when": "pressure"}},
            "budget.tokens: got 4090, with which a request at its floor holds up to 4108 tokens, but the pool has 4096",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(server, body, named):
    assert named in refused(server, body)


def test_a_smaller_budget_is_that_of_the_next_round_of_requests_that_run(server):
    alone = [
        server.generate(WALKS[i], tokens=160, kv_evict=kv, ignore_eos=True)["text"]
        for i, kv in ((1, "none"), (2, {"budget": 2048}))
    ]
    asked = [
        (WALKS[0], None),
        (CHAINS[1], None),
        (WALKS[1], "none"),
        (WALKS[2], {"budget": 2048}),
        (WALKS[3], {"budget": 60}),
    ]
    rounds = server.lethe()["rounds"]
    with in_background(server, *asked) as replies:
        server.until_rounds(rounds + 6, *replies)
        answer = server.post("/kv_evict", {"budget": {"tokens": 48}, "rounds": {"interval": 8}})
        assert answer["changed"] == {"budget.tokens": [96, 48], "rounds.interval": [16, 8]}
        assert answer["effective"] == "next round"
        server.until_rounds(server.lethe()["rounds"] + 6, *replies)
        back = server.post("/kv_evict", {"budget": {"tokens": 96}})  # the recent window grows again
        assert back["changed"] == {"budget.tokens": [48, 96]}
    replies = [reply.result() for reply in replies]
    assert [r["text"][:160] for r in replies[2:4]] == alone, "a request from which nothing is evicted went wrong"
    log = server.lethe()["kept"]
    budgets = []
    for reply in replies[:2]:
        mine = [entry for entry in log if entry["rid"] == reply["meta"]["id"]]
        tails = [entry["tail"] for entry in mine]
        assert all(later > earlier for earlier, later in itertools.pairwise(tails)), "a tail went back"
        budgets.append([max(len(layer) for layer in entry["kept"]) for entry in mine])
    for kept in budgets:  # K is 67 of 96 tokens and 33 of 48
        small = [k for k in kept if k <= 33]
        assert max(kept) == 67 == kept[-1] and small, kept
        first = kept.index(small[0])
        assert kept[first - 1] == 67 and max(small) == 33, kept
    own = [max(len(layer) for layer in entry["kept"]) for entry in log if entry["rid"] == replies[4]["meta"]["id"]]
    assert set(own) <= {60 - 29, 60 - 15}, "a request's own budget was not kept"
    server.check_healthy()


def test_limits_of_requests_follow_the_configuration(server):
    server.generate(WALKS[0], tokens=4, kv_evict={"budget": 2048})
    assert server.post("/kv_evict", {"requests": {"max_budget": 128, "allow_off": False}})["effective"] == "now"
    for asked in ({"budget": 2048}, "none"):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.generate(WALKS[0], tokens=4, kv_evict=asked)
        assert error.value.code == 400
    server.generate(WALKS[0], tokens=4, kv_evict={"budget": 128})
    assert server.get("/kv_evict")["configuration"]["requests"] == {"allow_off": False, "max_budget": 128}
    server.post("/kv_evict", {"requests": {"max_budget": 256}})  # wider than before: the front must let it through
    server.generate(WALKS[0], tokens=4, kv_evict={"budget": 256})


def test_a_budget_that_no_request_can_reach_is_taken_and_said(server):
    assert server.lethe()["reach"]["acts"]
    server.post("/kv_evict", {"budget": {"tokens": 4096}})
    found = server.lethe()["reach"]
    assert not found["acts"] and found["first_round"] >= found["longest"] == server.lethe()["reach"]["longest"]
    assert "with budget.tokens 4096 a request is first evicted from at" in server.log.read_text(errors="replace")


def test_a_policy_changes_on_an_idle_server_only(server):
    with in_background(server, (WALKS[0], None)):
        message = refused(server, {"policy": "h2o", "rounds": {"interval": 8}})
        assert "policy: changes on an idle server only, and 1 requests are running, 0 waiting; wait" in message
        assert "retain.sinks: changes on an idle" in refused(server, {"retain": {"sinks": 1}})
    changed = server.post("/kv_evict", {"policy": "h2o"})["changed"]
    assert changed["policy"] == ["lethe", "h2o"] and changed["lethe.half_life"] == [7, None]


def test_a_reconfigured_server_answers_as_one_that_was_started_so(start, server):
    server.generate_all(WALKS[:4], 4, tokens=90)
    server.flush()
    answer = server.post("/kv_evict", OTHER)
    assert answer["effective"] == "now" and answer["changed"]["snapkv.window"] == [None, 8]
    debug = {"debug": START["debug"], "requests": START["requests"]}
    fresh = start(
        "--max-total-tokens", "4096", "--kv-evict", "snapkv", "--kv-evict-config", config(**OTHER, **debug)
    ).wait()
    for text in (WALKS[0], CHAINS[2]):
        pair = [s.generate(text, tokens=150, ignore_eos=True, logprobs=True) for s in (server, fresh)]
        assert pair[0]["ids"] == pair[1]["ids"] and pair[0]["logprobs"] == pair[1]["logprobs"]
        assert min(server.lethe()["last_finished"]["evicted_per_layer"]) > 80
    before, there = ([(e["tail"], e["kept"]) for e in s.lethe()["kept"]] for s in (server, fresh))
    assert len(there) > 20 and before[-len(there) :] == there
    message = refused(fresh, {"policy": "lazy"})  # its pool carries what snapkv needs, and positions for the checks
    assert (
        "policy: lazy needs states that the pool's cells do not carry (memory)" in message
        and "pool.states: all" in message
    )
    fresh.check_healthy()
    fresh.stop()


def test_records_are_read_and_not_taken_and_server_info_only_reads(server):
    before = server.get("/kv_evict/requests")["newest"]
    rids = [server.generate(WALKS[i], tokens=60)["meta"]["id"] for i in range(3)]
    found = server.get(f"/kv_evict/requests?after={before}")
    assert [r["rid"] for r in found["requests"]] == rids and found["newest"] == before + 3
    assert found == server.get(f"/kv_evict/requests?after={before}")
    assert [r["number"] for r in server.get(f"/kv_evict/requests?after={before + 2}")["requests"]] == [before + 3]
    assert server.get(f"/kv_evict/requests?after={found['newest']}") == {"requests": [], "newest": before + 3}
    for wrong in ("-1", "x", "1e9", ""):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.get(f"/kv_evict/requests?after={wrong}")
        assert error.value.code == 400
    assert server.lethe() == server.lethe()
