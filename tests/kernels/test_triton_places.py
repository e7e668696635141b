"""The kernels rank exactly as their twin: in parts of any number, with ties, infinities, NaN and what is not valid."""

from __future__ import annotations

import pytest
import torch

from lethe_sglang.kernels import reference as twin
from lethe_sglang.kernels.triton import places as kernels
from lethe_sglang.policies import features

INF, NAN = float("inf"), float("nan")
SPECIAL = [[], [0.0, -0.0], [INF, -INF], [NAN, INF, -INF, 1e-40, -1e-40, 0.0, -0.0]]


@pytest.fixture
def parts_of(monkeypatch):
    """Sort in parts of so many candidates: an interpreter takes long for many."""
    return lambda number: monkeypatch.setattr(kernels, "PART", number)


def check(score, likeness, valid, device, share=0.5):
    """Compare with the twin, as a CPU computes it; return the ranks."""
    expected = twin.better_place(score, likeness, valid, share)
    assert torch.equal(features.better_place(score, likeness, valid, share), expected), "another definition"
    found = kernels.better_place(score.to(device), likeness.to(device), valid.to(device), share)
    assert found.dtype == torch.float32 and torch.equal(found.cpu(), expected)
    return expected


def numbers(shape, seed, special):
    """Two lists in which values repeat, and what of them is valid."""
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randn(shape, generator=generator).round(decimals=1) for _ in range(2)]
    for values in lists:
        for value in special:
            values[torch.rand(shape, generator=generator) < 0.15] = value
    return (*lists, torch.rand(shape, generator=generator) < 0.8)


@pytest.mark.parametrize(
    ("n", "part", "share"),
    [(1, 8, 0.5), (2, 8, 0.5), (5, 8, 0.2), (8, 8, 0.5), (9, 8, 0.99), (16, 8, 0.01), (27, 8, 0.5), (1025, 1024, 0.35)],
)
def test_ranks_are_the_twins(device, parts_of, n, part, share):
    parts_of(part)
    check(*numbers((1 if n > 100 else 2, 1, n), seed=n, special=SPECIAL[n % 4]), device, share)


@pytest.mark.parametrize("part", [4, 16])
def test_those_that_tie_go_by_the_later_one(device, parts_of, part):
    parts_of(part)
    same, valid = torch.ones(6), torch.ones(6, dtype=torch.bool)
    falls = torch.arange(6.0, 0, -1)
    assert check(same, same, valid, device).tolist() == [-10, -8, -6, -4, -2, 0]
    check(falls, same, valid, device)
    check(torch.tensor([0.0, -0.0, 1e-40, 0.0, -1e-40, -0.0]), same, valid, device)


def test_what_is_not_valid_ranks_as_minus_infinity_whatever_it_holds(device, parts_of):
    parts_of(4)
    score = torch.tensor([NAN, 3.0, -INF, INF, 2.0, 1.0, -INF])
    valid = torch.tensor([0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    ranks = check(score, -score, valid, device)
    assert ranks.argsort(descending=True).tolist() == [1, 4, 5, 6, 3, 2, 0]
    check(score, -score, torch.zeros(7, dtype=torch.bool), device)


def test_all_bit_patterns_of_nan_are_equal_and_above_infinity(device, parts_of):
    parts_of(4)
    bits = torch.tensor([0x7F800000, 0x7FC00000, -0x400000, 0x7F800001, 0x7F7FFFFF, -0x7FFFFF], dtype=torch.int32)
    score, valid = bits.view(torch.float32), torch.ones(6, dtype=torch.bool)
    assert check(score, torch.zeros(6), valid, device, 0.01).argsort(descending=True).tolist() == [5, 3, 2, 1, 0, 4]
    check(torch.zeros(6), score, valid, device)


def test_views_are_read_as_they_are(device, parts_of):
    parts_of(8)
    score, likeness, valid = numbers((9, 2, 1), seed=3, special=SPECIAL[1])
    check(score.permute(1, 2, 0), likeness[:, :1].permute(1, 2, 0).expand(2, 1, 9), valid.permute(1, 2, 0), device)


def test_no_segment_and_no_candidate(device):
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape, device=device)
        assert kernels.better_place(empty, empty, empty.bool(), 0.5).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(2, 3, dtype=torch.float64)}, "score must be float32"),
        ({"likeness": torch.zeros(2, 4)}, r"likeness must be float32 of shape \[2, 3\]"),
        ({"valid": torch.zeros(2, 3)}, "valid must be bool"),
        ({"score": torch.tensor(1.0)}, "at least one axis"),
        ({"share": 1.0}, r"share must be above 0 and below 1, not 1\.0"),
        ({"share": 0.0}, r"share must be above 0 and below 1, not 0\.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"score": torch.zeros(2, 3), "likeness": torch.zeros(2, 3), "valid": torch.ones(2, 3).bool(), "share": 0.5}
    with pytest.raises(ValueError, match=message):
        kernels.better_place(**{**good, **change})
