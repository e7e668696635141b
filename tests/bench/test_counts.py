"""What a launch of rounds may cost: launches, uploads, cells that move."""

from __future__ import annotations

import pytest

from lethe_bench.gpu.counts import Setting, count, main

MOST_LAUNCHES = 12


@pytest.mark.parametrize("per_layer", [False, True], ids=["uniform", "per layer"])
@pytest.mark.parametrize(("policy", "options"), [("lethe", {"key_share": 0}), ("keydiff", {})])
def test_a_launch_of_rounds_is_one_upload_few_kernels_and_few_moves(policy, options, per_layer):
    found = count(Setting(requests=4, layers=6, kept=64, interval=16, per_layer=per_layer), policy, **options)
    assert found["uploads"] == 1
    assert 6 <= found["launches"] == found["torch"] + found["triton"] <= MOST_LAUNCHES
    assert 0 < found["moved"] < 0.35, "a kept cell that is at home is moved all the same"


@pytest.mark.parametrize("per_layer", [False, True], ids=["uniform", "per layer"])
def test_a_whole_round_of_the_default_policy_is_no_more_launches_its_ranking_included(per_layer):
    found = count(Setting(requests=4, layers=6, kept=64, interval=16, per_layer=per_layer))
    kernels = found["kernels"]
    assert found["uploads"] == kernels["_likeness"] == kernels["_sort"] == kernels["_better_place"] == 1
    assert 6 <= found["launches"] == found["torch"] + found["triton"] <= MOST_LAUNCHES
    assert found["ranking"] == 2
    assert 0 < found["moved"] < 0.35, "a kept cell that is at home is moved all the same"


def test_more_requests_and_layers_are_no_more_launches():
    few, many = (count(Setting(n, 2 * n, 16, 8))["launches"] for n in (2, 5))
    assert few == many


def test_the_program_counts_every_policy(capsys):
    main(["--requests", "1", "--layers", "2", "--kept", "16", "--interval", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all('"uploads": 1' in line for line in lines)
