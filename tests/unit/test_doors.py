"""How a request says how it wants to be treated: in its body or a header, on any route, and nothing that hurts."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_sglang.config import (
    ConfigError,
    EvictionConfig,
    RequestOverride,
    from_mapping,
    parse_override,
    parse_request,
)

doors = pytest.importorskip("lethe_sglang.engine.doors")
from fastapi import FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

from lethe_sglang.engine.entrypoints import EvictionRequest  # noqa: E402

CONFIG = from_mapping({"budget": {"tokens": 100}, "requests": {"max_budget": 400}})


def manager(config=CONFIG, preferred=None):
    args = SimpleNamespace(_lethe=EvictionRequest(config=config, from_cli=False))
    return SimpleNamespace(server_args=args, context_len=4096, preferred_sampling_params=preferred)


def headers(**named) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in named.items()]


def heard(body=None, **named):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return doors.override_of(headers(**named), text, manager())


NONE = {"custom_params": {"kv_evict": "none"}}


@pytest.mark.parametrize(
    "body",
    [
        NONE,
        {"sampling_params": NONE},
        {"instances": [], "parameters": {"sampling_params": NONE}},
        {"model": "m", "options": NONE},
        {**NONE, "sampling_params": {"custom_params": {"kv_evict": {"mode": "none"}}}},
    ],
)
def test_an_override_is_heard_wherever_a_route_has_its_parameters(body):
    assert heard(body) == "none"


@pytest.mark.parametrize("name", doors.HEADERS)
def test_an_override_is_heard_in_a_header_and_in_the_one_that_passes_sglangs_routers(name):
    assert heard({}, **{name: "none"}) == "none"
    assert heard({}, **{name: ' {"budget": 96} '}) == {"budget": 96}
    assert name == "X-KV-Evict" or name.lower().startswith("x-request-id-")


@pytest.mark.parametrize(
    "body",
    [{}, {"custom_params": None}, {"custom_params": {"kv_evict": None}}, b"", b"[", b"kv_evict", [{"kv_evict": 1}]],
)
def test_who_says_nothing_is_left_alone(body):
    assert heard(body) is None


def test_who_says_it_twice_has_to_say_the_same():
    assert heard({"custom_params": {"kv_evict": {"budget": 96}}}, X_KV_Evict='{"mode": "on", "budget": 96}') == {
        "mode": "on",
        "budget": 96,
    }
    with pytest.raises(
        ConfigError, match=r"^X-KV-Evict and custom_params\.kv_evict ask for different things; give one"
    ):
        heard(NONE, X_KV_Evict='{"budget": 96}')
    with pytest.raises(ConfigError, match="X-KV-Evict and X-Request-Id-KV-Evict ask for different"):
        heard({}, X_KV_Evict="none", X_Request_Id_KV_Evict="on")
    with pytest.raises(ConfigError, match=r"X-KV-Evict and X-KV-Evict \(2\) ask"):
        doors.override_of([*headers(X_KV_Evict="none"), *headers(X_KV_Evict="on")], b"", manager())
    with pytest.raises(ConfigError, match=r"custom_params\.kv_evict and options\.custom_params\.kv_evict ask"):
        heard({"custom_params": {"kv_evict": "on"}, "options": NONE})
    with pytest.raises(ConfigError, match=r"^custom_params\.kv_evict and sampling_params\.custom_params\.kv_evict ask"):
        heard({"custom_params": {"kv_evict": "on"}, "sampling_params": NONE})


@pytest.mark.parametrize(
    ("body", "named", "message"),
    [
        (
            {"custom_params": {"kv_evict": {"budget": 1}}},
            {},
            "custom_params.kv_evict.budget: got 1, expected an integer",
        ),
        ({"sampling_params": {"custom_params": {"kv_evict": 7}}}, {}, "custom_params.kv_evict: got 7, expected"),
        ({"kv_evict": "none"}, {}, "kv_evict: not read there; give it as custom_params.kv_evict"),
        ({}, {"X_KV_Evict": "off"}, 'X-KV-Evict.mode: got "off", expected "on" or "none"'),
        ({}, {"X_KV_Evict": "{not json"}, "X-KV-Evict: not JSON at line 1"),
        (
            {},
            {"X_KV_Evict": '{"budget": 401}'},
            "X-KV-Evict.budget: got 401, expected an integer from 35 to 400 tokens",
        ),
        ({}, {"X_KV_Evict": '{"budget": 1, "budget": 96}'}, 'X-KV-Evict: key "budget" is given twice'),
        ({}, {"X_KV_Evict": ""}, 'X-KV-Evict.mode: got ""'),
        ({}, {"X_KV_Evict": "n\xf6"}, 'X-KV-Evict.mode: got "nö"'),
    ],
)
def test_what_is_not_legal_is_one_line_that_names_the_place(body, named, message):
    with pytest.raises(ConfigError) as error:
        heard(body, **named)
    assert str(error.value).startswith(message)


# -- through HTTP -----------------------------------------------------------------------------------------------------


class Served:
    """An application with SGLang's kinds of routes and error handlers, and what its handlers were given."""

    def __init__(self, config=CONFIG):
        self.given, app = [], FastAPI()
        self.manager = manager(config)

        async def create(request: Request):
            obj = SimpleNamespace(sampling_params={"temperature": 0})
            doors.apply_override(self.manager, obj, request)
            self.given.append(obj.sampling_params.get("custom_params"))
            return obj.sampling_params

        @app.exception_handler(HTTPException)
        async def as_sglang(request: Request, error: HTTPException):
            return JSONResponse({"message": error.detail, "by": "sglang"}, status_code=error.status_code)

        @app.post("/v1/messages")
        async def messages(body: dict, request: Request):
            return await create(request)

        @app.post("/api/chat")
        async def chat(body: dict, request: Request):
            async def stream():
                await create(request)
                yield b"{}\n"

            return StreamingResponse(stream())

        doors.open_to(app, lambda: self.manager)
        self.app = app

    def post(self, path, pieces, **named):
        """Post a body in pieces; returns status and body of the answer."""
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces[:-1]]
        messages += [{"type": "http.request", "body": pieces[-1]}]
        sent = []

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers(**named)],
        }
        asyncio.run(asyncio.wait_for(self.app(scope, receive, send), 20))
        body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return sent[0]["status"], body


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat"])
def test_what_a_route_drops_is_a_sampling_parameter_all_the_same(path):
    served = Served()
    text = json.dumps({"model": "m", **NONE}).encode()
    for cut in range(1, len(text), 7):  # also where the word itself is torn
        assert served.post(path, [text[:cut], text[cut:]])[0] == 200
    assert served.post(path, [b'{"model": "m"}'], X_KV_Evict='{"budget": 96}')[0] == 200
    assert served.post(path, [b'{"model": "m"}'])[0] == 200
    assert served.given == [{"kv_evict": "none"}] * len(range(1, len(text), 7)) + [{"kv_evict": {"budget": 96}}, None]


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/v1/messages", {"message": None, "by": "sglang"}), ("/api/chat", {"error": {"message": None}})],
)
def test_what_is_illegal_is_a_400_before_the_route_does_anything(path, answer):
    served = Served()
    for body, named in (
        ({"custom_params": {"kv_evict": {"budget": 1}}}, {}),
        ({}, {"X_KV_Evict": "off"}),
        (NONE, {"X_KV_Evict": "on"}),
    ):
        status, text = served.post(path, [json.dumps(body).encode()], **named)
        found = json.loads(text)
        (found if "message" in found else found["error"])["message"] = None
        assert (status, found) == (400, answer) and served.given == []


def test_the_configuration_of_now_decides():
    served = Served()
    assert served.post("/v1/messages", [json.dumps(NONE).encode()])[0] == 200
    forbids = from_mapping({"requests": {"allow_off": False}})
    served.manager.server_args._lethe = EvictionRequest(config=forbids, from_cli=False)
    assert served.post("/v1/messages", [json.dumps(NONE).encode()])[0] == 400


def test_what_was_heard_is_laid_into_each_request_of_a_batch_and_beside_what_else_is_there():
    def laid(params, asked, preferred=None):
        obj = SimpleNamespace(sampling_params=params)
        doors.apply_override(manager(preferred=preferred), obj, SimpleNamespace(scope={"lethe_kv_evict": asked}))
        return obj.sampling_params

    assert laid(None, "none") == {"custom_params": {"kv_evict": "none"}}
    assert laid({"n": 2, "custom_params": None}, "none") == {"n": 2, "custom_params": {"kv_evict": "none"}}
    assert laid({"custom_params": {"x": 1}}, "none")["custom_params"] == {"x": 1, "kv_evict": "none"}
    assert laid({}, "none", {"custom_params": {"y": 2, "kv_evict": "on"}})["custom_params"] == {
        "y": 2,
        "kv_evict": "none",
    }
    shared = {"temperature": 1}
    assert laid([shared, {"custom_params": {"kv_evict": "none"}}], "none") == [
        {"temperature": 1, "custom_params": {"kv_evict": "none"}},
        {"custom_params": {"kv_evict": "none"}},
    ]
    assert shared == {"temperature": 1}, "somebody else's dict was written to"
    with pytest.raises(ConfigError, match=r"custom_params\.kv_evict and X-KV-Evict or .* ask for different things"):
        laid([{}, {"custom_params": {"kv_evict": "on"}}], "none")
    assert laid({"custom_params": [3]}, "none") == {"custom_params": [3]}, "check_request refuses it"
    for request in (None, SimpleNamespace(headers={})):  # an engine's, and that of SGLang's gRPC server
        obj = SimpleNamespace(sampling_params=shared)
        doors.apply_override(manager(), obj, request)
        assert obj.sampling_params is shared


# -- junk -------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["mode", "budget", "kv_evict", "custom_params"]) | st.text(max_size=30)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 10**400, -1, 0, 100, 400, "on", "none", "a" * 3_000, "\ud800", "\u2028\n\x00"])
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def refused_or_legal(read) -> None:
    """Whatever comes is an override, or one short line that JSON and UTF-8 can carry."""
    try:
        found = read()
    except ConfigError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 2000 and json.loads(json.dumps(text).encode()) == text
        text.encode()
    else:
        assert found is None or (
            found.mode in ("on", "none") and type(found.budget) is int and 35 <= found.budget <= 400
        )


@settings(max_examples=150, deadline=None)
@given(JUNK)
def test_junk_is_refused_in_one_short_line_and_never_otherwise(junk):
    refused_or_legal(lambda: parse_override(junk, CONFIG, 4096))
    refused_or_legal(lambda: parse_request(junk, CONFIG, 4096))
    refused_or_legal(lambda: parse_request({"kv_evict": junk}, CONFIG, 4096))


@settings(max_examples=100, deadline=None)
@given(JUNK, st.lists(st.sampled_from(doors.HEADERS), max_size=2), st.binary(max_size=40))
def test_junk_in_bodies_and_headers_is_refused_in_one_short_line_and_never_otherwise(junk, names, raw):
    def read(body, named):
        asked = doors.override_of(named, body, manager())
        return None if asked is None else parse_override(asked, CONFIG, 4096)

    named = [(name.lower().encode(), raw) for name in names]
    for place in ({"custom_params": {"kv_evict": junk}}, {"options": junk}, junk):
        body = json.dumps(place).encode()
        refused_or_legal(partial(read, body, named))
    refused_or_legal(lambda: read(raw + b"kv_evict", named))


def test_depth_and_number_are_no_way_around():
    deep: object = 1
    for _ in range(50_000):
        deep = [deep]
    refused_or_legal(lambda: parse_override(deep, CONFIG))
    refused_or_legal(lambda: parse_override({"budget": deep}, CONFIG))
    refused_or_legal(lambda: parse_override({f"key {i}": i for i in range(20_000)}, CONFIG))
    refused_or_legal(lambda: parse_override({"k" * 1_000_000: 1}, CONFIG))
    refused_or_legal(lambda: parse_override({1: 2, None: 3, (4,): 5}, CONFIG))
    body = b'{"custom_params": {"kv_evict": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}"
    refused_or_legal(lambda: doors.override_of([], body, manager()))
    refused_or_legal(lambda: doors.override_of([(b"x-kv-evict", b'{"budget": ' + b"[" * 50_000)], b"", manager()))


def test_a_floor_above_the_largest_of_the_server_is_refused_in_either_mode():
    for when in ("always", "pressure"):
        config = from_mapping({"budget": {"tokens": 100}, "rounds": {"when": when}})
        assert parse_override({"budget": 400}, config) == RequestOverride(mode="on", budget=400)
        with pytest.raises(ConfigError, match="got 401, expected an integer from 35 to 400 tokens"):
            parse_override({"budget": 401}, config)
    assert isinstance(config, EvictionConfig)
