"""The kernel chooses exactly the cells its twin chooses: ties, infinities, NaN and pinned entries included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lethe_sglang.kernels import reference as twin
from lethe_sglang.kernels.triton import config, select

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select._KERNEL, "configs", [config(BLOCK=64)])
        yield


def check(rank, valid, pinned, count, device):
    expected = twin.select(rank, valid, pinned, count)
    chosen = select.select(rank.to(device), valid.to(device), pinned.to(device), count.to(device))
    assert chosen.dtype == torch.bool and chosen.shape == rank.shape
    assert torch.equal(chosen.cpu(), expected)
    return chosen.cpu()


@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=16)
@given(
    n=st.sampled_from([1, 2, 63, 64, 65, 130, 200]),
    digits=st.sampled_from([0, 1, 7]),
    special=st.sampled_from([[], [0.0, -0.0], [INF, -INF], [NAN, INF, 1e-40, -1e-40, 0.0, -0.0]]),
    valid=st.sampled_from([0.5, 1.0]),
    pinned=st.sampled_from([0, 5]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_the_choice_is_the_twins(device, n, digits, special, valid, pinned, index, seed):
    torch.manual_seed(seed)
    rank = torch.randn(2, 2, n).round(decimals=digits)
    for value in special:
        rank[torch.rand(2, 2, n) < 0.2] = value
    candidates = torch.rand(2, 2, n) < valid
    count = (torch.rand(2, 2) * (candidates.sum(-1) + 1)).to(index).clamp(max=n)
    count.view(-1)[seed % 4] = candidates.view(4, n)[seed % 4].sum()
    check(rank, candidates, torch.randint(0, pinned + 1, (2, 2)).to(index), count, device)


def one(values, count, device, valid=None, pinned=0):
    rank = torch.tensor(values, dtype=torch.float32)
    mask = torch.ones_like(rank, dtype=torch.bool) if valid is None else torch.tensor(valid, dtype=torch.bool)
    return check(rank, mask, torch.tensor(pinned), torch.tensor(count), device).nonzero().flatten().tolist()


def test_equal_values_choose_the_later(device):
    assert one([1.0] * 100, 3, device) == [97, 98, 99]
    assert one([2.0, 1.0, 1.0, 1.0, 0.0], 2, device) == [0, 3]


def test_ties_are_counted_across_blocks(device):
    values = [5.0] + [1.0] * 149 + [5.0]
    assert one(values, 70, device) == [0, *range(82, 151)]


def test_infinities_and_both_zeros(device):
    assert one([-INF, INF, 0.0, -0.0, -INF], 2, device) == [1, 3]
    assert one([-INF, INF, -0.0, 0.0, -INF], 4, device) == [1, 2, 3, 4]
    assert one([0.0, -0.0, 0.0], 2, device) == [1, 2]


def test_all_bit_patterns_of_nan_rank_as_zero_and_infinities_below_what_is_pinned(device):
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, 0x7F800000, -0x7FFFFF], dtype=torch.int32)  # 4th: inf
    yes = torch.ones(1, 5, dtype=torch.bool)
    chosen = check(bits.view(torch.float32).unsqueeze(0), yes, torch.tensor([1]), torch.tensor([3]), device)
    assert chosen.tolist() == [[True, False, False, True, True]]
    assert one([-INF, NAN, -1.0, INF, 3.4028234663852886e38], 2, device) == [3, 4], (
        "an infinity ties with the largest number"
    )
    assert one([-INF, -1.0], 1, device, valid=[1, 0]) == [0], "what is valid is above what is not"


def test_numbers_that_differ_in_their_last_bit(device):
    x = torch.tensor(1.0)
    near = torch.nextafter(x, torch.tensor(2.0)).item()
    below = torch.nextafter(x, torch.tensor(0.0)).item()
    assert one([near, 1.0, below], 2, device) == [0, 1]
    assert one([-near, -1.0, -below], 1, device) == [2]


def test_pinned_entries_are_kept_and_what_is_not_valid_is_not(device):
    assert one([-9.0, 3.0, 2.0, 4.0], 2, device, pinned=1) == [0, 3]
    assert one([-9.0, 3.0, 2.0, 4.0], 2, device, valid=[1, 1, 1, 0]) == [1, 2]
    assert one([-9.0, 3.0], 1, device, valid=[0, 1], pinned=1) == [1]


@pytest.mark.parametrize("count", [0, 1, 150])
def test_none_one_and_all(device, count):
    assert len(one([float(i % 7) for i in range(150)], count, device)) == count


def test_views_are_read_as_they_are(device):
    torch.manual_seed(0)
    rank = torch.randn(70, 2, 3).permute(1, 2, 0)
    valid = torch.rand(2, 3, 70) < 0.9
    pinned = torch.tensor([2, 0, 5]).expand(2, 3)
    check(rank, valid, pinned, torch.tensor([[5, 9], [1, 0], [7, 7]]).t(), device)


def test_no_segment_and_no_candidate(device):
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape, device=device)
        count = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        assert select.select(empty, empty.bool(), count, count).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": torch.zeros(2, 3, dtype=torch.float64)}, "rank must be float32"),
        ({"valid": torch.zeros(2, 4, dtype=torch.bool)}, "valid must be bool of shape \\[2, 3\\]"),
        ({"pinned": torch.zeros(2)}, "pinned must be int32 or int64 of shape \\[2\\]"),
        ({"count": torch.zeros(3, dtype=torch.int64)}, "count must be int32 or int64 of shape \\[2\\]"),
        ({"rank": torch.tensor(1.0)}, "at least one axis"),
    ],
)
def test_bad_shapes_are_named(change, message):
    yes = torch.ones(2, 3, dtype=torch.bool)
    count = torch.ones(2, dtype=torch.int64)
    good = {"rank": torch.zeros(2, 3), "valid": yes, "pinned": count, "count": count}
    with pytest.raises(ValueError, match=message):
        select.select(**{**good, **change})
