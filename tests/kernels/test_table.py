"""The Triton kernels take the table's columns as constants: with another order of them they write what they wrote."""

from __future__ import annotations

import pytest
import torch
from test_triton_indices import BLOCKS, ROWS, make

from lethe_sglang.kernels import reference, table
from lethe_sglang.kernels.common import Batch, Lists
from lethe_sglang.kernels.triton import launchers
from lethe_sglang.policies.base import Accumulation

PERMUTATIONS = [
    (("score_after", "packed", "prefix", "tail", "score_from"), ("holes", "kept", "excess")),
    (("tail", "prefix", "score_after", "score_from", "packed"), ("kept", "excess", "holes")),
]
RULE = Accumulation(decay=0.9, window=8)


def written(kernels, device):
    """All that the table's readers write: lists with and without their ends, pages, first scored positions, decays."""
    req_to_token, lines, lengths = make(3, 4)
    table.read(lines).score_after[:] = torch.tensor(lengths) - torch.arange(ROWS) % 3
    rows = torch.arange(ROWS)
    batch = Batch(*(t.to(device) for t in (req_to_token, lines, rows, torch.tensor(lengths))))
    out = []
    for layer in range(3):
        indptr = torch.zeros(ROWS + 1, dtype=torch.int32, device=device)
        for fill_indptr, blocks in ((True, BLOCKS), (False, BLOCKS), (True, None)):
            indices = torch.zeros(600, dtype=torch.int32, device=device)
            kernels.fill_lists(batch, layer, blocks, Lists(indptr, indices), fill_indptr)
            out += [indptr.clone(), indices]
    pages, lengths = torch.zeros((ROWS, 160), dtype=torch.int32, device=device), out[0][:ROWS].clone()
    kernels.fill_pages(batch, 1, lengths, pages)
    out += [lengths, pages]
    first = torch.zeros(ROWS, dtype=torch.int32, device=device)
    decay = torch.zeros(ROWS, device=device)
    kernels.schedule(batch, RULE, first, decay)
    return [x.cpu() for x in (*out, first, decay)]


@pytest.mark.parametrize("kernels", [launchers, reference], ids=["triton", "reference"])
@pytest.mark.parametrize(("single", "per_layer"), PERMUTATIONS)
def test_kernels_write_the_same_whatever_the_order_of_the_columns(device, kernels, single, per_layer, monkeypatch):
    where = device if kernels is launchers else torch.device("cpu")
    expected = written(kernels, where)
    assert (expected[-1] == 0).any() and (expected[-2] == table.NEVER).any() and (expected[-2] < table.NEVER).any()
    monkeypatch.setattr(table.DECODE, "single", single)
    monkeypatch.setattr(table.DECODE, "per_layer", per_layer)
    assert all(torch.equal(a, b) for a, b in zip(written(kernels, where), expected, strict=True))
