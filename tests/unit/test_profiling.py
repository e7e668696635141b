"""The pass without its engine: prompts, what is kept of an interrupted pass, statistics, the command line."""

import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
from profiles import MODEL, SETTINGS, profile, record

from lethe_sglang.allocation import layer_budgets
from lethe_sglang.allocation.profile import PER_PROMPT, PER_QUERY, STATISTICS, Cost, Sensitivity, load
from lethe_sglang.cli import main as cli
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping
from lethe_sglang.profiling import run
from lethe_sglang.profiling.prompts import generated, hash_of, read
from lethe_sglang.profiling.records import Partial, longest, summarise
from lethe_sglang.profiling.run import Interrupted, Pass, assemble, collect, tokens_of, with_rule


class TestPrompts:
    def test_plain_text_has_a_prompt_a_line(self, tmp_path):
        (tmp_path / "p.txt").write_text("one\n\n  two \n")
        assert read(tmp_path / "p.txt") == [(("user", "one"),), (("user", "two"),)]

    def test_jsonl_takes_texts_messages_and_conversations(self, tmp_path):
        items = [
            "bare",
            {"prompt": "a"},
            {"question": "b", "answer": "x"},
            {"text": "c"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
        ]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
        assert read(tmp_path / "p.jsonl") == [
            (("user", "bare"),),
            (("user", "a"),),
            (("user", "b"),),
            (("user", "c"),),
            (("system", "s"), ("user", "u")),
            (("user", "h"),),
        ]

    def test_sharegpt_is_a_list_of_conversations_up_to_the_last_question(self, tmp_path):
        turns = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
        data = [{"id": 1, "conversations": [{"from": who, "value": text} for who, text in turns]}]
        (tmp_path / "p.json").write_text(json.dumps(data))
        assert read(tmp_path / "p.json") == [(("user", "q1"), ("assistant", "a1"), ("user", "q2"))]

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("p.jsonl", '{"prompt": "a"}\n{', "line 2: not JSON"),
            ("p.jsonl", '{"promt": "a"}', "line 1: no prompt in it; expected one of messages, conversations, prompt"),
            ("p.jsonl", '{"prompt": " "}', "line 1: no prompt in it"),
            ("p.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}', "line 1: a turn needs role"),
            ("p.json", '{"prompt": "a"}', "holds no list"),
            ("p.json", '[{"conversations": [{"from": "gpt", "value": "x"}]}]', "item 1: a conversation without a user"),
            ("p.txt", "\n \n", "holds no prompt"),
        ],
    )
    def test_a_bad_file_is_named_with_the_place(self, tmp_path, name, text, expected):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"--prompts {tmp_path / name}: ") and expected in str(caught.value)

    def test_generated_prompts_depend_on_the_seed_only_and_differ(self):
        first = list(itertools.islice(generated(1), 40))
        assert first == list(itertools.islice(generated(1), 40))
        assert len(set(first)) == 40
        assert not set(first) & set(itertools.islice(generated(2), 40))
        assert hash_of(first) != hash_of(first[::-1])

    def test_the_queue_puzzle_has_the_order_it_says(self):
        text = next(itertools.islice(generated(3), 4, None))[0][1]
        assert text.count("stands") == 4 and "Five people" in text

    def test_the_template_is_used_unless_raw_or_missing(self):
        class Tokenizer:
            chat_template = "yes"

            def apply_chat_template(self, messages, tokenize, add_generation_prompt):
                return f"<{messages[0]['content']}>"

            def encode(self, text, add_special_tokens=True):
                return [int(add_special_tokens), *map(ord, text)]

        prompt, tokenizer = (("user", "a"),), Tokenizer()
        assert tokens_of(tokenizer, prompt, raw=False) == [0, *map(ord, "<a>")]
        assert tokens_of(tokenizer, prompt, raw=True) == [1, ord("a")]
        tokenizer.chat_template = None
        assert tokens_of(tokenizer, prompt, raw=False) == [1, ord("a")]


class TestInterruptedPass:
    def run(self, tmp_path, ask, total=7, concurrency=2, key="k", time_limit=None):
        return collect(total, concurrency, ask, Partial(tmp_path / "p.yaml", key), time_limit)[0]

    def asking(self, stop_after=None, seconds=0.0):
        self.asked = []

        def ask(numbers):
            if stop_after is not None and len(self.asked) >= stop_after:
                raise KeyboardInterrupt
            self.asked += numbers
            return [record(str(i), i / 10) for i in numbers], 1000

        return ask

    def test_a_whole_pass_asks_everything_once_in_lots(self, tmp_path, capsys):
        found = self.run(tmp_path, self.asking())
        assert self.asked == list(range(7)) and [r["rid"] for r in found] == list("0123456")
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 4 and shown[-1].startswith("lethe profile: 7 of 7 prompts, ")

    def test_an_interrupted_pass_goes_on_where_it_stopped(self, tmp_path, capsys):
        with pytest.raises(Interrupted, match=r"4 of 7 prompts are kept in .*the same command goes on from there"):
            self.run(tmp_path, self.asking(stop_after=4))
        resumed = self.run(tmp_path, self.asking())
        assert self.asked == [4, 5, 6]
        assert "going on from an interrupted pass, 4 of 7 prompts are there" in capsys.readouterr().err
        (tmp_path / "other").mkdir()
        assert resumed == self.run(tmp_path / "other", self.asking()), "resuming changes the result"

    def test_a_line_cut_off_in_the_middle_is_asked_again(self, tmp_path):
        with pytest.raises(Interrupted):
            self.run(tmp_path, self.asking(stop_after=4))
        path = tmp_path / "p.yaml.partial"
        path.write_text(path.read_text()[:-40])
        assert len(self.run(tmp_path, self.asking())) == 7
        assert self.asked == [3, 4, 5, 6]

    def test_what_another_pass_left_is_not_taken(self, tmp_path):
        with pytest.raises(Interrupted):
            self.run(tmp_path, self.asking(stop_after=4), key="other prompts")
        self.run(tmp_path, self.asking())
        assert self.asked == list(range(7))

    def test_a_time_limit_uses_what_is_done_and_one_lot_at_least(self, tmp_path):
        assert len(self.run(tmp_path, self.asking(), time_limit=1e-9)) == 2

    def test_prompts_without_a_decode_query_are_an_error_of_the_prompts(self, tmp_path):
        with pytest.raises(ConfigError, match="--prompts: no answer had a second token"):
            self.run(tmp_path, lambda numbers: ([], 0))

    def test_a_directory_that_cannot_be_written_is_an_error_of_out(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"--out: .*cannot be written"):
            self.run(tmp_path / "file", self.asking())

    def test_of_a_retracted_request_the_longest_run_counts(self):
        runs = [record("1", 0.1, queries=5), record("1", 0.2, queries=9), record("2", 0.3), record("1", 0.4, queries=2)]
        assert longest(runs) == [runs[1], runs[2]]


class TestStatistics:
    RECORDS = (record("0", 0.1, queries=10), record("1", 0.5, queries=30))

    def test_prompts_count_alike_and_queries_count_alike_within_a_length(self):
        found = summarise(self.RECORDS)
        assert list(found) == list(STATISTICS)
        for name in STATISTICS:
            assert found[name].mean == pytest.approx([0.3, 1.3, 2.3, 3.3])
            assert found[name].spread == pytest.approx([statistics.pstdev([0.1, 0.5])] * 4)
        for name in PER_QUERY:
            assert found[name].by_length == {16: pytest.approx([(1 + 15) / 40 + layer for layer in range(4)])}
        assert all(found[name].by_length == {} for name in PER_PROMPT)

    def test_a_prompts_mean_is_over_all_its_lengths(self):
        two = record("0", 0.2, queries=10)
        sums = [[30 * (0.6 + layer) for _ in PER_QUERY] for layer in range(4)]
        two["by_length"]["32"] = {"queries": 30, "sums": sums}
        two["queries"] = 40
        found = summarise([two])["entropy"]
        assert found.mean[0] == pytest.approx((2 + 18) / 40)
        assert list(found.by_length) == [16, 32]

    @pytest.mark.parametrize("changed", [None, (0.2, 0.0, 0.1, 0.1)])
    @pytest.mark.parametrize("rule", [None, "hoyer"])
    def test_the_budgets_of_a_profile_are_those_of_its_rule_and_configuration(self, changed, rule):
        records = [record("0", 0.1), record("1", 0.3)]
        for one in records:  # sparsities of 0.05 to 0.35
            for part in one["by_length"].values():
                part["sums"] = [[x / 10 for x in layer] for layer in part["sums"]]
        config = from_mapping({"budget": {"tokens": 100, "allocation": "list", "layers": [100] * 4}})
        found = None if changed is None else Sensitivity(kept=50, prompts=2, changed=changed, lost=changed)
        cost = Cost(measuring_seconds=1, total_seconds=2, statistics_bytes=3)
        measured = assemble(MODEL, SETTINGS, "p.jsonl", "beef", records, cost).model_copy(update={"sensitivity": found})
        chosen = rule or ("concentration" if changed is None else "sensitivity")
        made = with_rule(measured, chosen, 3.0, config)
        weights = [c**3 for c in made.mean("concentration")] if changed is None else [(c + 0.1) ** 3 for c in changed]
        if rule == "hoyer":
            weights = [(1 - h) ** 3 for h in made.mean("hoyer")]
        assert (made.rule, made.alpha) == (chosen, 3.0)
        assert made.sensitivity == found
        assert made.budgets.tokens == 100
        assert made.budgets.layers == tuple(30 + k for k in layer_budgets(70, weights, 5))
        assert (made.prompts.count, made.prompts.queries, made.prompts.answer_tokens) == (2, 20, 11)


class TestMeasure:
    @pytest.mark.parametrize(
        ("asked", "rule"),
        [
            ({}, "concentration"),
            ({"rule": "hoyer"}, "hoyer"),
        ],
    )
    def test_the_rule_is_concentration_unless_another_is_asked_for(self, tmp_path, monkeypatch, asked, rule):
        partial = Partial(tmp_path / "p.yaml", "key")
        partial.start([])
        monkeypatch.setattr(run, "start", lambda words, measures: SimpleNamespace(shutdown=lambda: None))
        monkeypatch.setattr(run, "_measure", lambda *given: (profile(hoyer=(0.1, 0.2, 0.3, 0.4)), partial))
        made, path = run.measure(Pass(model_path="m", alpha=2.0, **asked))
        assert (made.rule, made.alpha, made.sensitivity) == (rule, 2.0, None)
        assert load(path).rule == rule and path == tmp_path / "p.yaml"
        assert not partial.path.exists(), "what an interrupted pass needs stayed behind"


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--model-path", "./nowhere"], "--model-path ./nowhere: no model there"),
            (
                ["--model-path", "m", "--server-args=--kv-evict lethe"],
                "--server-args: '--kv-evict' is set by lethe profile; leave it out: a profile is of",
            ),
            (["--model-path", "m", "--server-args='"], '--server-args "\'": No closing quotation'),
            (["--model-path", "m", "--budget", "5"], "--kv-evict-budget 5: budget.tokens"),
            (["--model-path", "m", "--out", "/dev/null/p.yaml"], "--out /dev/null/p.yaml: File exists; give a file"),
            (["--model-path", "m", "--rule", "sensitivity"], "--rule sensitivity: not measured here; lethe sens"),
            (["--model-path", "m", "--rule", "fidelity"], "--rule fidelity: not measured here; lethe eval layers"),
            (["--model-path", "m", "--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: cannot be read"),
        ],
    )
    def test_bad_options_are_one_line_before_anything_starts(self, arguments, expected, capsys):
        assert cli.main(["profile", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lethe profile: error: {expected}") and error.count("\n") == 1

    def test_numbers_out_of_range_are_refused(self, capsys):
        for option, value in (
            ("--num-prompts", "0"),
            ("--max-new-tokens", "1"),
            ("--temperature", "-1"),
            ("--time-limit", "0"),
            ("--time-limit", "nan"),
            ("--alpha", "17"),
        ):
            with pytest.raises(SystemExit):
                cli.main(["profile", "--model-path", "m", option, value])
            assert f"{option}: got" in capsys.readouterr().err

    def test_ctrl_c_is_status_130_and_says_how_to_go_on(self, tmp_path, capsys, monkeypatch):
        def stopped(task):
            raise Interrupted(3, 16, tmp_path / "p.yaml.partial")

        monkeypatch.setattr("lethe_bench.cli.profile.measure", stopped)
        assert cli.main(["profile", "--model-path", "m"]) == 130
        assert "interrupted; 3 of 16 prompts are kept in" in capsys.readouterr().err

    def test_what_is_not_given_takes_the_defaults_of_the_pass(self, monkeypatch, tmp_path):
        asked = []
        monkeypatch.setattr("lethe_bench.cli.profile.measure", lambda task: asked.append(task) or exit(7))
        out, more = tmp_path / "p.yaml", ["--rule", "hoyer", "--alpha", "2", "--raw", "--server-args=--tp 2"]
        for arguments in ([], ["-o", str(out), "--num-prompts", "3", *more]):
            with pytest.raises(SystemExit):
                cli.main(["profile", "--model-path", "m", *arguments])
        assert asked[0] == Pass(model_path="m")
        given = {"rule": "hoyer", "alpha": 2.0, "raw": True, "server_args": ("--tp", "2")}
        assert asked[1] == Pass(model_path="m", out=out, num_prompts=3, **given)

    def test_the_engine_measures_uncompressed_and_takes_the_servers_arguments(self):
        task = Pass(model_path="m", seed=7, concurrency=3, config=EvictionConfig(), server_args=("--tp", "2"))
        words = task.engine_args()
        config = json.loads(words[words.index("--kv-evict-config") + 1])
        assert config == {"retain": {"sinks": 4}}
        for pair in (
            ["--tp", "2"],
            ["--random-seed", "7"],
            ["--max-running-requests", "3"],
            ["--attention-backend", "torch_native"],
        ):
            assert pair == words[words.index(pair[0]) :][:2]
        assert "--disable-overlap-schedule" in words
        own = Pass(model_path="m", config=EvictionConfig(), server_args=("--attention-backend", "x")).engine_args()
        assert own.count("--attention-backend") == 1
