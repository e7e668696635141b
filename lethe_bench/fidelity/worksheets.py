"""Worked problems of reasoning-gym, one after the other, whose answers are all asked for once more at the end."""

from __future__ import annotations

import importlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

from lethe_bench.fidelity.corpora import Document, Split, Value, belongs, chat
from lethe_sglang.config import ConfigError

PACKAGE = "reasoning-gym"
"""What makes the problems, without a download; no dependency of this project."""

FAMILY = "gsm_symbolic"
"""Word problems of several steps, each with its solution in words."""

TASK = "Solve some problems step by step, one after the other, and then write down the answers of all of them again."


def reasoning(tokenizer: Any, split: Split, tokens: int) -> Iterator[Document]:
    """Yield worksheets; the solutions of both splits follow the same hundred templates, with other names and numbers.

    Raises
    ------
    ConfigError
        If the package is not installed, or the length is too short for two problems.
    """
    number = 0
    while True:
        if belongs(name := f"reasoning-{number}", split):
            yield _worksheet(tokenizer, name, tokens)
        number += 1


def _problems(name: str, count: int) -> list[tuple[str, str]]:
    """Make a document's problems: each a text that ends with its solution, and the answer."""
    try:
        gym = importlib.import_module(PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise ConfigError(
            f"corpora.reasoning: needs {PACKAGE} ({error}); pip install {PACKAGE}==0.1.25, or leave that corpus out"
        ) from None
    made = gym.create_dataset(FAMILY, size=count, seed=zlib.crc32(name.encode()))
    items = [made[number] for number in range(count)]
    return [(f"{item['question']}\n{item['metadata']['answer_cot']}", str(item["answer"])) for item in items]


def _worksheet(tokenizer: Any, name: str, tokens: int) -> Document:
    problems = _problems(name, 2 + tokens // 60)
    worked = [
        tokenizer.encode(f"Problem {number}. {text}\n{_asked(number)} {answer}.\n\n")
        for number, (text, answer) in enumerate(problems, 1)
    ]
    reply, values = list[int](), list[Value]()
    for count in range(1, len(worked)):  # as many problems as leave room for the list of their answers
        longer, found = _with_answers(tokenizer, name, worked, problems, count)
        if len(longer) > tokens:
            break
        reply, values = longer, found
    if len(values) < 2:
        raise ConfigError(f"tokens: got {tokens}, too few for reasoning; give 600 or more")
    following = [token for problem in worked[len(values) :] for token in problem]  # cut where the document ends
    return Document(name, chat(tokenizer, TASK), (reply + following)[:tokens], values)


def _asked(number: int) -> str:
    return f"The answer to problem {number} is"


def _with_answers(
    tokenizer: Any, name: str, worked: list[list[int]], problems: list[tuple[str, str]], count: int
) -> tuple[list[int], list[Value]]:
    """Return the first ``count`` problems and their answers once more, in any order, and where those are."""
    reply = [token for problem in worked[:count] for token in problem]
    reply += tokenizer.encode("All answers again.\n")
    order = list(range(count))
    random.Random(name).shuffle(order)
    values = []
    for number in order:
        reply += tokenizer.encode(_asked(number + 1))
        value = tokenizer.encode(f" {problems[number][1]}")
        values.append(Value(len(reply), len(reply) + len(value), "answer"))
        reply += [*value, *tokenizer.encode(".\n")]
    return reply + tokenizer.encode("\n"), values
