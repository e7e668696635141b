"""Calibration prompts: read from a file in one of three formats, or generated."""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lethe_sglang.allocation.fingerprint import digest
from lethe_sglang.config import ConfigError

Prompt = tuple[tuple[str, str], ...]
"""A conversation: (role, content) of each message, the last one not the assistant's."""

MODEL_FILE = "lethe_prompts.jsonl"
"""Prompts that a model's directory brings along; they go before the generated ones."""

_TEXT_KEYS = ("prompt", "question", "problem", "text", "input")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read(path: Path) -> list[Prompt]:
    """Read prompts from a file.

    Parameters
    ----------
    path
        ``.jsonl``: one object (or string) a line; ``.json``: a list of them. An object holds ``messages`` (OpenAI),
        ``conversations`` (ShareGPT) or a text under ``prompt``, ``question``, ``problem``, ``text`` or ``input``.
        Anything else is plain text, one prompt a line; empty lines are skipped.

    Raises
    ------
    ConfigError
        One line that names the file and the place.
    """
    where = f"--prompts {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}; give a .jsonl, .json or text file") from None
    except ValueError:
        raise ConfigError(f"{where}: not UTF-8 text; give a .jsonl, .json or text file") from None
    lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".json":
        items = _parse(text, where)
        if not isinstance(items, list):
            raise ConfigError(f"{where}: holds no list; give a list of prompts or conversations")
        found = [_prompt(item, f"{where}: item {i}") for i, item in enumerate(items, 1)]
    elif path.suffix == ".jsonl":
        found = [_prompt(_parse(line, f"{where}: {place}"), f"{where}: {place}") for place, line in lines]
    else:
        found = [(("user", line.strip()),) for _, line in lines]
    if not found:
        raise ConfigError(f"{where}: holds no prompt; give at least one")
    return found


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise ConfigError(f"{where}: not JSON") from None


def _prompt(item: Any, where: str) -> Prompt:
    if isinstance(item, str) and item.strip():
        return (("user", item),)
    if isinstance(item, dict):
        for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
            if key in item:
                return _conversation(item[key], role, content, where)
        for key in _TEXT_KEYS:
            if isinstance(item.get(key), str) and item[key].strip():
                return (("user", item[key]),)
    raise ConfigError(f"{where}: no prompt in it; expected one of messages, conversations, {', '.join(_TEXT_KEYS)}")


def _conversation(turns: Any, role: str, content: str, where: str) -> Prompt:
    """Keep the turns up to the last one that the model did not write."""
    messages = []
    for turn in turns if isinstance(turns, list) else ():
        known = isinstance(turn, dict) and _ROLES.get(str(turn.get(role)))
        if not known or not isinstance(turn.get(content), str):
            raise ConfigError(f"{where}: a turn needs {role} ({', '.join(_ROLES)}) and {content} (text)")
        messages.append((str(known), str(turn[content])))
    while messages and messages[-1][0] == "assistant":
        messages.pop()
    if not messages:
        raise ConfigError(f"{where}: a conversation without a user's turn")
    return tuple(messages)


def hash_of(prompts: list[Prompt]) -> str:
    """Hash prompts and their order."""
    return digest([list(map(list, prompt)) for prompt in prompts])


# -- generated prompts ------------------------------------------------------------------------------------------------


def generated(seed: int) -> Iterator[Prompt]:
    """Generate reasoning problems without end, in a fixed order for a seed: five kinds in turn, words and symbols."""
    kinds: tuple[Callable[[random.Random], str], ...] = (_purchases, _definitions, _schedule, _walk, _queue)
    index = 0
    while True:
        rng = random.Random(f"{seed}/{index}")
        yield (("user", kinds[index % len(kinds)](rng)),)
        index += 1


_PEOPLE = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Jun")
_GOODS = ("apples", "notebooks", "lamps", "chairs", "tickets", "bottles", "maps", "stamps")


def _purchases(rng: random.Random) -> str:
    person, items = rng.choice(_PEOPLE), rng.sample(_GOODS, 4)
    lines = [f"{rng.randint(2, 19)} {item} at {rng.randint(2, 45)} euros each" for item in items]
    return (
        f"{person} buys {', '.join(lines[:-1])} and {lines[-1]}. There is a discount of {rng.randint(2, 8) * 5} "
        f"percent on the {rng.choice(items)} only, and {person} pays with {rng.randint(2, 9)} notes of 500 euros. "
        "How much change is due? Think step by step and check your result before you answer."
    )


def _schedule(rng: random.Random) -> str:
    first, second = rng.sample(_PEOPLE, 2)
    return (
        f"{first} cycles from town A to town B at {rng.randint(12, 24)} km/h and starts at 8:{rng.randint(10, 50)}. "
        f"{second} starts in B at 9:{rng.randint(10, 50)} and cycles to A at {rng.randint(12, 24)} km/h. The towns are "
        f"{rng.randint(60, 140)} km apart and both rest for {rng.randint(5, 25)} minutes after every full hour. "
        "When and how far from A do they meet? Think step by step and check your result before you answer."
    )


def _queue(rng: random.Random) -> str:
    people = rng.sample(_PEOPLE, 5)
    order = rng.sample(people, 5)
    place = {person: i for i, person in enumerate(order)}
    facts = []
    for a, b in itertools.pairwise(people):
        gap = place[a] - place[b]
        facts.append(f"{a} stands {abs(gap)} place{'s' * (abs(gap) > 1)} {'behind' if gap > 0 else 'in front of'} {b}.")
    return (
        f"Five people stand in a queue. {' '.join(facts)} Who is first, and who is last? Reason step by step, write "
        "the whole order, and check every statement against it."
    )


def _definitions(rng: random.Random) -> str:
    names = rng.sample(string.ascii_lowercase, 10)
    lines = []
    for i, name in enumerate(names):
        base = f"{rng.choice(names[:i])}+" if i and rng.random() > 0.25 else ""
        lines.append(f"{name}={base}{rng.randrange(10)}")
    return ";".join(rng.sample(lines, 10)) + ";?" + "".join(rng.sample(names, 4))


def _walk(rng: random.Random) -> str:
    names = rng.sample(string.ascii_lowercase, 6)
    edges = [f"{name}>{rng.choice(names)}" for name in names]
    return ";".join(edges) + f";?{rng.choice(names)}40"
