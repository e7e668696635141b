"""One request of a soak: how it is put, and whether its reply is what was asked for."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import threading
import urllib.error
from typing import Any

from lethe_bench.servers import Server
from lethe_bench.soak.traffic import REGEX, STOPS, TOOL, Request

TIMEOUT = 300.0
"""Seconds after which a request counts as one that hangs."""


class Wrong(Exception):
    """A reply that is not what was asked for; the message says how."""


class Recorded:
    """Replies of a stock server, to be compared with.

    Parameters
    ----------
    replies
        Prompt -> token ids, cut in front of the first one that had a close second: there, the order in which a batch
        is summed may decide.
    """

    def __init__(self, replies: dict[str, list[int]]) -> None:
        self.replies = replies

    def tokens(self, prompt: str) -> int:
        """Return how many tokens of a reply are compared."""
        return len(self.replies[prompt])

    def same(self, prompt: str, ids: list[int]) -> bool:
        """Whether a reply begins as stock's does."""
        expected = self.replies[prompt]
        return ids[: len(expected)] == expected


CLOSE = 0.01
"""Nats by which stock's likeliest token has to lead for a different one to count."""


def decided(reply: dict[str, Any]) -> list[int]:
    """Return the token ids of a reply in front of the first one whose lead is below :data:`CLOSE`."""
    meta = reply["meta_info"]
    leads = [top[0][0] - top[1][0] for top in meta["output_top_logprobs"]]
    count = next((place for place, lead in enumerate(leads) if lead < CLOSE), len(leads))
    return list(reply["output_ids"][:count])


def put(server: Server, request: Request) -> dict[str, Any]:
    """Put a request, wait for its end and return its reply; that of one that goes away or is streamed is empty.

    Raises
    ------
    Wrong
        If the reply is not what was asked for.
    OSError, http.client.HTTPException
        If the server refuses, hangs or is gone.
    """
    if request.kind == "disconnect":
        with contextlib.closing(server.stream(request.path, request.body, TIMEOUT)) as events:
            seen = list(itertools.islice(events, int(request.after)))
        if len(seen) < request.after:
            raise Wrong(f"the stream ended after {len(seen)} events")
        return {}
    if request.kind == "stream":
        if not any(event.get("choices") for event in server.stream(request.path, request.body, TIMEOUT)):
            raise Wrong("an empty stream")
        return {}
    aborts = threading.Timer(request.after, server.post, ("/abort_request", {"rid": request.rid}))
    if request.kind == "abort":
        aborts.start()
    try:
        reply: dict[str, Any] = json.loads(server.post(request.path, request.body, TIMEOUT))
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
        if request.kind == "abort" and "abort" in text.lower():
            return {}
        raise Wrong(f"HTTP {error.code}: {text[:200]}") from None
    finally:
        aborts.cancel()
    check(request, reply)
    return reply


def check(request: Request, reply: dict[str, Any]) -> None:
    """Refuse a reply that is not what was asked for.

    Raises
    ------
    Wrong
        That says how.
    """
    if request.path != "/generate":
        if len(reply["choices"]) != request.body["n"]:
            raise Wrong(f"{len(reply['choices'])} choices")
        if request.kind == "tools":
            _check_call(reply["choices"][0])
        return
    text, meta, asked = reply["text"], reply["meta_info"], request.body["sampling_params"]
    ended = (meta["finish_reason"] or {}).get("type")
    if request.kind == "abort":
        return  # it may have ended by itself
    if ended not in ("stop", "length"):
        raise Wrong(f"ended by {ended}")
    if meta["completion_tokens"] > asked["max_new_tokens"]:
        raise Wrong("more tokens than asked for")
    if request.kind == "long" and meta["completion_tokens"] != asked["max_new_tokens"]:
        raise Wrong(f"{meta['completion_tokens']} tokens")
    if request.kind == "stop" and any(stop in text for stop in STOPS):
        raise Wrong("a stop string in the reply")
    if request.kind == "regex" and ended == "stop" and not re.fullmatch(REGEX, text):
        raise Wrong(f"{text!r} does not match")
    if request.kind == "schema" and ended == "stop":
        try:
            if set(json.loads(text)) != {"name", "age"}:
                raise Wrong(f"{text!r} is not of the schema")
        except ValueError:
            raise Wrong(f"{text!r} is no JSON") from None
    if request.kind == "logprobs" and len(meta["output_token_logprobs"]) != meta["completion_tokens"]:
        raise Wrong("not one log-probability a token")


def _check_call(choice: dict[str, Any]) -> None:
    """Refuse a choice that ended by itself and is no call of the tool."""
    if choice["finish_reason"] == "length":
        return
    try:
        [call] = choice["message"]["tool_calls"]
        name, given = call["function"]["name"], sorted(json.loads(call["function"]["arguments"]))
    except (TypeError, ValueError):
        raise Wrong(f"{choice['finish_reason']} without one call of a tool") from None
    function = TOOL["function"]
    if name != function["name"] or given != sorted(function["parameters"]["required"]):
        raise Wrong(f"{name} of {given} is not the tool")


def reason(error: BaseException) -> str:
    """Return an error in a line that is the same for the same kind of error."""
    if isinstance(error, Wrong):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"no reply in {TIMEOUT:g} s"
    if isinstance(error, (OSError, http.client.HTTPException)):
        return f"the connection broke ({type(error).__name__})"
    return f"{type(error).__name__}: {error}"[:200]
