"""A slot that is allocated again starts without its last owner's score, in every layer and nowhere else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lethe_sglang.kernels import reference
from lethe_sglang.kernels.common import States
from lethe_sglang.kernels.triton.start_states import start_states


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("recurs", [False, True])
@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=8)
@given(layers=st.sampled_from([1, 3, 28]), blocks=st.integers(9, 40), n=st.integers(1, 8), seed=st.integers(0, 99))
def test_states_start_anew_in_all_layers(device, has_memory, recurs, layers, blocks, n, seed):
    torch.manual_seed(seed)
    score = torch.randn(layers * blocks, device=device)
    memory = torch.randn(layers * blocks, device=device) if has_memory else None
    slots = torch.randperm(blocks - 1, device=device)[:n] + 1
    positions = torch.randint(0, 2**20, (n,), device=device) if recurs else None
    expected = [score.cpu().clone(), memory.cpu().clone() if has_memory else None]
    reference.start_states(States(*expected), slots.cpu(), None if positions is None else positions.cpu(), layers)
    start_states(States(score, memory), slots, positions, layers)
    assert torch.equal(score.cpu(), expected[0])
    assert (score.view(layers, blocks)[:, slots] == (0 if positions is None else positions.float())).all()
    if memory is not None:
        assert torch.equal(memory.cpu(), expected[1])
        assert not memory.view(layers, blocks)[:, slots].any()


def test_more_cells_than_one_program_takes(device):
    score = torch.ones(28 * 200, device=device)
    start_states(States(score, None), torch.arange(1, 151, dtype=torch.int32, device=device), None, 28)
    assert not score.view(28, 200)[:, 1:151].any()
    assert score.view(28, 200)[:, 151:].all() and score.view(28, 200)[:, 0].all()


def test_a_policy_may_keep_memory_only_or_nothing(device):
    memory = torch.ones(20, device=device)
    slots = torch.tensor([3], device=device)
    start_states(States(None, None), slots, None, 2)
    start_states(States(None, memory), slots, slots, 2)
    assert memory.nonzero().flatten().tolist() == [i for i in range(20) if i not in (3, 13)]


def test_no_slot_is_no_launch(device):
    score = torch.ones(4, device=device)
    start_states(States(score, None), torch.empty(0, dtype=torch.int64, device=device), None, 2)
    assert score.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(20, dtype=torch.float16)}, "score must be float32"),
        ({"memory": torch.zeros(19)}, "memory must be float32 of shape \\[20\\]"),
        ({"slots": torch.zeros(2)}, "slots must be int32 or int64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions must be int32 or int64 of shape \\[2\\]"),
        ({"num_layers": 3}, "do not divide into 3 layers"),
        ({"score": torch.zeros(40)[::2]}, "last axis contiguous"),
    ],
)
def test_bad_shapes_are_named(device, change, message):
    good = {"score": torch.zeros(20), "memory": torch.zeros(20), "slots": torch.tensor([1, 2]), "positions": None}
    arguments = {**good, "num_layers": 2, **change}
    states = States(arguments.pop("score"), arguments.pop("memory"))
    with pytest.raises(ValueError, match=message):
        start_states(states, **arguments)
