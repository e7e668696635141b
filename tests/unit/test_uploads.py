"""Host numbers go up in one copy: one a launch of rounds, one a flush of the device table, whatever the policy.

The device here is ``meta``: its tensors have no values, so every tensor that reaches it from the host shows. Kernels
are those of a GPU, none of which is started.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from flashinfer_double import BUDGETS, World, meta
from torch.overrides import TorchFunctionMode

from lethe_sglang.cache import rounds
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.cache.upload import upload
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels.triton import Kernel, launchers
from lethe_sglang.policies import policy_names
from lethe_sglang.policies.random import RandomPolicy


def flat(values):
    """All tensors and lists of numbers in arguments."""
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif isinstance(value, torch.Tensor | list):
            yield value


class Uploads(TorchFunctionMode):
    """Collects torch calls that make a tensor of the device from numbers of the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [*flat(args), *flat((kwargs or {}).values())]
        of_host = any(isinstance(x, list) and not any(isinstance(y, torch.Tensor) for y in x) for x in given)
        of_host |= any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in given)
        name = getattr(function, "__name__", "")
        there = [x for x in (result, *given) if isinstance(x, torch.Tensor) and x.device.type == "meta"]
        if of_host and there and name != "split":  # which takes sizes
            self.found.append(name)
        return result


def launch(policy, rows=(1, 2, 3)):
    """Run one launch of rounds on the device; return the uploads it took."""
    world = World()
    for row in rows:
        world.admit(row, 40 + row, 8 * (row - 1), BUDGETS)
    plans = [world.ledger.plan(s, world.seq[s.row], s.budgets) for s in world.ledger.requests.values()]
    cells = world.cells._replace(**meta(world.cells._asdict()))
    req_to_token = world.req_to_token.to("meta")
    with (
        mock.patch.object(rounds, "kernels_for", lambda device: launchers),
        mock.patch.object(Kernel, "launch", lambda *args, **kwargs: None),
        Uploads() as uploads,
    ):
        result = rounds.run_round(plans, cells, req_to_token, policy)
    assert result.freed.device.type == "meta" and len(result.freed) == sum(
        p.old_packed + p.new_tail - p.old_tail - p.new_packed for p in plans
    )
    return uploads.found


@pytest.mark.parametrize("name", policy_names())
def test_a_launch_is_one_upload(name):
    assert launch(from_mapping({"policy": name}).built_policy) == ["to"]


def test_more_requests_are_no_more_uploads():
    assert launch(RandomPolicy(), (1,)) == launch(RandomPolicy(), (1, 2, 3, 4, 5)) == ["to"]


def test_the_table_is_one_upload_a_step():
    ledger = Ledger(8, 5, 1, 6, 8, "meta")
    for row in (1, 2, 3):
        ledger.open(f"r{row}", row, 0, BUDGETS)
    with Uploads() as uploads:
        ledger.flush()
        ledger.flush()
    assert uploads.found == ["to"] and not ledger.dirty


@pytest.mark.parametrize(
    "upload",
    ["torch.tensor([1.0], device=t.device)", "torch.zeros(3).to(t)", "t.copy_(torch.zeros(3))", "t[[0, 1]]", "t[i]"],
)
def test_an_upload_is_seen(upload, monkeypatch):
    """Each kind of upload, put into a policy's rank, is counted."""
    rank = RandomPolicy.rank

    def ranked(self, candidates):
        exec(upload, {"torch": torch, "t": torch.zeros(3, device="meta"), "i": torch.tensor([0, 1])})
        return rank(self, candidates)

    monkeypatch.setattr(RandomPolicy, "rank", ranked)
    assert len(launch(RandomPolicy())) == 2


def test_what_arrives_is_laid_out_line_by_line():
    """The lines of a model of one layer come in columns, and kernels read lines."""
    lines = np.asfortranarray([[1, 2, 3], [4, 5, 6]])
    found = upload(lines, torch.device("cpu"))
    assert found.is_contiguous() and found.dtype == torch.int32 and found.tolist() == lines.tolist()
