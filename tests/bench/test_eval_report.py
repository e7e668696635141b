import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lethe_bench.accuracy import harness as adapter
from lethe_bench.accuracy import plots, report
from lethe_bench.accuracy.harness import HarnessPlan
from lethe_bench.accuracy.loading import parse
from lethe_bench.accuracy.plots import Point, kept_per_layer, kept_share
from lethe_bench.accuracy.report import draw, to_markdown, write
from lethe_bench.accuracy.results import Results
from lethe_bench.accuracy.store import Store
from lethe_bench.statistics import mcnemar, paired, paired_means, pooled_mean, wilson
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError

DATA = {
    "name": "small",
    "model_path": "/private/models/reasoner",
    "tasks": [{"family": "chain", "problems": 4}, {"family": "walk", "problems": 4}],
    "grid": {
        "policies": ["lethe", "random"],
        "budgets": [{"tokens": 48, "interval": 12}, {"tokens": 24, "interval": 6}],
    },
}
RIGHT = {
    "full": "11111110",
    "lethe@48": "11110111",
    "random@48": "10001111",
    "lethe@24": "00001100",
    "random@24": "00000000",
}
"""Arm -> whether it solves chain/0 .. chain/3, walk/0 .. walk/3."""


def line(number, ok, arm, sample=0, **changes):
    task = "chain" if number < 4 else "walk"
    held = 50.0 if arm == "full" else 20.0
    evicted = [] if arm == "full" or number == 7 else [30, 10]
    return {
        "id": f"{task}/{number % 4}",
        "sample": sample,
        "task": task,
        "question": "q",
        "answer": "a",
        "output": "o",
        "ok": ok,
        "tokens": 101,
        "prompt_tokens": 9,
        "finish": "length" if number == 0 else "stop",
        "limit": 900,
        "seconds": 1.0,
        "rid": f"{arm}{number}{sample}",
        "segment": 1 + (number > 3),
        "at": 10.0,
        "memory": {
            "rounds": 2 if evicted else 0,
            "evicted_per_layer": evicted,
            "steps": 100,
            "own_held_mean": held,
            "own_stock_mean": 50.0,
        },
    } | changes


def directory(tmp_path, right=RIGHT, device="cpu", **changes):
    store = Store(tmp_path)
    store.begin(parse({**DATA, **changes}, "small.yaml"), "lethe eval run small.yaml")
    store.note_server("stock", {"command": ["python", "-m", "sglang.launch_server"], "device": device})
    for arm, oks in right.items():
        store.append(store.generations(arm), [line(i, ok == "1", arm) for i, ok in enumerate(oks)])
    return tmp_path


def row(page, arm, section="All tasks"):
    table = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    head, found = (
        [cell.strip() for cell in text.strip("|").split("|")]
        for text in (
            next(x for x in table.splitlines() if x.startswith("| arm")),
            next(x for x in table.splitlines() if x.startswith(f"| {arm} ")),
        )
    )
    return dict(zip(head, found, strict=True))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_an_interval_of_a_proportion_is_wilsons():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="11 of 10"):
        wilson(11, 10)


def test_the_test_of_pairs_is_exact():
    assert mcnemar(6, 0) == pytest.approx(2 / 64) and mcnemar(1, 1) == mcnemar(0, 0) == 1
    found = paired([True, True, False, True], [False, True, True, False])
    assert (found.gain, found.wins, found.losses, found.p) == (0.25, 2, 1, 1.0)
    assert found.low < 0 < found.high
    with pytest.raises(ValueError, match="same problems"):
        paired([True], [])


def test_a_pooled_mean_resamples_within_its_strata():
    constant = pooled_mean([[1.0] * 30, [0.0] * 10])
    assert constant == (0.75, 0.75, 0.75), "between strata nothing varies"
    mixed = pooled_mean([[1.0, 0.0] * 50])
    assert mixed.mean == 0.5
    assert (mixed.low, mixed.high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.015)
    assert pooled_mean([[1.0, 0.0] * 50]) == mixed, "the seed is fixed"
    with pytest.raises(ValueError, match="at least one"):
        pooled_mean([[]])


def test_paired_means_count_problems_and_flip_their_signs():
    better = paired_means([([0.5] * 12, [0.25] * 12), ([1.0] * 3, [1.0] * 3)])
    assert better.gain == pytest.approx(0.2) and (better.wins, better.losses) == (12, 0)
    assert better.p < 0.01 and better.low == better.high == pytest.approx(0.2)
    even = paired_means([([0.5, 0.25] * 6, [0.25, 0.5] * 6)])
    assert even.gain == 0 and even.p == 1 and even.low < 0 < even.high
    with pytest.raises(ValueError, match="same problems"):
        paired_means([([1.0], [])])


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_can_be_counted_by_hand(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path)), [])
    lethe = row(page, "lethe@48")
    low, high = wilson(7, 8)
    assert lethe["right"] == f"87.5 [{100 * low:.1f}, {100 * high:.1f}]"
    assert (lethe["memory"], lethe["held"], lethe["tokens"]) == ("40.0 %", "20", "101")
    assert lethe["evicted from"] == "87.5 %" and lethe["right there (full)"] == "85.7 % (100.0 %)"
    assert lethe["cut off"] == "12.5 %"
    gain = paired([c == "1" for c in RIGHT["lethe@48"]], [c == "1" for c in RIGHT["random@48"]])
    assert lethe["against random"] == f"+25.0 [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], p 0.62, 3:1"
    assert lethe["against full"].startswith("+0.0 [") and lethe["against full"].endswith("p 1.00, 1:1")


def test_an_arm_is_compared_with_random_at_its_own_budget_and_full_with_nothing(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path)), [])
    assert row(page, "lethe@24")["against random"].endswith(", 2:0")
    assert row(page, "random@24")["against random"] == "-"
    full = row(page, "full")
    assert (
        full["memory"] == "100.0 %"
        and full["against full"] == full["evicted from"] == full["right there (full)"] == "-"
    )


def test_every_task_has_a_table_of_its_own(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path)), [])
    assert row(page, "lethe@48", "Chain")["right"].startswith("100.0 [")
    assert row(page, "lethe@48", "Walk")["right"].startswith("75.0 [")
    assert row(page, "lethe@24", "Walk")["against full"].startswith("-25.0 [")
    assert "speed" not in row(page, "lethe@48", "Walk")


def test_every_row_has_as_many_cells_as_its_head(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path)), [])
    widths = [text.count("|") for text in page.splitlines() if text.startswith("|")]
    assert [set(part) for part in (widths[:7], widths[7:11], widths[11:])] == [{12}, {4}, {11}]


def test_pairs_are_taken_on_what_both_arms_answered(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path, {"full": "1111", "lethe@48": "11110111"})), [])
    assert row(page, "lethe@48")["against full"] == "+0.0 [+0.0, +0.0], p 1.00, 0:0"
    assert "**Unfinished**: full has 4 of 8, random@48 has 0 of 8, lethe@24 has 0 of 8, random@24 has 0 of 8" in page


def test_a_finished_experiment_is_not_called_unfinished_and_an_empty_one_has_no_table(tmp_path):
    assert "Unfinished" not in to_markdown(Results.read(directory(tmp_path / "a")), [])
    assert write(directory(tmp_path / "b", {})).endswith("No reply yet.")


def test_lethe_is_compared_with_every_policy_of_its_own_budget(tmp_path):
    page = to_markdown(Results.read(directory(tmp_path)), [])
    found = page.split("## lethe against each policy of its budget")[1].split("##")[0]
    assert "| lethe@48 | random@48 | +25.0 [" in found and ", 3:1 |" in found
    assert "| lethe@24 | random@24 | +25.0 [" in found and "@24 | random@48" not in found
    assert "against each policy" not in to_markdown(Results.read(directory(tmp_path / "b", {"full": "1111"})), [])


def test_every_reply_is_in_a_table_without_its_text(tmp_path):
    write(directory(tmp_path))
    lines = (tmp_path / "replies.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 * 8
    assert lines[0] == "arm,problem,sample,ok,tokens,finish,rounds,evicted,steps,held,stock"
    assert "lethe@48,walk/0,0,0,101,stop,2,40,100,20.0,50.0" in lines
    assert "full,chain/0,0,1,101,length,0,0,100,50.0,50.0" in lines


def test_several_samples_are_clustered_by_problem(tmp_path):
    sampling = {"temperature": 0.6, "samples": 2, "max_new_tokens": 900}
    store = Store(directory(tmp_path, {}, sampling=sampling))
    for arm, oks in (("full", "11111111"), ("lethe@48", "11111110")):
        for sample in (0, 1):
            found = [line(i, ok == "1" or sample == 1, arm, sample) for i, ok in enumerate(oks)]
            store.append(store.generations(arm), found)
    results = Results.read(tmp_path)
    lethe = results.replies["lethe@48"]
    assert lethe.strata()["walk"] == {"walk/0": 1, "walk/1": 1, "walk/2": 1, "walk/3": 0.5}
    assert lethe.accuracy().mean == 15 / 16 and lethe.accuracy().high == 1
    found = lethe.against(results.replies["full"])
    assert (found.gain, found.wins, found.losses) == (-1 / 16, 0, 1) and found.p > 0.9
    page = to_markdown(results, [])
    assert "bootstrap over problems" in page and "sign-flip" in page and "temperature 0.6" in page


def test_memory_weighs_requests_by_their_steps(tmp_path):
    store = Store(directory(tmp_path, {}))
    memory = {"rounds": 1, "evicted_per_layer": [1]}
    short = memory | {"steps": 100, "own_held_mean": 50.0, "own_stock_mean": 50.0}
    long = memory | {"steps": 300, "own_held_mean": 30.0, "own_stock_mean": 150.0}
    store.append(store.generations("lethe@48"), [line(0, True, "x", memory=short), line(1, True, "x", memory=long)])
    lethe = Results.read(tmp_path).replies["lethe@48"]
    assert lethe.memory == pytest.approx((5000 + 9000) / (5000 + 45000)) and lethe.held == pytest.approx(14000 / 400)


def test_speed_is_counted_over_the_time_that_every_run_took(tmp_path):
    results = Results.read(directory(tmp_path / "cpu"))
    assert results.replies["full"].speed == pytest.approx(8 * 101 / 20)
    page = to_markdown(results, [])
    assert row(page, "lethe@48")["speed"] == "1.00 x" and "for orientation only" in page and "tok/s" not in page
    page = to_markdown(Results.read(directory(tmp_path / "gpu", device="cuda")), [])
    assert row(page, "lethe@48")["speed"] == "40 tok/s, 1.00 x" and "for orientation only" not in page


def test_the_page_says_what_was_run_and_where_without_a_path_of_this_machine(tmp_path):
    page = write(directory(tmp_path))
    assert (
        "\n    lethe eval run small.yaml\n" in page
        and "- stock server: `python -m sglang.launch_server` (device cpu)" in page
    )
    assert (
        "4 of chain, walk (reference chains of 200 to 560 tokens), one reply each of at most 2x the reference" in page
    )
    assert "cores" in page and "split `test`" in page
    assert str(tmp_path) not in page and sys.prefix not in page and "/private" not in page
    assert (tmp_path / "report.md").read_text() == page + "\n"


# -- pictures ----------------------------------------------------------------------------------------------------------

ROUNDS = [
    {"round": 0, "prefix": 10, "tail": 14, "kept": [[10, 12], [12]]},
    {"round": 1, "prefix": 10, "tail": 16, "kept": [[10, 15], [10, 11, 12]]},
]


def test_a_trace_becomes_the_share_of_layers_that_keep_each_token():
    expected = [[0.5, 0, 1, 0, math.nan, math.nan], [1, 0.5, 0.5, 0, 0, 0.5]]
    np.testing.assert_allclose(kept_share(ROUNDS), expected)
    assert kept_share([]).shape == (0, 0)


def test_tokens_kept_per_layer_are_means_over_rounds_of_all_traces():
    assert kept_per_layer([{"rounds": ROUNDS}, {"rounds": ROUNDS[:1]}]) == pytest.approx([2, 5 / 3])


def traced(tmp_path):
    store = Store(directory(tmp_path))
    store.append(
        store.traces,
        [
            {"arm": arm, "id": "chain/0", "rid": "r", "prompt_tokens": 9, "tokens": 50, "rounds": ROUNDS}
            for arm in ("lethe@48", "random@48", "lethe@24")
        ],
    )
    return Results.read(tmp_path)


def test_the_pictures_get_the_points_of_the_table(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_accuracy", lambda path, panels, full: drawn.update(accuracy=(panels, full)))
    monkeypatch.setattr(plots, "plot_layers", lambda path, panels: drawn.update(layers=panels))
    monkeypatch.setattr(plots, "plot_kept", lambda path, panels: drawn.update({path.name: panels}))
    draw(traced(tmp_path), tmp_path)
    panels, full = drawn["accuracy"]
    assert list(panels) == ["all tasks", "chain", "walk"] and list(panels["walk"]) == ["lethe", "random"]
    assert panels["all tasks"]["lethe"] == [Point(0.4, 7 / 8, *wilson(7, 8)), Point(0.4, 2 / 8, *wilson(2, 8))]
    assert full["chain"] == Point(1.0, 1.0, *wilson(4, 4))
    assert drawn["layers"] == {"48 tokens": {"lethe": [2, 2], "random": [2, 2]}, "24 tokens": {"lethe": [2, 2]}}
    assert list(drawn["kept-48.png"]) == ["lethe@48", "random@48"] and drawn["kept-24.png"] == {"lethe@24": ROUNDS}


def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    traced(tmp_path)
    page = write(tmp_path)
    for name in ("accuracy.png", "layers.png", "kept-48.png", "kept-24.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in page


def test_without_matplotlib_the_page_says_how_to_get_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    assert "pip install 'lethe-sglang[bench]'" in write(directory(tmp_path))


def test_a_missing_matplotlib_is_found_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plots.available()


def test_results_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("experiment: 3\nruns: []\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        Results.read(tmp_path)


def test_a_report_whose_reader_has_gone_is_written_without_a_word(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lethe_sglang.cli.main", "eval", "report", str(directory(tmp_path))]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"") and (tmp_path / "report.md").is_file()


def test_an_arm_without_replies_at_the_same_budget_has_no_peer(tmp_path):
    results = Results.read(directory(tmp_path, {"lethe@48": "1" * 8, "random@24": "1" * 8}))
    assert results.peer(results.replies["lethe@48"].arm) is None
    assert report.to_markdown(results, []).count("against random") >= 1


# -- the harness -------------------------------------------------------------------------------------------------------


def harness(monkeypatch, evaluate):
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=evaluate))
    answers = {
        "/server_info": {"internal_states": [{"lethe": {"policy": "h2o", "budget_tokens": 64, "interval": 8}}]},
        "/v1/models": {"data": [{"id": "served"}]},
    }
    monkeypatch.setattr(adapter, "_ask", lambda url, path: answers[path])


def test_the_harness_runs_against_the_server_and_its_results_are_kept(monkeypatch, tmp_path, capsys):
    asked = {}

    def evaluate(**arguments):
        asked.update(arguments)
        samples = {"gsm8k": [{"doc_id": 0, "resps": [["x"]]}]}
        return {"results": {"gsm8k": {"exact_match": 0.5}}, "samples": samples, "odd": object()}

    harness(monkeypatch, evaluate)
    options = [
        "--url",
        "http://127.0.0.1:1/",
        "--tasks",
        "gsm8k, aime24",
        "--out",
        str(tmp_path),
        "--limit",
        "5",
        "--chat",
    ]
    assert program.main(["eval", "lm-eval", *options, "--max-new-tokens", "99"]) == 0
    assert asked["model"] == "local-chat-completions" and asked["tasks"] == ["gsm8k", "aime24"] and asked["limit"] == 5
    assert asked["model_args"]["base_url"] == "http://127.0.0.1:1/v1/chat/completions" and asked["apply_chat_template"]
    assert asked["model_args"]["model"] == "served" and asked["gen_kwargs"] == {"max_gen_toks": 99}
    page = json.loads((tmp_path / "lm-eval.json").read_text())
    assert page["results"] == {"gsm8k": {"exact_match": 0.5}} and page["eviction"]["policy"] == "h2o"
    assert json.loads((tmp_path / "lm-eval-samples.jsonl").read_text())["task"] == "gsm8k"
    assert capsys.readouterr().out == "gsm8k\texact_match\t0.5\n"


def test_completions_are_sent_as_text_unless_a_tokenizer_is_given():
    plain = HarnessPlan(url="http://h:1", tasks=("a",)).arguments("m")
    assert plain["model"] == "local-completions" and plain["model_args"]["base_url"] == "http://h:1/v1/completions"
    assert plain["model_args"]["tokenizer_backend"] == "none" and plain["model_args"]["tokenized_requests"] is False
    given = HarnessPlan(url="http://h:1", tasks=("a",), tokenizer="models/reasoner").arguments("m")["model_args"]
    assert (given["tokenizer"], given["tokenizer_backend"]) == ("models/reasoner", "huggingface")


def test_a_missing_harness_an_unknown_task_and_a_silent_server_are_one_line_each(monkeypatch, tmp_path, capsys):
    options = ["eval", "lm-eval", "--url", "http://127.0.0.1:1", "--tasks", "nowhere", "--out", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert program.main(options) == 2
    assert "pip install 'lethe-sglang[bench]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=None))
    assert program.main(options) == 2
    assert "--url http://127.0.0.1:1: no SGLang server answers there" in capsys.readouterr().err

    def evaluate(**arguments):
        raise KeyError("nowhere")

    harness(monkeypatch, evaluate)
    assert program.main(options) == 2
    assert "lm-eval --tasks nowhere: 'nowhere'; see: lm_eval ls tasks" in capsys.readouterr().err
