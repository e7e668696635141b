"""Own trajectories: how far a reply that was generated with eviction is from the full cache, by one prefill of it.

A prefill sees every token, so one of prompt and reply says what the full cache would have said at every step on the way
that the arm took. No second server is needed. For a token that the arm sampled::

    r = log p_full - log p_arm,    k3 = exp(r) - 1 - r

k3 is 0 where both give the token the same probability, and positive elsewhere. SGLang's own kit computes the same
(``sglang.test.kl_test_utils``).

**At which temperature this is valid.** SGLang divides the logits of a decode step by the temperature before it takes
the log-probabilities that it returns, and those of a prefill never. So the two can be compared at temperature 1 and,
because SGLang samples it as temperature 1 and ``top_k`` 1, at temperature 0; at any other the numbers mean nothing,
unless the server runs with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``. At temperature 1, without ``top_p``, ``top_k`` and
``min_p``, the reply is a sample of the arm and the mean of k3 estimates ``KL(arm || full)`` without bias, because
``E[exp(r)] = 1``. At temperature 0 it is a distance at the likeliest tokens, good for comparing arms, and no estimate.
``logit_bias``, penalties, ``min_new_tokens``, grammars and logit processors change decode steps only and must be off.
The two passes round differently: measure the full cache's own reply to see how much of k3 that is (in float32 next
to nothing, in 16 bits more, and most with ``--rl-on-policy-target``, which rounds the logits of decode steps again).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lethe_bench.fidelity import processor
from lethe_bench.fidelity.corpora import Split, questions
from lethe_bench.servers import Server, ServerError
from lethe_bench.statistics import paired_means, pooled_mean
from lethe_sglang.config import ConfigError

R, K3, AGREEMENT = range(3)
"""Columns of a reply's steps, float32 ``[T, 3]``: r and k3 in nats, and whether the likeliest token is the same."""

ASKED = {"return_logprob": True, "top_logprobs_num": 1}
"""What a native request for a reply carries, so that its steps can be measured."""

FOLDER = "trajectories"

Steps = NDArray[np.float32]


class Said(NamedTuple):
    """What one pass said at the steps of a reply.

    Attributes
    ----------
    tokens
        The reply's, ``[T]``.
    logprobs
        Log-probability of each in nats, ``[T]``.
    likeliest
        The token with the largest probability at each step, ``[T]``.
    """

    tokens: list[int]
    logprobs: list[float]
    likeliest: list[int]


def decoded(reply: dict[str, Any]) -> Said:
    """Return what the decode steps of a reply said.

    Parameters
    ----------
    reply
        SGLang's native answer to a request that carried ``ASKED``.

    Raises
    ------
    ServerError
        If it has no log-probabilities.
    """
    return _said(reply, "output", None)


def prefilled(reply: dict[str, Any], tokens: Sequence[int]) -> Said:
    """Return what a prefill said of the last tokens of its input, which are ``tokens``.

    Raises
    ------
    ServerError
        If it does not have log-probabilities of all of them.
    """
    return _said(reply, "input", len(tokens))._replace(tokens=list(tokens))


def _said(reply: dict[str, Any], part: str, last: int | None) -> Said:
    if "error" in reply:
        raise ServerError(str(reply["error"]))
    meta = reply["meta_info"]
    steps, first = meta.get(f"{part}_token_logprobs") or [], meta.get(f"{part}_top_logprobs") or []
    count = len(steps) if last is None else last
    steps, first = steps[max(len(steps) - count, 0) :], first[max(len(first) - count, 0) :]  # a prefill has more
    if not count or not len(steps) == len(first) == count or any(step[0] is None for step in steps):
        raise ServerError(f"the server gave {len(steps)} of {count} log-probabilities of the {part}")
    return Said([step[1] for step in steps], [step[0] for step in steps], [tops[0][1] for tops in first])


def compared(arm: Said, full: Said) -> Steps:
    """Return r, k3 and agreement of every step, float32 ``[T, 3]``."""
    r = np.array(full.logprobs, dtype=np.float64) - np.array(arm.logprobs, dtype=np.float64)
    same = np.array(full.likeliest) == np.array(arm.likeliest)
    return np.stack((r, np.expm1(r) - r, same), axis=1).astype(np.float32)


def measured(server: Server, prompt: Sequence[int], reply: dict[str, Any]) -> Steps:
    """Prefill prompt and reply once, with nothing evicted, and return the reply's steps, float32 ``[T, 3]``.

    Parameters
    ----------
    server
        The one that gave the reply, or another of the same model.
    prompt
        Token ids.
    reply
        SGLang's native answer to a request of ``prompt`` that carried ``ASKED``, at temperature 0 or 1 (see above).

    Raises
    ------
    ServerError
        If one of the two answers lacks log-probabilities.
    """
    arm = decoded(reply)
    # The prefix cache serves no position from logprob_start_len on, so the reply is computed whatever the tree holds.
    sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"kv_evict": "none"}}
    body = {"input_ids": [*prompt, *arm.tokens], **ASKED, "logprob_start_len": len(prompt) - 1}
    answer = json.loads(server.post("/generate", {**body, "sampling_params": sampling}, timeout=3600))
    return compared(arm, prefilled(answer, arm.tokens))


# -- lethe eval fidelity ----------------------------------------------------------------------------------------------


def path_of(out: Path, arm: str, name: str) -> Path:
    """Return the file of the steps of an arm's own reply to a question, in a results directory."""
    return out / arm / FOLDER / f"{name}.npy"


def prompts(tokenizer: Any, split: Split, count: int) -> dict[str, list[int]]:
    """Return questions of a split by name, as token ids.

    Raises
    ------
    ConfigError
        If there are too few.
    """
    found = dict(islice(questions(tokenizer, split), count))
    if len(found) < count:
        raise ConfigError(f"trajectories: got {count}, but there are {len(found)} questions")
    return found


def missing(out: Path, arm: str, names: Iterable[str]) -> list[str]:
    """Return the questions that an arm has yet to answer."""
    return [name for name in names if not path_of(out, arm, name).exists()]


def keep(server: Server, path: Path, prompt: list[int], tokens: int, *, evicts: bool) -> None:
    """Let a live server answer a prompt with the arm that it has, and keep the steps of the reply.

    It is sampled at temperature 1, so that k3 is an estimate of ``KL(arm || full)``, and does not stop at an end of
    text: a token that is forbidden would be one whose probability the two passes see differently.

    Parameters
    ----------
    server, prompt
        As for :func:`measured`.
    path
        Of the steps, an ``.npy`` file; it is there as a whole or not at all.
    tokens
        Length of the reply.
    evicts
        Whether its KV may be evicted.
    """
    sampling: dict[str, Any] = {"temperature": 1, "max_new_tokens": tokens, "ignore_eos": True}
    if not evicts:
        sampling["custom_params"] = {"kv_evict": "none"}
    reply = json.loads(server.post("/generate", {"input_ids": prompt, **ASKED, "sampling_params": sampling}, 3600))
    path.parent.mkdir(parents=True, exist_ok=True)
    processor.keep(path, measured(server, prompt, reply))


_COLUMNS = (("k3 (nats)", K3), ("same first choice", AGREEMENT))


def section(out: Path, reference: str, arms: Sequence[str], skip: int) -> str:
    """Return Markdown of the own trajectories in a results directory, empty if there are none.

    Parameters
    ----------
    out
        The directory.
    reference
        The arm that others are paired with, question by question.
    arms
        Arms in order; ``full`` comes first, as what rounding alone does.
    skip
        Steps at the beginning of each reply that are not counted.
    """
    found = {
        arm: {path.stem: np.load(path)[skip:] for path in sorted((out / arm / FOLDER).glob("*.npy"))}
        for arm in ("full", *arms)
    }
    if not any(found.values()):
        return ""
    titles = [title for title, _ in _COLUMNS]
    head = ["arm", "questions", *titles, *(f"{title}, less {reference}" for title in titles)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for arm, replies in found.items():
        if replies:
            common = sorted(set(replies) & set(found[reference])) if arm != reference else []
            cells = [_mean(replies, column) for _, column in _COLUMNS]
            cells += [_gain(replies, found[reference], common, column) for _, column in _COLUMNS]
            lines.append(f"| {arm} | {len(replies)} | {' | '.join(cells)} |")
    return "\n".join(
        (
            "## Own trajectories",
            "",
            "Replies that each arm sampled for itself at temperature 1, and then one prefill of each: r is the log-"
            "probability of a sampled token with the full cache less that with the arm, and the mean of "
            "k3 = exp(r) - 1 - r estimates KL(arm || full). `full` is what rounding alone does.",
            "",
            *lines,
        )
    )


def _mean(replies: dict[str, Steps], column: int) -> str:
    mean, low, high = pooled_mean([[float(steps[:, column].mean()) for steps in replies.values()]])
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


def _gain(first: dict[str, Steps], second: dict[str, Steps], names: list[str], column: int) -> str:
    if not names:
        return ""
    one, other = ([float(replies[name][:, column].mean()) for name in names] for replies in (first, second))
    gain = paired_means([(one, other)])
    return f"{gain.gain:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
