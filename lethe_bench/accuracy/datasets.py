r"""Problems to evaluate on: the generated families, and benchmarks read from local files; each knows a right reply.

=========  ======================================  ===================================================================
name       file                                    keys
=========  ======================================  ===================================================================
gsm8k      JSON lines                              ``question``, ``answer`` (ends with ``#### 42``)
math500    JSON lines                              ``problem``, ``answer`` (or a boxed ``solution``), ``unique_id``
aime       JSON lines                              ``problem`` or ``question``, ``answer``, ``id``, in any case
gpqa       CSV with a header                       ``Question``, ``Correct Answer``, ``Incorrect Answer 1`` to ``3``
=========  ======================================  ===================================================================

A reply's answer is what its last ``\boxed{}`` holds, after the thinking section if that was closed.
"""

from __future__ import annotations

import csv
import functools
import importlib
import json
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lethe_bench.tasks import END_THINK, FAMILIES, Problem
from lethe_bench.tasks import problem as generate
from lethe_sglang.config import ConfigError
from lethe_sglang.errors import show

_BOX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_LETTER = "\n\nPlease reason step by step, and put the letter of your final answer within \\boxed{}."
LETTERS = "ABCD"


class Item(NamedTuple):
    """One problem as it is asked and marked.

    Attributes
    ----------
    id
        Unique in an experiment: the task, a slash, what names the problem in it.
    task
        Family or data set.
    prompt
        What the user says.
    answer
        The right answer, for people to read.
    grade
        Whether a reply's text is right.
    reference
        A reply that is right, where one is known.
    """

    id: str
    task: str
    prompt: str
    answer: str
    grade: Callable[[str], bool]
    reference: str = ""


class Dataset(NamedTuple):
    """A benchmark: reads (id, question, answer) from a file, what is added to a question, how a reply is marked."""

    read: Callable[[Path], Iterator[tuple[str, str, str]]]
    instruction: str
    grade: Callable[[str, str], bool]


# -- items -------------------------------------------------------------------------------------------------------------


def family_items(family: str, split: str, problems: int, tokens: tuple[int, int]) -> list[Item]:
    """Return the first problems of a family in a split (see :func:`lethe_bench.tasks.problem`)."""
    items = []
    for index in range(problems):
        made = generate(family, split, index, tokens)
        reference = f"{made.thinking}{END_THINK}{made.answer}"
        grade = functools.partial(_grade_family, made)
        items.append(Item(f"{family}/{index}", family, made.question, made.answer, grade, reference))
    return items


def dataset_items(name: str, path: Path, problems: int | None = None, instruction: str | None = None) -> list[Item]:
    """Read a benchmark.

    Parameters
    ----------
    name
        A key of ``DATASETS``.
    path
        Its file.
    problems
        How many, from the beginning; None is all.
    instruction
        Put after every question; None takes the benchmark's own.

    Raises
    ------
    ConfigError
        If the file cannot be read, lacks a key, or has too few problems; the message names the line.
    """
    dataset = DATASETS[name]
    suffix = dataset.instruction if instruction is None else instruction
    items = []
    try:
        for key, question, answer in dataset.read(path):
            grade = functools.partial(dataset.grade, answer)
            items.append(Item(f"{name}/{key}", name, question + suffix, answer, grade))
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}; give the path of a local file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: {path}: is not UTF-8 text") from None
    if problems is not None and problems > len(items):
        raise ConfigError(f"{name}: {path} has {len(items)} problems; set problems to at most that, or to null")
    if len({item.id for item in items}) < len(items):
        raise ConfigError(f"{name}: {path}: two problems have the same id; give every problem an id of its own")
    return items[:problems]


def _grade_family(problem: Problem, text: str) -> bool:
    return END_THINK in text and FAMILIES[problem.family].verify(problem, text)


# -- files -------------------------------------------------------------------------------------------------------------


def _gsm8k(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, number, line in _json_lines(path):
        solution = _field(line, where, "answer")
        answer = solution.rpartition("####")[2].strip()
        if "####" not in solution or not answer:
            raise ConfigError(f"{where}: 'answer' has no '#### number' at its end")
        yield str(number), _field(line, where, "question"), answer


def _math500(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, number, line in _json_lines(path):
        answer = line["answer"] if "answer" in line else last_boxed(_field(line, where, "solution"))
        if not isinstance(answer, str) or not answer:
            raise ConfigError(f"{where}: has neither an 'answer' nor a 'solution' with a \\boxed{{}}")
        yield str(line.get("unique_id", number)), _field(line, where, "problem"), answer


def _aime(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, number, given in _json_lines(path):
        line = {key.lower(): value for key, value in given.items()}
        question = "problem" if "problem" in line else "question"
        yield str(line.get("id", number)), _field(line, where, question), _field(line, where, "answer")


def _gpqa(path: Path) -> Iterator[tuple[str, str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file)):
            where = f"{path} problem {number + 1}"
            right = _field(line, where, "Correct Answer")
            choices = [right, *(_field(line, where, f"Incorrect Answer {i}") for i in (1, 2, 3))]
            order = list(range(4))
            random.Random(f"gpqa/{number}").shuffle(order)
            listed = "\n".join(f"{letter}) {choices[i].strip()}" for letter, i in zip(LETTERS, order, strict=True))
            question = f"{_field(line, where, 'Question').strip()}\n\n{listed}"
            yield str(line.get("Record ID") or number), question, LETTERS[order.index(0)]


def _json_lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file):
            if not text.strip():
                continue
            where = f"{path} line {number + 1}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not JSON: {error.msg}") from None
            if not isinstance(line, dict):
                raise ConfigError(f"{where}: holds {show(line)}, expected an object")
            yield where, number, line


def _field(line: dict[str, Any], where: str, key: str) -> str:
    value = line.get(key)
    if value is None or not str(value).strip():
        raise ConfigError(f"{where}: has no {key!r}, only {', '.join(sorted(map(str, line)))}")
    return str(value)


# -- answers -----------------------------------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` of a text holds, braces matched; None without one or if it is cut off."""
    commands = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))
    if not commands:
        return None
    rest = text[commands[-1].end() :]
    if not rest.startswith("{"):
        word = re.match(r"[^\s$]+", rest)
        return word.group().rstrip(".,") if word else None
    depth, i = 0, 0
    while i < len(rest):
        if rest[i] == "\\":
            i += 1
        elif rest[i] in "{}":
            depth += 1 if rest[i] == "{" else -1
            if not depth:
                return rest[1:i].strip()
        i += 1
    return None


def grade_math(answer: str, text: str) -> bool:
    """Whether a reply's boxed answer is mathematically ``answer``: by ``math_verify`` too, where it is installed."""
    found = last_boxed(text.rpartition(END_THINK)[2])
    if found is None:
        return False
    if same_math(answer, found):
        return True
    library = _math_verify()
    if library is None:
        return False
    try:
        gold, given = (library.parse(f"\\boxed{{{latex}}}") for latex in (answer, found))
        return bool(library.verify(gold, given))
    except Exception:  # sympy raises all kinds of errors on what a model may write
        return False


def grade_letter(answer: str, text: str) -> bool:
    """Whether a reply's boxed answer begins with the letter ``answer``."""
    found = last_boxed(text.rpartition(END_THINK)[2])
    match = re.match(r"\(?([A-Z])(?![A-Za-z])", _plain(found or ""))
    return match is not None and match.group(1) == answer


def math_verifier() -> str:
    """Say what marks mathematical answers here: it decides how strict the results are."""
    if _math_verify() is None:
        return "the built-in LaTeX normaliser (math-verify of the extra 'bench' is not installed)"
    return f"the built-in LaTeX normaliser, then math-verify {metadata.version('math-verify')}"


@functools.cache
def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ImportError:
        return None


def same_math(one: str, other: str) -> bool:
    """Whether two LaTeX answers are the same after normalisation: as text, as numbers, or part by part."""
    a, b = _normal(one), _normal(other)
    if a == b:
        return bool(a)
    if (x := _number(a)) is not None and (y := _number(b)) is not None:
        return x == y
    (brackets, parts), (others, rest) = _parts(a), _parts(b)
    if brackets != others or len(parts) != len(rest) or len(parts) < 2:
        return False
    return all(same_math(p, q) for p, q in zip(parts, rest, strict=True))


_PLAIN = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=\S)\\(?:text|textrm|mathrm|mbox)\s*\{\s+[^{}]*\}(?:\^\d|\^\{\d\})?$")
_GONE = re.compile(
    r"\\(?:left|right|displaystyle|qquad|quad|degree|circ)(?![A-Za-z])|\\[!,;: %$]|\^\{\\circ\}|\^\\circ|[$%~]|\s+"
)
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)(\d*)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}")


def _plain(text: str) -> str:
    return _PLAIN.sub(r"\1", text).strip()


def _normal(text: str) -> str:
    """Write a LaTeX answer in one way of the many: no spacing, units, styles, or abbreviated braces."""
    text = _plain(_UNIT.sub("", text.strip().rstrip(".").strip()))
    text = _GONE.sub("", text.replace("{,}", ",")).rstrip(".^")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[A-Za-z](?:\([A-Za-z]\))?(?:=|\\in(?![a-z]))", "", text)
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _number(text: str) -> Fraction | None:
    r"""Read an integer, a decimal, ``a/b``, ``\frac{a}{b}`` or a mixed number."""
    try:
        if match := _FRACTION.fullmatch(text):
            sign, whole, above, below = match.groups()
            value = Fraction(whole or 0) + Fraction(above) / Fraction(below)
            return -value if sign else value
        return Fraction(text) if re.fullmatch(r"-?[\d.]+(?:/\d+)?", text) else None
    except (ValueError, ZeroDivisionError):
        return None


def _parts(text: str) -> tuple[str, list[str]]:
    """Split a tuple, an interval or a list into its brackets and what its outer commas part."""
    brackets = ""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, text = text[0] + text[-1], text[1:-1]
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return brackets, parts


DATASETS: dict[str, Dataset] = {
    "gsm8k": Dataset(_gsm8k, _BOX, grade_math),
    "math500": Dataset(_math500, _BOX, grade_math),
    "aime": Dataset(_aime, _BOX, grade_math),
    "gpqa": Dataset(_gpqa, _LETTER, grade_letter),
}
