"""The profiling pass on a real model, at a server's start, against dense attention of Hugging Face; one server start.

The server finds no profile, so it runs the pass in a process before it starts: two starts of SGLang in all.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from conftest import MODEL, WARM, config

pytest.importorskip("sglang")
BUDGET = {"tokens": 48}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(start, cache):
    settings = config(budget=BUDGET, rounds={"interval": 16})
    server = start(
        "--max-total-tokens",
        "2048",
        "--kv-evict",
        "lethe",
        "--kv-evict-config",
        settings,
        "--kv-evict-profile",
        "auto",
        env={"XDG_CACHE_HOME": str(cache)},
    ).wait()
    yield server
    server.check_healthy()


@pytest.fixture(scope="module")
def kept(server, cache):
    """The profile that the server has made for itself."""
    from lethe_sglang.allocation.profile import load

    (path,) = (cache / "lethe-sglang" / "profiles").glob("*.yaml")
    return load(path)


def test_the_first_start_measures_and_says_so(server, kept, cache):
    log = server.log.read_text(errors="replace")
    assert "no profile of this model yet; measuring it once" in log
    assert f"lethe profile: {kept.prompts.count} of {kept.prompts.count} prompts" in log, "no progress in the log"
    assert kept.model.name == MODEL.name and kept.model.layers == 4
    assert kept.cost.measuring_seconds < 300 and kept.cost.statistics_bytes > 0
    assert not list(cache.rglob("*.partial"))


def budgets_of(weights) -> tuple[int, ...]:
    from lethe_sglang.allocation import layer_budgets

    return layer_budgets(33, weights, 5)


def test_the_ranks_get_the_budgets_of_the_profile_at_the_start_and_later(server, kept):
    report = server.lethe()
    assert report["allocation"] == "profile" and kept.rule == "concentration"
    assert report["layers"] == [report["recent"] + k for k in budgets_of(kept.mean("concentration"))]
    assert len(set(report["layers"])) > 1 and 4 * 47 < sum(report["layers"]) <= 4 * 48
    at_the_start = report["layers"]
    server.flush()
    server.post("/kv_evict", {"budget": {"allocation": "uniform"}})
    assert server.lethe()["layers"] == [48] * 4
    answer = server.post("/kv_evict", {"budget": {"allocation": "profile"}})  # the kept profile is read again
    assert answer["changed"] == {"budget.allocation": ["uniform", "profile"]}
    assert server.lethe()["layers"] == at_the_start


@pytest.fixture(scope="module")
def dense(server):
    """Statistics of the same prompts from whole attention matrices: per prompt and statistic, one value a layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lethe_sglang.profiling.prompts import generated
    from lethe_sglang.profiling.run import _round_trips, tokens_of

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    prompts = itertools.islice((p for p in generated(1) if _round_trips(tokenizer, p[0][1])), 16)
    ids = [tokens_of(tokenizer, prompt, raw=False) for prompt in prompts]
    params = {"temperature": 0, "max_new_tokens": 256, "custom_params": {"kv_evict": "none"}}
    replies = server.post("/generate", {"input_ids": ids, "sampling_params": params})
    out = []
    for prompt, reply in zip(ids, replies, strict=True):
        fed = [*prompt, *reply["output_ids"][:-1]]  # the last token is never a query
        with torch.no_grad():
            attentions = model(torch.tensor([fed]), output_attentions=True).attentions
        out.append([statistics_of(layer[0].double(), len(prompt)) for layer in attentions])
    return out


def statistics_of(matrix, prompt: int) -> dict[str, float]:
    """Every statistic of one layer of one prompt, written out over ``matrix`` ``[H, T, T]``."""
    heads, total, _ = matrix.shape
    sums = dict.fromkeys(
        ("hoyer", "entropy", "variance", "coverage_90", "coverage_95", "coverage_99", "distance", "sink_share"), 0.0
    )
    for head in matrix:
        for t in range(prompt, total):
            a = head[t, : t + 1]
            n, norm = t + 1, float(a.norm())
            ordered = a.sort(descending=True).values.cumsum(0)
            sums["hoyer"] += (math.sqrt(n) - float(a.sum()) / norm) / (math.sqrt(n) - 1)
            sums["entropy"] -= float((a * a.clamp(min=1e-300).log()).sum())
            sums["variance"] += float(a.var(unbiased=False)) / (1 / n) ** 2
            for mass in (90, 95, 99):
                sums[f"coverage_{mass}"] += int((ordered < mass / 100).sum()) + 1
            sums["distance"] += float((a * (n - 1 - a.new_tensor(range(n)))).sum())
            sums["sink_share"] += float(a[:4].sum())
    queries = total - prompt
    out = {name: value / heads / queries for name, value in sums.items()}
    seen = matrix.mean(0)[prompt:]  # [queries, T]
    received = seen.sum(0)
    out["concentration"] = float(received.var(unbiased=False) / received.mean() ** 2)
    columns = [seen[max(j - prompt, 0) :, j] for j in range(total)]
    out["fluctuation"] = sum(float(column.var(unbiased=False)) for column in columns)
    idle = back = 0
    for column in columns:
        first = total - len(column) + 1
        used = [first] + [first + i for i, x in enumerate(column.tolist()) if i and x > 1 / (first + i)]
        came = any(b - a >= 16 for a, b in itertools.pairwise(used))
        back += came
        idle += came or total - used[-1] >= 16
    out["recurrence"] = back / max(idle, 1)
    return out


def test_every_statistic_equals_dense_attention(kept, dense):
    assert kept.prompts.count == len(dense) == 16
    for name, statistic in kept.statistics.items():
        for layer in range(4):
            values = [prompt[layer][name] for prompt in dense]
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            tolerance = 1e-3 * max(1.0, abs(mean))
            assert statistic.mean[layer] == pytest.approx(mean, abs=tolerance), (name, layer)
            assert statistic.spread[layer] == pytest.approx(spread, abs=tolerance), (name, layer)


@pytest.fixture(scope="module")
def launcher():
    """What a launcher does up to the start of its schedulers, in this process; returns the settled budgets."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from lethe_sglang.engine import entrypoints as front

    ready = SimpleNamespace(wait_for_ready=lambda: None, scheduler_infos=[])

    def launch(*args: str):
        words = ["--model-path", str(MODEL), "--kv-evict", "lethe", "--kv-evict-budget", "48", *args]
        server_args = prepare_server_args(words)
        server_args.resolve_once()
        front.launch(lambda cls, server_args: (ready, None), type("Engine", (), {}), server_args)
        return server_args._lethe.budgets

    return launch


def test_a_second_start_reads_the_kept_profile_and_measures_nothing(kept, cache, launcher, monkeypatch):
    from lethe_sglang.allocation import from_config
    from lethe_sglang.config import resolve
    from lethe_sglang.profiling import automatic

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(automatic, "run", lambda server_args, path: pytest.fail("measured again"))
    assert launcher("--kv-evict-profile", "auto") == from_config(resolve("lethe", None, 48, "auto"), 4, kept)


def test_a_start_follows_the_rule_that_a_profile_is_rewritten_with(kept, cache, launcher, tmp_path):
    from lethe_sglang.cli.main import main

    (path,) = (cache / "lethe-sglang" / "profiles").glob("*.yaml")
    for rule, alpha, weights in (
        ("zipvl", "1", kept.mean("coverage_95")),
        ("concentration", "-1", [1 / c for c in kept.mean("concentration")]),
        ("concentration", "2", [c**2 for c in kept.mean("concentration")]),
    ):
        out = str(tmp_path / f"{rule}{alpha}.yaml")
        assert main(["profile", "--from", str(path), "--rule", rule, "--alpha", alpha, "-o", out]) == 0
        assert launcher("--kv-evict-profile", out) == budgets_of(weights)


def test_a_profile_of_another_model_is_refused_with_what_differs(kept, launcher, tmp_path, capsys):
    from lethe_sglang.allocation.profile import save

    other = kept.model.model_copy(update={"name": "other", "kv_heads": 8, "head_dim": 128})
    save(kept.model_copy(update={"model": other}), tmp_path / "other.yaml")
    with pytest.raises(SystemExit) as stopped:
        launcher("--kv-evict-profile", str(tmp_path / "other.yaml"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lethe: error:")]
    assert stopped.value.code == 2 and len(lines) == 1
    assert "profile of another model (other): KV heads 8 against 1, head width 128 against 64" in lines[0]


def test_every_layer_is_pruned_alone_and_the_budgets_follow(kept, tmp_path):
    """`lethe sensitivity`: one more start of SGLang."""
    from lethe_sglang.allocation.profile import load, save

    file, out = tmp_path / "profile.yaml", tmp_path / "new.yaml"
    save(kept, file)
    command = [
        "-m",
        "lethe_sglang.cli.main",
        "sensitivity",
        str(file),
        "--model-path",
        str(MODEL),
        "--out",
        str(out),
        "--num-prompts",
        "2",
        "--max-new-tokens",
        "110",
        "--budget",
        "48",
        "--config",
        config(rounds={"interval": 8}, retain={"recent_ratio": 0.5}),
    ]
    done = WARM.run(command, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load(out)
    assert (found.sensitivity.kept, found.sensitivity.prompts) == (24, 2)
    assert any(found.sensitivity.lost), "24 of 110 tokens lose nothing in any layer"
    assert all(
        (changed > 0) == (lost > 0)
        for changed, lost in zip(found.sensitivity.changed, found.sensitivity.lost, strict=True)
    )
    assert found.rule == "sensitivity" and 4 * 47 < sum(found.budgets.layers) <= 4 * 48
    order = sorted(range(4), key=found.sensitivity.changed.__getitem__)
    assert found.budgets.layers[order[0]] <= found.budgets.layers[order[-1]]
    assert "changed" in done.stdout and "10 of 10 answers" in done.stderr
