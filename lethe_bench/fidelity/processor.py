"""Runs inside the server: forces a reply token by token and compares distributions where they are, unsampled.

A request names its tokens and files in ``custom_params.forced``. With the full cache the distributions of all steps are
kept in a file; with an arm each step is compared with that file, and a few numbers a step are left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from lethe_sglang.files import replacing

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
        batch = [_at_step(params) for params in custom_param_list or ()]
        tokens = torch.tensor([forced["tokens"][forced["step"]] for forced in batch], device=logits.device)
        observe(batch, tokens, logits.float().log_softmax(-1))
        return logits.fill_(float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _at_step(params: dict[str, Any]) -> dict[str, Any]:
    """Return what is forced, at its next step.

    With overlap SGLang drops the token that is in flight when it retracts a request. So the first step behind the new
    prefill is that of the first token which the request does not have, and may have been seen before.
    """
    forced = cast(dict[str, Any], params["forced"])
    request = params.get("__req__")
    retractions = 0 if request is None else request.retraction_count
    if request is not None and retractions != forced.get("retractions", 0):
        forced["step"] = len(request.output_ids)
        del forced.get("found", [])[forced["step"] :]
    else:
        forced["step"] = forced.get("step", -1) + 1
    forced["retractions"] = retractions
    return forced


def observe(batch: Sequence[dict[str, Any]], tokens: torch.Tensor, found: torch.Tensor) -> None:
    """Keep a step's distributions, or compare them with those that are kept.

    On a GPU all stays there until a reply's last step, so that no other step waits for a copy.

    Parameters
    ----------
    batch
        Of each request what is forced, and at which ``step`` it is.
    tokens
        The forced token of each, int64 ``[B]``.
    found
        Log-probabilities in nats, float32 ``[B, V]``.
    """
    for forced, line in zip(batch, found, strict=True):
        if forced["reference"] is None:
            _keep_distribution(forced, line)
    rows = [row for row, forced in enumerate(batch) if forced["reference"] is not None]
    if not rows:
        return
    compared = [batch[row] for row in rows]
    full = torch.stack([_reference(forced, found.device)[forced["step"]] for forced in compared]).float()
    for forced, measures in zip(compared, compare(full, found[rows], tokens[rows]), strict=True):
        forced.setdefault("found", []).append(measures)
        if forced["step"] == len(forced["tokens"]) - 1:
            keep(Path(forced["result"]), torch.stack(forced["found"]).cpu().numpy())
            del forced["full"]


def _reference(forced: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Return the distributions with the full cache, float16 ``[T, V]``: on a GPU, or as the file has them."""
    if "full" not in forced:
        path = forced["reference"]
        forced["full"] = _on_device(path, device) if device.type == "cuda" else _mapped(path)
    return cast(torch.Tensor, forced["full"])


def _mapped(path: str) -> torch.Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # pages are copied if written to, and nothing writes


@lru_cache(maxsize=128)
def _on_device(path: str, device: torch.device) -> torch.Tensor:
    """Load a file once for all arms; 100 MB for 1,000 steps of 49,152 words."""
    return torch.from_numpy(np.load(path)).to(device)


def _keep_distribution(forced: dict[str, Any], found: torch.Tensor) -> None:
    draft, last = f"{forced['result']}.draft", len(forced["tokens"]) - 1
    if forced["step"] == 0:
        shape = last + 1, len(found)
        forced["file"] = open_memmap(draft, mode="w+", dtype=np.float16, shape=shape)  # type: ignore[no-untyped-call]
        forced["kept"] = (
            found.new_empty(shape, dtype=torch.float16) if found.is_cuda else torch.from_numpy(forced["file"])
        )
    forced["kept"][forced["step"]] = found
    if forced["step"] == last:
        kept, file = forced.pop("kept"), forced.pop("file")
        if kept.is_cuda:
            file[:] = kept.cpu().numpy()
        file.flush()
        os.replace(draft, forced["result"])


def keep(path: Path, steps: NDArray[np.float32]) -> None:
    """Write a document's steps; the file is there as a whole or not at all."""
    with replacing(path) as out:
        np.save(out, steps)


def compare(full: torch.Tensor, arm: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return ``MEASURES`` of steps, float32 ``[B, 4]``.

    ``full`` and ``arm`` are log-probabilities, float32 ``[B, V]``; ``tokens`` are those forced, int64 ``[B]``.
    """
    full = full.log_softmax(-1)  # stored in half precision, so renewed to sum to one
    kl = (full.exp() * (full - arm)).sum(-1)
    agreement = (full.argmax(-1) == arm.argmax(-1)).float()
    nll, full_nll = (-found.gather(1, tokens[:, None]).squeeze(1) for found in (arm, full))
    return torch.stack([kl, agreement, nll, full_nll], dim=1)
