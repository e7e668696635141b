"""Runs inside the server: forces a reply token by token and compares distributions where they are, unsampled.

A request names its tokens and files in ``custom_params.forced``. With the full cache the distributions of all steps are
kept in a file; with an arm each step is compared with that file, and a few numbers a step are left.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

MEASURES = ("kl", "agreement", "nll", "full_nll")
"""Per step: ``KL(full || arm)`` in nats, whether the likeliest token is the same, and the negative log-likelihoods of
the forced token with the arm and with the full cache."""


class Forced:
    """Forces ``custom_params.forced.tokens``; the request's parameters keep its step, whatever batch it is in.

    It is what SGLang calls a custom logit processor.
    """

    @classmethod
    def to_str(cls) -> str:
        """Return what a request carries: the class by its name, which the server imports."""
        import dill

        return json.dumps({"callable": dill.dumps(cls, byref=True).hex()})

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Take the logits of a step, ``[B, V]``; return those that leave one token a request."""
        for line, params in zip(logits, custom_param_list or (), strict=True):
            forced = params["forced"]
            step = forced["step"] = forced.get("step", -1) + 1
            token = forced["tokens"][step]
            observe(forced, step, token, line.float().log_softmax(-1))
            line.fill_(float("-inf"))
            line[token] = 0.0
        return logits


def observe(forced: dict[str, Any], step: int, token: int, found: torch.Tensor) -> None:
    """Keep a step's distribution ``found``, float32 ``[V]`` in nats, or compare it with the one that is kept.

    On a GPU all stays there until the last step, half precision as in the file, so that no step waits for a copy.
    """
    if forced["reference"] is None:
        _kept(forced, step, found)
        return
    if step == 0:
        forced["full"], forced["found"] = np.load(forced["reference"], mmap_mode="r"), []
        if found.is_cuda:
            forced["full"] = torch.from_numpy(np.load(forced["reference"])).to(found.device)
    full = forced["full"][step] if found.is_cuda else torch.from_numpy(forced["full"][step].astype(np.float32))
    forced["found"].append(compare(full.float(), found, token))
    if step == len(forced["tokens"]) - 1:
        keep(Path(forced["result"]), torch.stack(forced.pop("found")).cpu().numpy())
        del forced["full"]


def _kept(forced: dict[str, Any], step: int, found: torch.Tensor) -> None:
    draft, last = f"{forced['result']}.draft", len(forced["tokens"]) - 1
    shape = last + 1, len(found)
    if step == 0 and found.is_cuda:
        forced["kept"] = found.new_empty(shape, dtype=torch.float16)
    elif step == 0:
        forced["kept"] = open_memmap(draft, mode="w+", dtype=np.float16, shape=shape)  # type: ignore[no-untyped-call]
    forced["kept"][step] = found if found.is_cuda else found.numpy()
    if step < last:
        return
    kept = forced.pop("kept")
    if found.is_cuda:
        with open(draft, "wb") as out:
            np.save(out, kept.cpu().numpy())
    else:
        kept.flush()
    os.replace(draft, forced["result"])


def keep(path: Path, steps: NDArray[np.float32]) -> None:
    """Write a document's steps; the file is there as a whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as out:
        np.save(out, steps)
    draft.replace(path)


def compare(full: torch.Tensor, arm: torch.Tensor, token: int) -> torch.Tensor:
    """Return ``MEASURES`` of a step, float32 ``[4]``, from log-probabilities float32 ``[V]``."""
    full = full.log_softmax(-1)  # stored in half precision, so renewed to sum to one
    kl = (full.exp() * (full - arm)).sum()
    return torch.stack([kl, (full.argmax() == arm.argmax()).float(), -arm[token], -full[token]])
