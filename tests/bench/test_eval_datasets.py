import csv
import json
import sys
from types import SimpleNamespace

import pytest

from lethe_bench.accuracy import datasets
from lethe_bench.accuracy.datasets import (
    LETTERS,
    dataset_items,
    family_items,
    grade_letter,
    grade_math,
    last_boxed,
    math_verifier,
    same_math,
)
from lethe_bench.tasks import FAMILIES
from lethe_sglang.config import ConfigError

GSM8K = {"question": "Ann has 3 times 400 + 34 eggs?", "answer": "3*400=<<3*400=1200>>1200\n1200+34=1234\n#### 1,234"}
MATH500 = {
    "problem": "What is $1/2$?",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
AIME24 = {"ID": "2024-I-1", "Problem": "Find it.", "Solution": "...", "Answer": 33}
AIME25 = {"problem": "Find it.", "answer": "033", "id": "0"}
GPQA = {
    "Question": "Which?",
    "Correct Answer": "the right one\n",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
    "Record ID": "rec1",
    "Subdomain": "Physics",
}


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    """Mark by the normaliser alone, whatever is installed."""
    monkeypatch.setattr(datasets, "_math_verify", lambda: None)


def json_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def gpqa(path, *lines):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(GPQA))
        writer.writeheader()
        writer.writerows(lines)
    return path


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "id", "right", "wrong"),
    [
        ("gsm8k", GSM8K, "gsm8k/0", "so \\boxed{1234} eggs", "so \\boxed{1235}"),
        ("math500", MATH500, "math500/test/algebra/1.json", "\\boxed{0.5}", "\\boxed{2}"),
        (
            "math500",
            {k: v for k, v in MATH500.items() if k != "answer"},
            "math500/test/algebra/1.json",
            "\\boxed{\\dfrac12}",
            "\\boxed{\\frac13}",
        ),
        ("aime", AIME24, "aime/2024-I-1", "\\boxed{033}", "33"),
        ("aime", AIME25, "aime/0", "\\boxed{33}", "\\boxed{330}"),
        ("aime", {"question": "Find it.", "answer": "7"}, "aime/0", "\\boxed{7}", ""),
    ],
)
def test_a_benchmark_is_read_in_its_published_format_and_marks_replies(tmp_path, name, line, id, right, wrong):
    (item,) = dataset_items(name, json_lines(tmp_path / "file.jsonl", line))
    assert (item.id, item.task) == (id, name)
    assert item.prompt.startswith(str(next(line[k] for k in ("question", "problem", "Problem") if k in line)))
    assert "\\boxed{}" in item.prompt
    assert item.grade(f"thinking</think>{right}") and not item.grade(f"thinking</think>{wrong}")


def test_choices_are_shuffled_the_same_way_every_time_and_the_letter_follows(tmp_path):
    lines = [{**GPQA, "Record ID": f"rec{i}", "Correct Answer": f"right {i}"} for i in range(40)]
    path = gpqa(tmp_path / "gpqa.csv", *lines)
    items = dataset_items("gpqa", path)
    assert [item[:4] for item in items] == [item[:4] for item in dataset_items("gpqa", path)]
    assert {item.answer for item in items} == set(LETTERS)
    for i, item in enumerate(items):
        assert f"\n{item.answer}) right {i}\n" in item.prompt + "\n"
        assert item.grade(f"so \\boxed{{\\text{{{item.answer}}}}}")
        assert not any(item.grade(f"\\boxed{{{letter}}}") for letter in LETTERS if letter != item.answer)


def test_an_instruction_of_ones_own_replaces_that_of_the_benchmark(tmp_path):
    path = json_lines(tmp_path / "m.jsonl", MATH500, {**MATH500, "unique_id": "2"})
    items = dataset_items("math500", path, problems=1, instruction=" Be brief.")
    assert [item.prompt for item in items] == ["What is $1/2$? Be brief."]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k", '{"question": "q", "answer": "no mark"}\n', r"line 1: 'answer' has no '#### number'"),
        ("gsm8k", '{"question": "q"}\n', r"line 1: has no 'answer', only question"),
        ("math500", '\n{"problem": "p"}\n', r"line 2: has no 'solution'"),
        ("math500", '{"problem": "p", "solution": "none"}\n', r"neither an 'answer' nor a 'solution' with"),
        ("aime", "{\n", r"line 1: not JSON"),
        ("aime", "[1]\n", r"line 1: holds \[1\], expected an object"),
        ("aime", '{"problem": "p", "answer": "1", "id": 3}\n' * 2, r"two problems have the same id"),
        ("gpqa", "Question,Correct Answer\nq,a\n", r"problem 1: has no 'Incorrect Answer 1'"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_with_its_line(tmp_path, name, text, message):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        dataset_items(name, path)


def test_a_missing_file_and_too_few_problems_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; give the path of a local file"):
        dataset_items("aime", tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="has 1 problems; set problems to at most that, or to null"):
        dataset_items("aime", json_lines(tmp_path / "a.jsonl", AIME24), problems=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_marks_its_own_reference_right_and_an_unfinished_reply_wrong(family):
    items = family_items(family, "test", 3, (200, 300))
    assert [item.id for item in items] == [f"{family}/{i}" for i in range(3)]
    for item in items:
        assert item.grade(item.reference) and item.reference.endswith(f"</think>{item.answer}")
        assert not item.grade(item.reference[:-1]) and not item.grade(item.answer)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"it is \boxed 5.", "5"),
        (r"\fbox{ 7 }", "7"),
        (r"\boxed{1} and \boxed{12", None),
        ("no box: 5", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


def test_a_box_in_the_thinking_section_does_not_count_once_that_is_closed():
    assert grade_math("5", r"maybe \boxed{5}") and grade_math("5", r"\boxed{4}</think>\boxed{5}")
    assert not grade_math("5", r"\boxed{5}</think>\boxed{4}") and not grade_math("5", r"\boxed{5}</think>4")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", "0.5"),
        (r"\dfrac{1}{2}", "1/2"),
        (r"-\frac{1}{2}", "-0.50"),
        (r"11\frac{1}{2}", "11.5"),
        ("1,234", "1234"),
        (r"1{,}234", "1234.0"),
        ("033", "33"),
        (r"5\text{ cm}", "5"),
        (r"12\text{ cm}^2", "12"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        (r"\$18.90", "18.9"),
        ("x = 5", "5"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\left(3, \dfrac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
        ("(1,2)", "(1.0, 2)"),
        (r"3\sqrt2", r"3\sqrt{2}"),
    ],
)
def test_one_answer_written_in_two_ways_is_the_same(one, other):
    assert same_math(one, other) and same_math(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2", "3"),
        ("", ""),
        ("(1,2]", "[1,2]"),
        ("(1,2)", "(2,1)"),
        (r"\frac{1}{3}", "0.33"),
        ("1/0", "1"),
        ("x", "y"),
        ("-5", "5"),
        ("(1,2)", "(1,2,3)"),
        (r"\sqrt{2}", "2"),
    ],
)
def test_different_answers_are_not_the_same(one, other):
    assert not same_math(one, other) and not same_math(other, one)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"\boxed{B}", True),
        (r"\boxed{(B)}", True),
        (r"\boxed{\textbf{B}}", True),
        (r"\boxed{B) the cell}", True),
        (r"\boxed{Both}", False),
        (r"\boxed{b}", False),
        ("B", False),
        (r"\boxed{A}", False),
    ],
)
def test_a_letter_is_read_from_the_box(text, right):
    assert grade_letter("B", text) is right


def test_math_verify_is_asked_after_the_normaliser_and_its_failures_are_wrong_answers(monkeypatch):
    def parse(text):
        if "crash" in text:
            raise RecursionError
        return text

    library = SimpleNamespace(parse=parse, verify=lambda gold, given: (gold, given) == (r"\boxed{a+b}", r"\boxed{b+a}"))
    assert not grade_math("a+b", r"\boxed{b+a}")
    monkeypatch.setattr(datasets, "_math_verify", lambda: library)
    assert grade_math("a+b", r"\boxed{b+a}") and grade_math("1", r"\boxed{1}")
    assert not grade_math("a+b", r"\boxed{b-a}") and not grade_math("a", r"\boxed{crash}")


def test_the_results_say_what_marked_them(monkeypatch):
    assert "is not installed" in math_verifier()
    monkeypatch.setattr(datasets, "_math_verify", lambda: object())
    monkeypatch.setattr(datasets.metadata, "version", lambda name: {"math-verify": "0.9"}[name])
    assert math_verifier().endswith("then math-verify 0.9")


def test_a_missing_math_verify_is_found_missing(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    datasets._math_verify.cache_clear()
    assert datasets._math_verify() is None
    datasets._math_verify.cache_clear()
