"""What a policy declares, and the registry: ours, and those that another distribution brings."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar, Literal

import pydantic
import pytest
import torch
from pydantic import Field, model_validator

from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping
from lethe_sglang.policies import Accumulation, Candidates, Policy, features, policy_class, policy_names, registry


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_ranks_what_it_declares(name):
    policy = from_mapping({"policy": name}).built_policy
    shape = (2, 3, 5)
    valid = torch.tensor([True] * 4 + [False]).expand(shape)
    candidates = Candidates(
        score=torch.rand(shape) if policy.accumulation is not None else None,
        position=torch.arange(5, dtype=torch.int32).expand(shape) if policy.uses_position else None,
        memory=torch.rand(shape) if policy.uses_memory else None,
        feature=policy.key_feature(torch.rand(3, 5, 2, 8), valid[0]).expand(shape) if policy.uses_keys else None,
        valid=valid,
        length=torch.tensor([5, 9, 12]),
    )
    rank = policy.rank(candidates)
    assert rank.shape == shape and rank.dtype == torch.float32 and bool(torch.isfinite(rank).all())
    assert policy_class(name).source.startswith("arXiv")


def test_the_accumulations_of_the_family():
    decay = {n: from_mapping({"policy": n}).built_policy.accumulation for n in policy_names()}
    assert decay["lethe"] == Accumulation(0.5 ** (1 / 128), 1)
    assert decay["h2o"] == Accumulation(1.0) and decay["tova"] == Accumulation(0.0)
    assert decay["streaming"] is None and decay["random"] is None


def test_half_life_and_every_reach_the_accumulation():
    policy = from_mapping({"lethe": {"half_life": 10, "score_every": 5}}).built_policy
    assert policy.accumulation.step_decay == pytest.approx(0.5**0.5)


def test_random_is_uniform_over_positions_and_independent_over_layers():
    policy = from_mapping({"policy": "random"}).built_policy
    position = torch.arange(20_000, dtype=torch.int32).expand(2, 1, -1)
    rank = policy.rank(
        Candidates(None, position, None, None, torch.ones_like(position, dtype=torch.bool), torch.tensor([20_000]))
    )[:, 0]
    assert float(rank.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(rank[0, :10_000].mean()) == pytest.approx(0.5, abs=0.02)
    assert abs(float(torch.corrcoef(rank)[0, 1])) < 0.05
    assert len(torch.unique(rank[0])) > 19_000


def test_an_unknown_policy_names_the_nearest_and_all_legal_ones():
    with pytest.raises(ConfigError, match=r"did you mean 'streaming'.*legal: none, lethe"):
        from_mapping({"policy": "streamin"})


# -- policies of other distributions --------------------------------------------------------------------------------


class Bare(Policy):
    source = "arXiv 0000.00000"
    accumulation = None

    def rank(self, candidates):
        return candidates.need("position").float()


@pydantic.dataclasses.dataclass(frozen=True)
class Good(Bare):
    """Keep what is good."""

    low: int = Field(default=1, ge=0, description="Tokens, >= 0.")
    high: int = Field(default=5, multiple_of=5, description="Tokens, a multiple of 5.")
    names: frozenset[str] = Field(default=frozenset("a"), strict=False, description="Names.")
    sizes: tuple[int, ...] = Field(default=(1,), strict=False, description="Tokens.")
    how: Literal["up", 2] = Field(default="up", description="up or 2.")

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


@pydantic.dataclasses.dataclass(frozen=True)
class NoSource(Policy):
    accumulation: ClassVar[None] = None

    def rank(self, candidates):
        return candidates.score


@pydantic.dataclasses.dataclass(frozen=True)
class NoDefault(Bare):
    window: int


@pydantic.dataclasses.dataclass(frozen=True)
class NoRank(Policy):
    source: ClassVar[str] = "arXiv 0000.00000"


@pydantic.dataclasses.dataclass(frozen=True)
class Strict(Bare):
    sizes: tuple[int, ...] = (1, 2)


@pydantic.dataclasses.dataclass(frozen=True)
class Forgetful(Bare):
    accumulation: ClassVar[Accumulation] = Accumulation(rule="recurrence")


@pydantic.dataclasses.dataclass(frozen=True)
class Divides(Bare):
    by: int = 1

    @property
    def accumulation(self):
        return Accumulation(decay=1 / self.by)


OUTSIDE = (Bare, Good, NoSource, NoDefault, NoRank, Strict, Forgetful, Divides)


@pytest.fixture
def outside(monkeypatch):
    """Register policies as the entry points of a distribution would."""

    def install(**targets):
        module = ModuleType("outside")
        vars(module).update({c.__name__: c for c in OUTSIDE}, thing=3)
        module.Stdlib = dataclasses.dataclass(frozen=True)(type("Stdlib", (Bare,), {}))
        module.Thawed = pydantic.dataclasses.dataclass(type("Thawed", (Bare,), {}))
        monkeypatch.setitem(sys.modules, "outside", module)
        points = []
        for name, target in targets.items():
            points.append(EntryPoint(name, target, registry.GROUP))
            vars(points[-1])["dist"] = SimpleNamespace(name="some-policies")
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
        registry._registered.cache_clear()
        registry.policy_class.cache_clear()

    yield install
    monkeypatch.undo()
    registry._registered.cache_clear()
    registry.policy_class.cache_clear()


def message(name, **section):
    with pytest.raises(ConfigError) as caught:
        from_mapping({"policy": name, **({name: section} if section else {})})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_policy_of_another_distribution_is_one_of_them(outside, capsys):
    outside(good="outside:Good")
    assert policy_names()[-1] == "good"
    config = from_mapping({"policy": "good", "good": {"low": 3}})
    assert config.built_policy == Good(low=3) and from_mapping(config.model_dump()) == config
    assert program.main(["show", "--kv-evict", "good"]) == 0
    assert "good:\n  low: 1\n" in capsys.readouterr().out
    assert program.main(["show", "--policies"]) == 0
    assert "### good\n\nKeep what is good. arXiv 0000.00000.\n" in (page := capsys.readouterr().out)
    assert "| `good.low` | `1` | Tokens, >= 0. |" in page
    assert "did you mean 'good'" in message("goood")
    assert message("h2o", x=1) and "good: is the section of another policy" in str(
        pytest.raises(ConfigError, from_mapping, {"good": {}}).value
    )


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"low": -1}, "good.low: got -1, expected an integer >= 0"),
        ({"low": "1"}, 'good.low: got "1", expected an integer >= 0'),
        ({"high": 7}, "good.high: got 7, expected an integer a multiple of 5"),
        ({"names": 3}, "good.names: got 3, input should be a valid frozenset"),
        ({"names": ["a", 3]}, "good.names[1]: got 3, input should be a valid string"),
        ({"sizes": [1, "2"]}, 'good.sizes[1]: got "2", expected an integer'),
        ({"sizes": 2}, "good.sizes: got 2, expected a list of one or more integers"),
        ({"how": "down"}, 'good.how: got "down", expected one of up, 2'),
        ({"low": 10}, "good: low must be below high"),
        ({"lo": 10}, "good.lo: unknown key; did you mean good.low?"),
        ({"tokens": 10}, "good.tokens: unknown key; budget.tokens belongs in section budget"),
    ],
)
def test_its_options_are_validated_with_errors_like_ours(outside, section, expected):
    outside(good="outside:Good")
    assert message("good", **section) == expected


def test_what_its_own_code_raises_is_an_error_of_its_section(outside):
    outside(divides="outside:Divides")
    assert message("divides", by=0) == "divides: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("bad", "no_such_module:X", "no_such_module:X cannot be imported: ModuleNotFoundError: No module named"),
        ("bad", "outside:Missing", "outside:Missing cannot be imported: AttributeError: module"),
        ("bad", "outside:thing", "outside:thing is not a subclass of lethe_sglang.policies.Policy"),
        ("bad", "outside:Bare", "outside:Bare is not decorated with @pydantic.dataclasses.dataclass(frozen=True)"),
        ("bad", "outside:Stdlib", "outside:Stdlib is not decorated with @pydantic.dataclasses.dataclass(frozen=True)"),
        ("bad", "outside:Thawed", "outside:Thawed is not decorated with @pydantic.dataclasses.dataclass(frozen=True)"),
        ("bad", "outside:NoSource", "outside:NoSource does not say where it comes from: set source, such as 'arXiv"),
        ("bad", "outside:NoDefault", "outside:NoDefault cannot be made from its defaults as JSON writes them: 1 val"),
        ("bad", "outside:Strict", "outside:Strict cannot be made from its defaults as JSON writes them: 1 validation"),
        ("bad", "outside:Forgetful", "outside:Forgetful accumulates by recurrence, which needs uses_memory = True"),
        ("bad", "outside:NoRank", "outside:NoRank lacks accumulation, rank"),
        ("h2o", "outside:Good", "the name is taken by lethe-sglang; register it under another name, or uninstall it"),
        ("budget", "outside:Good", "the name is taken by lethe-sglang; register it under another name"),
    ],
)
def test_a_policy_that_cannot_be_used_is_an_error_when_it_is_asked_for_and_breaks_no_other(
    outside, capsys, name, target, expected
):
    outside(**{name: target}, good="outside:Good")
    assert message(name).startswith(f"policy {name} of distribution some-policies: {expected}")
    for other in ("lethe", "good"):
        assert from_mapping({"policy": other}).policy == other
    assert program.main(["show", "--policies"]) == 0
    assert (f"### {name}\n\npolicy {name} of distribution" in capsys.readouterr().out) == (name != "budget")


@pytest.mark.parametrize("numbers", [1, 2 * 2 * 9**2, 3 * 2 * 9**2])
def test_keys_are_compared_for_so_many_requests_at_once_as_memory_allows(monkeypatch, numbers):
    generator = torch.Generator().manual_seed(1)
    keys, seen = torch.randn(200, 2, 8, generator=generator), []
    valid = torch.arange(9) < torch.tensor([9, 0, 3, 9, 5]).view(1, 5, 1).expand(3, 5, 1)
    cells = torch.randint(1, 200, (3, 5, 9), generator=generator) * valid
    keys[0] = float("nan")  # the padding's, which may hold anything
    whole = features.by_layer(features.redundancy, keys, cells, valid)
    assert bool(whole.isfinite().all())

    def watched(keys, valid):
        seen.append(len(keys) * keys.shape[2] * keys.shape[1] ** 2)
        return features.redundancy(keys, valid)

    monkeypatch.setattr(features, "AT_ONCE", numbers)
    assert torch.equal(features.by_layer(watched, keys, cells, valid), whole)
    assert max(seen) == max(numbers, 2 * 9**2), "one request alone may take more"


def test_the_example_of_the_documentation_is_a_policy(outside):
    page = (Path(__file__).parents[2] / "docs" / "adding-a-policy.md").read_text()
    example, table = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "toml"))
    ((name, target),) = tomllib.loads(table)["project"]["entry-points"][registry.GROUP].items()
    outside(**{name: target})
    module_name = target.partition(":")[0]
    sys.modules[module_name] = module = ModuleType(module_name)
    try:
        exec(compile(example, "adding-a-policy.md", "exec", dont_inherit=True), vars(module))
        policy = from_mapping({"policy": name, name: {"every": 3}}).built_policy
    finally:
        del sys.modules[module_name]
    position = torch.arange(7).view(1, 1, 7)
    everything = Candidates(None, position, None, None, position >= 0, torch.tensor([7]))
    assert policy.accumulation is None
    assert policy.rank(everything).flatten().argsort(descending=True).tolist() == [6, 3, 0, 5, 4, 2, 1]


def test_no_policy_can_have_the_name_of_a_section():
    assert {*EvictionConfig.model_fields, "none"} <= registry.RESERVED
    assert not registry.RESERVED & set(policy_names())
