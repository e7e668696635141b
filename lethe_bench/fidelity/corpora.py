"""Documents whose replies are forced: prose and code that installed packages carry, recall of values, own samples.

Everything is made from a seed and from files that are installed, without a download. The two splits share no document.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lethe_sglang.config import ConfigError

Split = Literal["development", "test"]

PROMPT = 64
"""Tokens of a document of prose or code that are its prompt."""


class Value(NamedTuple):
    """A value in a reply: its tokens from ``start`` to before ``end``, and what kind of recall it asks for."""

    start: int
    end: int
    kind: str


class Document(NamedTuple):
    """A prompt and the reply that is forced.

    Attributes
    ----------
    name
        Unique among all corpora.
    prompt, reply
        Token ids.
    values
        Tokens of the reply that can only be known from far before.
    """

    name: str
    prompt: list[int]
    reply: list[int]
    values: Sequence[Value] = ()


def belongs(name: str, split: Split) -> bool:
    """Say whether a document is one of a split: half of all names are."""
    return (zlib.crc32(name.encode()) % 2 == 0) == (split == "development")


def _file(package: str, ending: str) -> Path:
    for path in distribution(package).files or ():
        if str(path).endswith(ending):
            return Path(str(path.locate()))
    raise ConfigError(f"corpora: the package {package} carries no {ending}; leave that corpus out")


def _opticks() -> str:
    """Return Newton's Opticks, which a package carries as test data, without the frame of its edition."""
    text = _file("apache-tvm-ffi", "Isaac.Newton-Opticks.txt").read_text(encoding="utf-8", errors="replace")
    return text[len(text) // 20 : -len(text) // 20].replace("\r", "").replace("_", "")


def _windows(ids: list[int], length: int, name: str, split: Split) -> Iterator[tuple[str, list[int]]]:
    for number in range(len(ids) // length):
        if belongs(label := f"{name}-{number}", split):
            yield label, ids[number * length : (number + 1) * length]


def prose(tokenizer: Any, split: Split, tokens: int) -> Iterator[Document]:
    """Yield prose: windows of a book."""
    for name, ids in _windows(tokenizer.encode(_opticks()), PROMPT + tokens, "prose", split):
        yield Document(name, ids[:PROMPT], ids[PROMPT:])


def code(tokenizer: Any, split: Split, tokens: int) -> Iterator[Document]:
    """Yield code: the beginnings of long source files."""
    root = Path(str(_file("sglang", "sglang/__init__.py"))).parent / "srt"
    for path in sorted(root.rglob("*.py")):
        name = f"code-{path.relative_to(root)}".replace("/", ".")
        if not belongs(name, split) or path.stat().st_size < 8 * (PROMPT + tokens):
            continue
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[: 12 * (PROMPT + tokens)])
        if len(ids) >= PROMPT + tokens:
            yield Document(name, ids[:PROMPT], ids[PROMPT : PROMPT + tokens])


_THINGS = [
    "door",
    "gate",
    "box",
    "safe",
    "locker",
    "drawer",
    "cabin",
    "garage",
    "tower",
    "cellar",
    "attic",
    "shed",
    "vault",
    "office",
    "kitchen",
    "archive",
]
_COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "grey",
    "brown",
    "purple",
    "orange",
    "pink",
    "golden",
    "silver",
]


def recall(tokenizer: Any, split: Split, tokens: int) -> Iterator[Document]:
    """Yield replies that state values early, go on to other things, and need the values at their end.

    Three kinds of value (``Value.kind``): a number stated once; one that is stated and then changed; an item of a
    list by its rank. They are such that a small model with the full cache recalls them.
    """
    filler, number = tokenizer.encode(_opticks()), 0
    while True:
        if belongs(name := f"recall-{number}", split):
            yield _recall(tokenizer, name, filler, tokens)
        number += 1


def _recall(tokenizer: Any, name: str, filler: list[int], tokens: int) -> Document:
    rng = random.Random(name)
    names = [" ".join(words) for words in zip(rng.sample(_COLOURS, 4), rng.sample(_THINGS, 4), strict=True)]
    codes = [f"{rng.randint(1000, 9999)}" for _ in range(5)]
    listed = [(f"\n{rank}.", f" {animal}", "ranked") for rank, animal in enumerate(rng.sample(_ANIMALS, 3), 1)]
    early = [f"The code of the {name} is {code}." for name, code in zip(names, codes, strict=False)]
    changed = f"The code of the {names[3]} is now {codes[4]}."
    current = zip(names, [*codes[:3], codes[4]], ["stated"] * 3 + ["changed"], strict=True)
    asked = [(f" The code of the {name} is", f" {code}", kind) for name, code, kind in current]
    rng.shuffle(asked)
    animals = "".join(rank + animal for rank, animal, _ in listed)
    head = tokenizer.encode("\n".join(early) + f"\n\nMy animals:{animals}\n\n")
    middle = tokenizer.encode(f"\n\n{changed}\n\n")
    end, spans = list[int](), []
    for question, answer, kind in [("\n\nLet me recall.", "", ""), *asked, ("\n\nMy animals:", "", ""), *listed]:
        end += tokenizer.encode(question)
        if answer:
            value = tokenizer.encode(answer)
            spans.append((len(end), len(end) + len(value), kind))
            end += [*value, *([] if kind == "ranked" else tokenizer.encode("."))]
    room = tokens - len(head) - len(middle) - len(end)
    if room < 32:
        raise ConfigError(f"tokens: got {tokens}, too few for recall; the smallest legal value is {tokens - room + 32}")
    start = rng.randrange(len(filler) - room)
    first = room // 3
    before = [*head, *filler[start : start + first], *middle, *filler[start + first : start + room]]
    question = "Write down some codes and animals, then copy a chapter of a book, and then recall codes and animals."
    values = [Value(start + len(before), end + len(before), kind) for start, end, kind in spans]
    return Document(name, chat(tokenizer, question), [*before, *end], values)


def chat(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of a question as the model's chat template puts it."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"{question}\n"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


_SUBJECTS = [
    "a lighthouse keeper",
    "the history of bread",
    "a journey by train",
    "how rivers form",
    "two brothers and a boat",
    "learning to play chess",
    "a city under the sea",
    "why leaves turn red",
    "the first day at a school",
    "growing potatoes",
    "a clockmaker",
    "how bridges stand",
    "an island without birds",
    "the moon and the tides",
    "a letter that came late",
    "keeping bees",
    "the invention of paper",
    "a winter in the mountains",
    "how to bake a cake",
    "an old map",
]
_ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "lion",
    "tiger",
    "bear",
    "wolf",
    "eagle",
    "snake",
    "frog",
    "rabbit",
    "mouse",
    "duck",
    "goat",
    "sheep",
]
_FORMS = [
    "Write a long story about",
    "Explain in great detail",
    "Write a long essay about",
    "Write a dialogue about",
    "Write a long letter about",
]


def questions(tokenizer: Any, split: Split) -> Iterator[tuple[str, list[int]]]:
    """Yield prompts of the model's own samples: a name, and a chat's token ids."""
    for form in _FORMS:
        for subject in _SUBJECTS:
            if belongs(name := f"own-{form} {subject}".replace(" ", "_"), split):
                yield name, chat(tokenizer, f"{form} {subject}.")
