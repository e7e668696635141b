"""The statistics of single attention vectors, against plain arithmetic."""

import math
import random

import pytest
import torch

from lethe_sglang.allocation import sparsity

UNIFORM = [0.125] * 8
ONE_HOT = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_hoyer_is_0_for_a_uniform_vector_and_1_for_a_one_hot_one():
    assert sparsity.hoyer(torch.tensor([UNIFORM, ONE_HOT]), torch.tensor(8)).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert sparsity.hoyer(torch.ones(1, 1), torch.tensor([1])).tolist() == [0.0], "one token is a uniform vector"


@pytest.mark.parametrize("n", [2, 3, 100, 4097])
def test_hoyer_reaches_its_ends_at_every_length(n):
    uniform, one_hot = torch.full((n,), 1 / n), torch.zeros(n)
    one_hot[n // 2] = 1
    found = sparsity.hoyer(torch.stack([uniform, one_hot]), torch.tensor(n))
    assert found.tolist() == pytest.approx([0, 1], abs=1e-4)


def vectors():
    rng = random.Random(3)
    out = []
    for n in (1, 2, 5, 17, 64):
        raw = [rng.expovariate(1) ** 3 for _ in range(n)]
        out.append([x / sum(raw) for x in raw])
    return out


def plain(a):
    """Every statistic of one vector, written out."""
    n, square = len(a), sum(x * x for x in a)
    ordered = sorted(a, reverse=True)

    def covering(mass):
        total = 0.0
        for count, x in enumerate(ordered, 1):
            total += x
            if total >= mass:
                return count
        return n

    return {
        "hoyer": (math.sqrt(n) - sum(a) / math.sqrt(square)) / (math.sqrt(n) - 1) if n > 1 else 0.0,
        "entropy": -sum(x * math.log(x) for x in a if x > 0),
        "variance": sum((x - 1 / n) ** 2 for x in a) / n / (1 / n) ** 2,
        "coverage": [covering(0.5), covering(0.9), covering(0.95)],
        "distance": sum(x * (n - 1 - j) for j, x in enumerate(a)),
        "sink_share": sum(a[:4]),
    }


def test_padded_vectors_of_different_lengths_have_the_statistics_of_plain_arithmetic():
    rows = vectors()
    width = max(map(len, rows)) + 3
    attention = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
    length = torch.tensor([len(row) for row in rows])
    found = {
        "hoyer": sparsity.hoyer(attention, length),
        "entropy": sparsity.entropy(attention),
        "variance": sparsity.variance(attention, length),
        "coverage": sparsity.coverage(attention, length, (0.5, 0.9, 0.95)),
        "distance": sparsity.distance(attention, length),
        "sink_share": sparsity.sink_share(attention, 4),
    }
    for i, row in enumerate(rows):
        for name, expected in plain(row).items():
            assert found[name][i].tolist() == pytest.approx(expected, abs=2e-5, rel=1e-5), (name, len(row))


def test_variance_does_not_depend_on_the_scale():
    a = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    n = torch.tensor([4])
    assert sparsity.variance(a, n).item() == pytest.approx(sparsity.variance(a * 50, n).item())
    assert sparsity.variance(torch.zeros(1, 4), n).item() == 0.0


def test_coverage_is_never_more_than_there_is():
    uniform = torch.full((1, 8), 0.125)
    assert sparsity.coverage(uniform, torch.tensor([8]), (0.9, 0.999999)).tolist() == [[8.0, 8.0]]
    assert sparsity.coverage(torch.tensor([ONE_HOT]), torch.tensor([8]), (0.9,)).tolist() == [[1.0]]
