"""Nothing on the decode path reads a tensor of the device back: not in a step, not in a round, not in a plan.

On a CPU nothing stops such a read, so a guard watches every torch call that would make the host wait on a GPU. What
the references of kernels do is a Triton launch there and is not watched; host tensors are read in HOST_ONLY alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from flashinfer_double import BUDGETS, SUM, Server, World, ours
from torch.overrides import TorchFunctionMode

import lethe_sglang
from lethe_sglang.config import from_mapping
from lethe_sglang.policies import policy_names

HERE, TORCH = str(Path(lethe_sglang.__file__).parent), str(Path(torch.__file__).parent)
WAITS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__len__",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "equal",
    "allclose",
    "is_nonzero",
    "bincount",
    "__contains__",
}
HOST_ONLY = {("flashinfer.py", "update"), ("length_classes.py", "lengths"), ("dropped.py", "_count")}
"""Functions that read lengths, plans and sums whose copy has arrived, which are host tensors."""


def waits(name, args, kwargs):
    """Whether a torch call has to know values, or how many of them there are, on the host."""
    if name == "__len__":
        return False  # a shape
    if name in WAITS:
        return True
    if name == "to":
        return "cpu" in (*args[1:], *kwargs.values())  # an upload names the pool's own device, which here is a CPU, too
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return isinstance(args[1], torch.Tensor) and kwargs.get("output_size") is None
    if name == "__getitem__":
        keys = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(key, torch.Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)
    return False


class Guard(TorchFunctionMode):
    """Collects the waits of our own code."""

    def __init__(self):
        super().__init__()
        self.calls, self.found = 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        place = self.place()
        if place is not None:
            self.calls += 1
            if waits(name, args, kwargs) and place[:2] not in HOST_ONLY:
                self.found.append((name, *place))
        return function(*args, **kwargs)

    @staticmethod
    def place():
        """File, function and line of the call if it is ours (SGLang's doubles are not), None below a launch."""
        frame, found = sys._getframe(2), None
        while frame is not None:
            file = frame.f_code.co_filename
            if file.endswith(("lethe_sglang/kernels/reference.py", "lethe_sglang/kernels/reference_round.py")):
                return None
            if found is None and not file.startswith(TORCH):
                if not file.startswith(HERE):
                    return None
                found = (Path(file).name, frame.f_code.co_name, frame.f_lineno)
            frame = frame.f_back
        return found


def flashinfer(runner, world, rows, single=False):
    pool = runner.token_to_kv_pool
    return ours.flashinfer.LetheFlashInferBackend(runner, pool, world.ledger, SUM, BUDGETS, rows, single_plan=single)


def triton(runner, world, rows):
    return ours.triton.LetheTritonBackend(runner, runner.token_to_kv_pool, world.ledger, SUM, BUDGETS)


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("make", [flashinfer, triton])
def test_steps_and_rounds_never_wait_for_the_device(make, page):
    server, policy = Server(make, page=page), from_mapping({"lethe": {"key_share": 0.5}}).built_policy
    server.admit()
    rounds = 0
    with Guard() as guard:
        for number in range(14):
            rounds += len(server.world.due())
            server.step([(1, 2, 3, 4, 5, 6), (2, 3, 5), (3, 1)][number % 3], policy)
    assert rounds >= 3
    assert guard.calls > 100, "the guard saw nothing"
    assert guard.found == []


@pytest.mark.parametrize("name", policy_names())
def test_no_policy_waits_for_the_device(name):
    world, policy = World(), from_mapping({"policy": name}).built_policy
    for row, budgets in ((1, BUDGETS), (2, BUDGETS)):
        world.admit(row, 40, 0, budgets)
    with Guard() as guard:
        world.round(list(world.ledger.requests.values()), policy)
    assert guard.calls > 10, "the guard saw nothing"
    assert guard.found == []


def test_recording_what_a_step_says_never_waits_for_the_device():
    quality = pytest.importorskip("lethe_sglang.engine.quality")
    recorder = quality.Recorder(lambda req: None)
    recorder.noted = [quality.Noted(line, None, quality.UNPRUNED) for line in (0, 2)]
    logits, tokens = torch.randn(4, 30), torch.tensor([3, 1, 4, 1])
    with Guard() as guard:
        said = recorder.after_sample(recorder.before_grammar(logits, None), tokens)
        host = said.copy_to_host(lambda tensor: tensor)
    assert guard.calls > 5, "the guard saw nothing"
    assert guard.found == [] and host.logprob.shape == (2,)


@pytest.mark.parametrize(
    "wait",
    [
        "t.item()",
        "t.tolist()",
        "bool(t)",
        "int(t)",
        "t.cpu()",
        "t.to('cpu')",
        "t.nonzero()",
        "torch.where(t > 0)",
        "t.view(1)[t.view(1) > 0]",
        "t.view(1).repeat_interleave(t.view(1))",
    ],
)
def test_the_guard_sees_a_wait(wait, monkeypatch):
    """Each kind of wait, put into a policy's rank, is found."""
    from lethe_sglang.policies.random import RandomPolicy

    scope = {"torch": torch, "rank": RandomPolicy.rank}
    source = (
        f"def ranked(self, candidates):\n    t = candidates.length[0]\n    {wait}\n    return rank(self, candidates)\n"
    )
    exec(compile(source, f"{HERE}/policies/broken.py", "exec"), scope)
    monkeypatch.setattr(RandomPolicy, "rank", scope["ranked"])
    world = World()
    world.admit(1, 40, 0, BUDGETS)
    with Guard() as guard:
        world.round(list(world.ledger.requests.values()), from_mapping({"policy": "random"}).built_policy)
    assert {found[1] for found in guard.found} == {"broken.py"}
