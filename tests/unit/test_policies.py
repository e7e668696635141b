"""What a policy declares, and the registry."""

from __future__ import annotations

import pytest
import torch

from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.policies import POLICIES, Accumulation, Candidates, build_policy, policy_names


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_ranks_what_it_declares(name):
    policy = build_policy(from_mapping({"policy": name}))
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
    assert POLICIES[name].source.startswith("arXiv")


def test_the_accumulations_of_the_family():
    decay = {n: build_policy(from_mapping({"policy": n})).accumulation for n in policy_names()}
    assert decay["lethe"] == Accumulation(0.998, 1)
    assert decay["h2o"] == Accumulation(1.0) and decay["tova"] == Accumulation(0.0)
    assert decay["streaming"] is None and decay["random"] is None


def test_half_life_and_every_reach_the_accumulation():
    policy = build_policy(from_mapping({"rasr": {"half_life": 10, "score_every": 5}}))
    assert policy.accumulation.step_decay == pytest.approx(0.5**0.5)


def test_random_is_uniform_over_positions_and_independent_over_layers():
    policy = build_policy(from_mapping({"policy": "random"}))
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
        build_policy(from_mapping({"policy": "streamin"}))
