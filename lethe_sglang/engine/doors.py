"""How one request is to be treated, whichever HTTP route it comes by: read from its body or a header, once.

SGLang hands ``custom_params`` on from its own routes and from OpenAI's first two; from ``/v1/responses``,
``/v1/messages`` and Ollama's it drops them, and a router in front drops them from all. So an override is heard where a
request comes in, and laid into the sampling parameters where SGLang creates the request, which every route passes:

    ASGI: headers and body -> scope  ->  any handler of SGLang's  ->  TokenizerManager._init_req_state: scope -> request
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import orjson
from fastapi import FastAPI, HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from lethe_sglang.config import ConfigError, RequestOverride, parse_override, parse_request
from lethe_sglang.config.loading import parse_json
from lethe_sglang.engine import entrypoints, guard
from lethe_sglang.errors import one_line

HEADERS = ("X-KV-Evict", "X-Request-Id-KV-Evict")
"""The header, and the name by which it passes SGLang's routers: of headers that they do not know they forward those
whose name begins with ``X-Request-Id-``, and no others."""

PLACES: tuple[tuple[str, ...], ...] = ((), ("sampling_params",), ("parameters", "sampling_params"), ("options",))
"""Where a body may have ``custom_params``: OpenAI's routes and Anthropic's, SGLang's own, Vertex', Ollama's."""

_OVERRIDE = "lethe_kv_evict"
"""Key of an ASGI scope: what the request has asked for."""

Scope = MutableMapping[str, Any]


class Refused(HTTPException):
    """An override that is not legal; raised while a route reads the body, so before it does anything."""


class OverrideMiddleware:
    """ASGI middleware that reads the override of a request while its route reads the body.

    Parameters
    ----------
    app
        What handles the request.
    manager
        Returns SGLang's tokenizer manager.
    """

    def __init__(self, app: Any, manager: Callable[[], Any]) -> None:
        self.app, self.manager = app, manager

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, and note in its scope what it asks for before the route has the end of the body."""
        pieces: list[bytes] = []

        async def receive_override() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                pieces.append(message.get("body", b""))
                if not message.get("more_body"):
                    try:
                        scope[_OVERRIDE] = override_of(scope["headers"], b"".join(pieces), self.manager())
                    except ConfigError as error:
                        raise Refused(400, str(error)) from None
                    pieces.clear()  # the request may run for long
            return message

        await self.app(scope, receive_override if scope["type"] == "http" else receive, send)


def override_of(headers: Any, body: bytes, manager: Any) -> Any:
    """Return what a request asks for, None if nothing.

    Parameters
    ----------
    headers
        Pairs of bytes, names in lower case.
    body
        The whole body.
    manager
        SGLang's tokenizer manager.

    Raises
    ------
    ConfigError
        If it is not legal, or headers and body do not ask for the same.
    """
    said = [*_in_headers(headers), *_in_body(body)]
    read = {where: _read(manager, asked, where.removeprefix("sampling_params.")) for where, asked in said}
    if len(set(read.values())) > 1:
        raise one_line([f"{' and '.join(read)} ask for different things; give one of them, or the same in each"])
    return said[0][1] if said else None


def _in_headers(headers: Any) -> Iterator[tuple[str, Any]]:
    for name in HEADERS:
        for number, text in enumerate(
            value.decode("latin-1") for key, value in headers if key == name.lower().encode()
        ):
            where = f"{name} ({number + 1})" if number else name
            yield where, parse_json(text, where) if text.lstrip().startswith("{") else text.strip()


def _in_body(body: bytes) -> Iterator[tuple[str, Any]]:
    if b"kv_evict" not in body:  # as good as always: no body is decoded twice for nothing
        return
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:  # the route says so
        return
    for place in PLACES:
        found = data
        for key in place:
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            continue
        path = ".".join((*place, "custom_params.kv_evict"))
        if "kv_evict" in found:
            raise one_line([f"{'.'.join((*place, 'kv_evict'))}: not read there; give it as {path}"])
        params = found.get("custom_params")
        if isinstance(params, Mapping) and params.get("kv_evict") is not None:
            yield path, params["kv_evict"]


def _read(manager: Any, asked: Any, where: str = "custom_params.kv_evict") -> RequestOverride | None:
    """Read an override under the configuration of now; None where nothing evicts."""
    request = entrypoints.requested(manager.server_args)
    return None if request is None else parse_override(asked, request.config, manager.context_len, where)


def apply_override(manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE ``TokenizerManager._init_req_state``: the request asks for what the middleware has read.

    Raises
    ------
    ConfigError
        If it asks for something else in a place that no door looks at: one of several sampling parameters.
    """
    asked = getattr(request, "scope", {}).get(_OVERRIDE)
    if asked is None:
        return
    params = obj.sampling_params
    laid = [_with(manager, each, asked) for each in (params if isinstance(params, list) else [params])]
    obj.sampling_params = laid if isinstance(params, list) else laid[0]


def _with(manager: Any, params: dict[str, Any] | None, asked: Any) -> dict[str, Any]:
    params = params or {}
    custom = {**(manager.preferred_sampling_params or {}), **params}.get("custom_params") or {}
    if not isinstance(custom, Mapping):
        return params  # check_request refuses it
    own = (params.get("custom_params") or {}).get("kv_evict")
    if own is not None and _read(manager, own) != _read(manager, asked):
        raise one_line(
            [f"custom_params.kv_evict and {' or '.join(HEADERS)} ask for different things; give one of them"]
        )
    return {**params, "custom_params": {**custom, "kv_evict": asked}}


def check_request(manager: Any, obj: Any, input_ids: Any) -> None:
    """BEFORE ``TokenizerManager._validate_one_request``: a bad per-request override is an HTTP 400."""
    request = entrypoints.requested(manager.server_args)
    params = getattr(obj, "sampling_params", None)
    if request is not None and isinstance(params, dict):
        asked = {**(manager.preferred_sampling_params or {}), **params}  # as the manager will lay them over each other
        guard.check_request(asked)
        parse_request(asked.get("custom_params"), request.config, manager.context_len)


def open_to(app: FastAPI, manager: Callable[[], Any]) -> None:
    """Let SGLang's HTTP server hear overrides on every route, and answer what is illegal with HTTP 400.

    The middleware is the innermost one: behind authorisation, and behind what decompresses bodies.
    """

    async def refuse(request: Any, error: Any) -> Response:
        if request.url.path.startswith("/v1/"):  # SGLang knows what errors of OpenAI's and Anthropic's look like
            response: Response = await app.exception_handlers[HTTPException](request, error)  # type: ignore[misc]
            return response
        return JSONResponse({"error": {"message": error.detail}}, status_code=error.status_code)

    app.user_middleware.append(Middleware(OverrideMiddleware, manager=manager))
    app.add_exception_handler(Refused, refuse)
