"""What a soak sends: waves of requests and of control, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

REQUESTS = (
    "chat",
    "long",
    "n",
    "stop",
    "schema",
    "regex",
    "tools",
    "logprobs",
    "stream",
    "abort",
    "disconnect",
    "none",
)
"""Kinds of request; each comes once before any comes again. ``none`` is never evicted from, and compared with stock."""

CONTROL = ("retract", "pause", "weights", "flush")
"""What happens to a server while a wave runs, in this order, over and over; each wave begins where the last one ended.

``retract`` and ``pause`` pause generation and go on; ``weights`` loads the same weights again while all are retracted;
``flush`` asks for a flush that a busy server refuses.
"""

SWITCHES = ("pressure", "always")
"""What ``rounds.when`` becomes after a wave, in turn: only an idle server takes it."""

WAVE, ACTS = 6, 2
"""Requests of a wave, all put at once, and acts of control meanwhile."""

QUESTIONS = (
    "How does bread get from a field of wheat to the table?",
    "Why is the sky blue, and why is it red in the evening?",
    "Explain how a bicycle stays upright.",
    "What does a lighthouse keeper do all day?",
    "Tell the story of a fox who wanted to learn to read.",
    "Describe how to plan a garden for a small family.",
    "How did people find their way at sea before there were maps?",
    "What should somebody know before they buy a used boat?",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"(yes|no), because [a-z ]{5,40}\."
STOPS = [".", "\n"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a subject up in an encyclopedia.",
        "parameters": {
            "type": "object",
            "properties": {"subject": {"type": "string", "maxLength": 20}, "volume": {"enum": ["first", "second"]}},
            "required": ["subject", "volume"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes
    ----------
    kind
        One of :data:`REQUESTS`.
    rid
        Its name at the server; that of an OpenAI request is the server's own.
    path, body
        What is posted.
    after
        Events of the stream after which a ``disconnect`` goes away; seconds until an ``abort``.
    """

    kind: str
    rid: str
    path: str
    body: dict[str, Any]
    after: float = 0.0


@dataclass(frozen=True)
class Wave:
    """Requests that are put together.

    Attributes
    ----------
    control
        Acts meanwhile: seconds after the act in front, and which.
    then
        One of :data:`SWITCHES`.
    """

    number: int
    requests: tuple[Request, ...]
    control: tuple[tuple[float, str], ...]
    then: str


def waves(seed: int, tokens: int = 192) -> Iterator[Wave]:
    """Yield waves without end.

    Parameters
    ----------
    seed
        Two schedules of one seed are the same.
    tokens
        Length of a ``long`` reply; the others are a fraction of it.
    """
    rng = random.Random(seed)
    kinds, acts, switches = _decks(rng, REQUESTS), _again(CONTROL), _again(SWITCHES)
    number = 0
    while True:
        requests = tuple(request(next(kinds), f"soak-{number}-{place}", rng, tokens) for place in range(WAVE))
        control = tuple((round(rng.uniform(0.8, 2.5), 2), next(acts)) for _ in range(ACTS))
        yield Wave(number, requests, control, next(switches))
        number += 1


def untouched(question: str, tokens: int) -> dict[str, Any]:
    """Return the body of a greedy request that must be answered, to its last token, as stock answers it."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"kv_evict": "none"}}
    return {"text": f"Question: {question}\nAnswer:", "sampling_params": params}


def request(kind: str, rid: str, rng: random.Random, tokens: int) -> Request:
    """Make one request of a kind; all that is drawn is drawn from ``rng``."""
    question = rng.choice(QUESTIONS)
    short = tokens // 5
    if kind in ("chat", "n", "stream", "tools"):
        body: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens // 2 if kind == "n" else short,  # three of these alone fill the pool
            "temperature": 0.8,
            "seed": rng.randrange(2**31),
            "n": 3 if kind == "n" else 1,
        }
        asked: dict[str, dict[str, Any]] = {
            "stream": {"stream": True},
            "tools": {"tools": [TOOL], "tool_choice": "required"},
            "n": {"ignore_eos": True},
        }
        return Request(kind, rid, "/v1/chat/completions", body | asked.get(kind, {}))
    body = untouched(question, short)
    if kind == "none":
        return Request(kind, rid, "/generate", body | {"rid": rid})
    more: dict[str, dict[str, Any]] = {
        "long": {"max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"kv_evict": {"budget": 32}}},
        "stop": {"stop": STOPS, "max_new_tokens": 2 * short},
        "schema": {"json_schema": json.dumps(SCHEMA)},
        "regex": {"regex": REGEX},
        "logprobs": {"ignore_eos": True},
        "abort": {"max_new_tokens": tokens, "ignore_eos": True},
        "disconnect": {"max_new_tokens": tokens, "ignore_eos": True},
    }
    for unwanted in ("custom_params", "ignore_eos"):
        del body["sampling_params"][unwanted]
    body = {**body, "rid": rid, "sampling_params": body["sampling_params"] | more[kind]}
    if kind == "logprobs":
        body |= {"return_logprob": True, "top_logprobs_num": 2}
    if kind == "disconnect":
        body["stream"] = True
    after = {"abort": round(rng.uniform(1.0, 4.0), 2), "disconnect": float(rng.randint(3, 40))}.get(kind, 0.0)
    return Request(kind, rid, "/generate", body, after)


def _decks(rng: random.Random, cards: tuple[str, ...]) -> Iterator[str]:
    while True:
        yield from rng.sample(cards, len(cards))


def _again(cards: tuple[str, ...]) -> Iterator[str]:
    while True:
        yield from cards
