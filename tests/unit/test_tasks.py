"""Problems are what they say: solvers that only read the question find the answer, and chains say it on their way."""

from __future__ import annotations

import re

import pytest

from lethe_sglang.evaluation.tasks import END_THINK, FAMILIES, NAMES, PUNCTUATION, TRAINED, problem

ALPHABET = set("0123456789" + PUNCTUATION + NAMES + NAMES.upper())


def solve_walk(question):
    edge = dict(re.findall(r"(\w)>(\w)", question))
    node, steps = re.search(r"\?(\w)(\d{3})", question).groups()
    for _ in range(int(steps)):
        node = edge[node]
    return node


def solve_recall(question):
    asked = question[-1]
    return f"{solve_walk(question)}!{asked}{re.search(f'!{asked}([0-9]{{2}})', question)[1]}"


def solve_addition(question):
    number = dict(re.findall(r"(\w)=(\d{3})", question))
    total = sum(int(number[name][::-1]) for name in re.findall(r"#\d\d(\w)", question)) % 1000
    return f"{total:03d}"[::-1]


def solve_script(question):
    code, asked = question.split(";?")
    value = {}
    for line in code.split(";"):
        name, rule = line[2], line[4:]
        if rule.isdigit():
            value[name] = int(rule)
        else:
            value[name] = (value[rule[0]] + (1 if rule[1] == "+" else -1) * value[rule[2]]) % 10
    return "".join(f"{name.upper()}{value[name]}" for name in asked)


def solve_chain(question):
    given, asked = question.split(";?")
    rule = dict(line.split("=") for line in given.split(";"))

    def value(name):
        base, _, add = rule[name].rpartition("+")
        return (value(base) if base else 0) + int(add)

    return "".join(f"{name.upper()}{value(name) % 10}" for name in re.findall(r"#\d(\w)", asked))


def solve_mixed(question):
    stated, rest = question.split(";", 1)
    asked = rest[-1]
    return f"{solve_chain(rest[:-2])}!{asked}{re.search(f'!{asked}([0-9]{{2}})', stated)[1]}"


SOLVERS = {
    "walk": solve_walk, "recall": solve_recall, "addition": solve_addition, "script": solve_script,
    "chain": solve_chain, "mixed": solve_mixed,
}  # fmt: skip


def test_every_family_has_a_solver_and_one_is_held_out_of_training():
    assert set(SOLVERS) == set(FAMILIES) and set(FAMILIES) - set(TRAINED) == {"mixed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_solver_that_reads_the_question_alone_finds_the_answer(family):
    for i in range(150):
        item = problem(family, "unit", i, (60, 2000))
        assert SOLVERS[family](item.question) == item.answer, item.question
        assert set(item.question + item.thinking + item.answer) <= ALPHABET


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
        lengths = [len(problem(family, "unit", i, (tokens, tokens)).thinking) for i in range(30)]
        assert max(lengths) <= 1.1 * tokens + 40
        if family not in ("chain", "mixed"):  # their chains end when every name has been asked for
            assert min(lengths) >= 0.75 * tokens - 40
    assert max(len(problem(family, "unit", i, (2000, 2000)).thinking) for i in range(5)) <= 1.1 * kind.longest + 40


def test_splits_and_indices_give_different_problems_and_the_same_one_again():
    drawn = [problem("walk", split, i).question for split in ("train", "tune", "test") for i in range(50)]
    assert len(set(drawn)) == len(drawn)
    assert problem("walk", "tune", 3) == problem("walk", "tune", 3)
