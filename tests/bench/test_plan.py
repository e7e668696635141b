"""``lethe plan``: numbers that can be checked by hand."""

import json

import pytest
from profiles import profile

from lethe_bench.deployment import GIB, Deployment
from lethe_sglang.allocation.profile import save
from lethe_sglang.cli import main as cli
from lethe_sglang.config import ConfigError, from_mapping

CONFIG = {
    "architectures": ["X"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def deployment(**changes) -> Deployment:
    values = {
        "layers": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "element_bytes": 2,
        "state_bytes": 4,
        "pool_bytes": 48 * GIB,
        "config": from_mapping({"budget": {"tokens": 1024}}),
        "context": 16000,
        "prompt": 500,
        "page_size": 16,
    }
    return Deployment(**{**values, **changes})


def test_an_eight_billion_parameter_model_by_hand():
    plan = deployment()
    assert plan.stock_token_bytes == 131072 and plan.token_bytes == 131072 + 128
    assert plan.stock_blocks == 393216
    assert plan.request_blocks == 500 + 1024 + 128 + 32
    assert plan.stock_requests == 24
    assert plan.requests == (48 * GIB // 131200) // 1684


def test_the_budget_of_a_concurrency_is_the_largest_that_fits():
    plan = deployment()
    budget = plan.budget_for(300)
    assert deployment(config=from_mapping({"budget": {"tokens": budget}})).requests >= 300
    assert deployment(config=from_mapping({"budget": {"tokens": budget + 1}})).requests < 300
    assert plan.budget_for(2) == 15500, "all there is"


def test_a_concurrency_that_never_fits_says_what_does():
    most = deployment(config=from_mapping({"budget": {"tokens": 8}})).requests
    with pytest.raises(ConfigError, match=f"--concurrency 9999: needs a budget below 8 tokens.* at most {most} "):
        deployment().budget_for(9999)


def test_a_request_below_its_bound_costs_its_length():
    plan = deployment(context=900)
    assert plan.request_blocks == 900


@pytest.mark.parametrize(
    ("sections", "context", "first"),
    [
        ({"budget": {"tokens": 1024}}, "512", 1026),
        ({"budget": {"tokens": 100}, "rounds": {"interval": 5000}}, "4096", 5031),
        (
            {"budget": {"tokens": 100}, "rounds": {"interval": 5000}},
            "5100",
            None,
        ),  # shorter than its bound, and evicted
        ({"budget": {"tokens": 100}, "rounds": {"interval": 5000, "when": "pressure"}}, "4096", None),
    ],
)
def test_the_command_says_where_nothing_would_be_evicted(model, capsys, sections, context, first):
    arguments = ["--context", context, "--prompt", "1", "--gpu-mem", "80", "--weights-gib", "1"]
    assert cli.main(["plan", "--model-path", model, *arguments, "--config", json.dumps(sections)]) == 0
    out = capsys.readouterr().out
    assert ("so nothing is evicted here; take a smaller budget or rounds.interval" in out) == (first is not None)
    assert first is None or f"a request is first evicted from at {first} tokens" in out


def test_under_pressure_requests_keep_all_up_to_a_load_and_then_a_share():
    pressed = from_mapping({"budget": {"tokens": 1024}, "rounds": {"when": "pressure"}})
    plan = deployment(config=pressed)
    assert plan.full_requests == plan.blocks // 16000
    assert plan.share_for(plan.full_requests) is None
    share = plan.share_for(plan.full_requests + 1)
    assert share is not None
    held = plan.prompt + share + 128  # an event leaves room for an interval of every request
    assert held * (plan.full_requests + 1) <= plan.blocks < (held + 1) * (plan.full_requests + 1)
    assert plan.share_for(10 * plan.requests) == 1024, "no share is below the floor"


def test_the_command_says_what_pressure_leaves(model, capsys):
    def said(*arguments):
        words = ["plan", "--model-path", model, "--context", "16000", "--prompt", "500", "--gpu-mem", "80"]
        words += ["--weights-gib", "16", "--config", '{"rounds": {"when": "pressure"}}', *arguments]
        assert cli.main(words) == 0
        return capsys.readouterr().out

    assert "nothing is evicted up to" in said()
    assert "4 requests at once keep all that they hold" in said("--concurrency", "4")
    assert "60 requests at once keep 6" in said("--concurrency", "60")
    assert " wait, the others are at the floor" in said("--concurrency", "400")


def test_the_command_prints_the_table(model, tmp_path, capsys):
    save(profile(), tmp_path / "p.yaml")
    base = [
        "plan",
        "--model-path",
        model,
        "--context",
        "16000",
        "--prompt",
        "500",
        "--gpu-mem",
        "80",
        "--page-size",
        "16",
        "--weights-gib",
        "15",
    ]
    assert cli.main([*base, "--budget", "1024", "--concurrency", "64"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("requests that fit"))
    pool = int(80 * GIB * 0.88) - 15 * GIB
    assert row.split()[3:5] == [str(pool // 131072 // 16000), str(pool // 131200 // 1684)]
    assert "budget for 64 requests at once: " in printed
    assert cli.main([*base, "--tp", "2", "--policy", "keydiff"]) == 0
    assert "65536      65536" in capsys.readouterr().out, "half the heads a rank, and no states"
    assert cli.main([*base, "--profile", str(tmp_path / "p.yaml")]) == 2
    assert "budget.profile: has 4 layers, but the model has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu-mem", "80"], "--weights-gib: needed"),
        (["--gpu-mem", "16", "--weights-gib", "15"], "--gpu-mem: leaves 0.00 GiB"),
        (["--gpu-mem", "80", "--weights-gib", "15", "--tp", "3"], "--tp 3: does not divide"),
        (["--gpu-mem", "80", "--weights-gib", "15", "--prompt", "16000"], "--prompt 16000: not below --context"),
        (["--gpu-mem", "80", "--weights-gib", "15", "--policy", "leth"], ""),
    ],
)
def test_bad_options_are_one_line(model, arguments, expected, capsys):
    assert cli.main(["plan", "--model-path", model, "--context", "16000", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lethe plan: error: {expected}") and error.count("\n") == 1


def test_a_configuration_without_the_numbers_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["plan", "--model-path", str(tmp_path), "--context", "10", "--gpu-mem", "1"]) == 2
    assert "its config.json names no num_hidden_layers" in capsys.readouterr().err
