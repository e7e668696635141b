"""Problems are what they say: solvers that only read the question find the answer, and chains say it on their way."""

from __future__ import annotations

import re

import pytest

from lethe_bench.tasks import (
    END_THINK,
    FAMILIES,
    INDICES,
    NAMES,
    PUNCTUATION,
    RESULTS,
    TRAINED,
    problem,
    tokens_of,
)

ALPHABET = {*"0123456789", *PUNCTUATION, *INDICES, *RESULTS, *NAMES, *NAMES.upper(), *(f"{name}'" for name in NAMES)}


def solve_walk(question):
    edge = dict(re.findall(r"(\w)(\w)(?:;|$)", question.split("?")[0]))
    node, hundreds, rest = re.search(r"\?(\w)(\d)#(\d\d)", question).groups()
    for _ in range(int(hundreds + rest)):
        node = edge[node.lower()]
    return node


def fact(facts, name):
    return re.search(rf"{name}'\d{name.upper()}\d", facts)[0]


def solve_recall(question):
    facts, rest = question.split(";", 1)
    walk, asked = rest.split("!")
    return f"{solve_walk(walk)}!{fact(facts, asked[0])}"


def solve_addition(question):
    number = {}
    for line in question.split(";?")[0].split(";"):
        last, before, first = re.fullmatch(r"\w(\d)\w(\d)\w'(\d)", line).groups()
        number[line[0]] = int(first + before + last)
    total = sum(number[name] for name in re.findall(r"#\d\d(\w)", question)) % 1000
    return f"{total:03d}"[::-1]


def solve_script(question):
    code, asked = question.split(";?")
    value = {}
    for line in code.split(";"):
        name, rule = line[3], line[4:]
        value[name.upper()] = int(rule) if rule.isdigit() else (value[rule[0]] + value[rule[3]]) % 10
    return "".join(f"{name}{value[name]}" for name in asked)


def solve_chain(question):
    given, asked = question.split(";?")
    rule = {line[0].upper(): (line[1], int(line[-1])) for line in given.split(";")}

    def value(name):
        base, add = rule[name]
        return add + (value(base) if base != "." else 0)

    return "".join(f"!{int(i)}{value(name.upper()) % 10}" for i, name in re.findall(r"#(\d\d)(\w)", asked))


def solve_mixed(question):
    facts, rest = question.split(";", 1)
    chain, asked = rest.rsplit("!", 1)
    return f"{solve_chain(chain)}!{fact(facts, asked[0])}"


SOLVERS = {
    "walk": solve_walk,
    "recall": solve_recall,
    "addition": solve_addition,
    "script": solve_script,
    "chain": solve_chain,
    "mixed": solve_mixed,
}


def test_every_family_has_a_solver_and_one_is_held_out_of_training():
    assert set(SOLVERS) == set(FAMILIES) and set(FAMILIES) - set(TRAINED) == {"mixed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_solver_that_reads_the_question_alone_finds_the_answer(family):
    for i in range(150):
        item = problem(family, "unit", i, (60, 2000))
        assert SOLVERS[family](item.question) == item.answer, item.question
        assert set(tokens_of(item.question + item.thinking + item.answer)) <= ALPHABET


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verifier_takes_the_answer_and_nothing_else(family):
    item, other = problem(family, "unit", 0), problem(family, "unit", 1)
    kind = FAMILIES[family]
    assert kind.verify(item, item.thinking + END_THINK + item.answer) and kind.verify(item, item.answer)
    assert not kind.verify(item, item.thinking + END_THINK + other.answer)
    assert not kind.verify(item, item.thinking), "a chain that never answers"
    assert not kind.verify(item, item.thinking + END_THINK + item.answer + item.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_knob_sets_the_length_of_the_chain(family):
    kind = FAMILIES[family]
    for tokens in (120, 300, 600):
        lengths = [len(tokens_of(problem(family, "unit", i, (tokens, tokens)).thinking)) for i in range(30)]
        assert max(lengths) <= 1.1 * tokens + 40
        if family not in ("chain", "mixed"):  # their chains end when every name has been asked for
            assert min(lengths) >= min(tokens, kind.longest) * 0.75 - 40
    longest = max(len(tokens_of(problem(family, "unit", i, (2000, 2000)).thinking)) for i in range(5))
    assert longest <= 1.1 * kind.longest + 40


def test_splits_and_indices_give_different_problems_and_the_same_one_again():
    drawn = [problem("walk", split, i).question for split in ("train", "tune", "test") for i in range(50)]
    assert len(set(drawn)) == len(drawn)
    assert problem("walk", "tune", 3) == problem("walk", "tune", 3)
