"""The live quality signal without its server (``monitor.py``): what is recorded, compared, grouped and bounded.

A token that the evicted server sampled has the log-probability ``log q`` there and ``log p`` with the full cache::

    r = log p - log q,    k3 = exp(r) - 1 - r

k3 is 0 where both agree about the token and positive elsewhere. Where the tokens are samples of q (temperature 1,
without top_p, top_k and min_p) its mean estimates ``KL(q || p)`` without bias, because ``E[exp(r)] = 1``. Elsewhere it
is a distance at the tokens that were chosen, good for seeing a drift.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from lethe_sglang.cache.upload import upload

LARGEST = 20.0
"""r is cut here (nats): no sum is lost to one token. Of samples of q one in 500 million has a larger one."""
EDGES = (16, 64)
"""Decode steps since the last round at which another group begins."""
WINDOW = 512
"""Most tokens of a reply that one probe compares: their logits are a part of the memory that it takes."""
MINUTE = 60.0
"""Seconds over which the tokens of probes are bounded."""
K3_BUCKETS = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of the histogram of k3 (nats)."""


class Label(NamedTuple):
    """The group of a token: why the last round before it came, and how many decode steps before."""

    reason: str
    steps: str


UNPRUNED = Label("none", "none")
"""The group of tokens before their request's first round: nothing was evicted, so they show what rounding does."""


def label(reason: str, steps: int) -> Label:
    """Return the group of a token that came ``steps`` decode steps after the step of the last round."""
    lower = max((edge for edge in EDGES if edge <= steps), default=0)
    upper = min((edge for edge in EDGES if edge > steps), default=None)
    return Label(reason, f"{lower}+" if upper is None else f"{lower}-{upper - 1}")


class Told(NamedTuple):
    """What a step of the evicted server said: the log-probability of the token (nats), the likeliest one, the group."""

    logprob: float
    likeliest: int
    label: Label


def k3(full: float, evicted: float) -> float:
    """Return k3 of a token's log-probabilities (nats), with r cut at ``LARGEST``."""
    r = min(max(full - evicted, -LARGEST), LARGEST)
    return math.expm1(r) - r


def draws(rid: str) -> tuple[float, float]:
    """Return two independent numbers in [0, 1) that follow from a request's id: whether it is sampled, and where."""
    digest = hashlib.blake2b(rid.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:], "big") / 2**32


def window(first: int, count: int, place: float) -> tuple[int, int] | None:
    """Choose the tokens of a reply that a probe compares.

    Parameters
    ----------
    first
        The first token that came after a round.
    count
        Tokens of the reply that a probe can reach.
    place
        In [0, 1): which of the possible windows. So early and late tokens are compared alike.

    Returns
    -------
    tuple or None
        First token and the one behind the last; None if no token after a round can be reached.
    """
    if count <= first:
        return None
    last = max(count - WINDOW, 0)
    earliest = min(first, last)
    start = earliest + int(place * (last - earliest + 1))
    return start, min(start + WINDOW, count)


class Allowance:
    """Tokens that probes may prefill within a minute."""

    def __init__(self) -> None:
        self._spent: deque[tuple[float, int]] = deque()

    def left(self, now: float, limit: int) -> int:
        """Return how many of ``limit`` tokens are left at ``now`` (seconds)."""
        while self._spent and self._spent[0][0] <= now - MINUTE:
            self._spent.popleft()
        return limit - sum(tokens for _, tokens in self._spent)

    def spend(self, now: float, tokens: int) -> None:
        """Note tokens that are prefilled now."""
        self._spent.append((now, tokens))


@dataclass
class Sums:
    """What was compared in a group: tokens, those whose likeliest token is the same, and the sum of k3 (nats)."""

    tokens: int = 0
    agreed: int = 0
    k3: float = 0.0


@dataclass
class Quality:
    """What probes have found since the start, by group."""

    groups: dict[Label, Sums] = field(default_factory=dict)

    def add(self, group: Label, value: float, agrees: bool) -> None:
        """Add a token."""
        sums = self.groups.setdefault(group, Sums())
        sums.tokens += 1
        sums.agreed += agrees
        sums.k3 += value

    def report(self) -> list[dict[str, Any]]:
        """Return, by group, ``reason``, ``steps``, ``tokens``, the mean of ``k3`` (nats) and of ``agreement``."""
        return [
            {**group._asdict(), "tokens": s.tokens, "k3": s.k3 / s.tokens, "agreement": s.agreed / s.tokens}
            for group, s in sorted(self.groups.items())
        ]


class Metrics:
    """The quality signal on ``/metrics``; ``labels`` are SGLang's."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Counter, Histogram  # only after SGLang has set the multiprocess directory

        self._labels, names = labels, list(labels)
        group, prefix = [*names, "reason", "steps"], "sglang:kv_evict_quality"
        self.probes = Counter(f"{prefix}_probes", "Finished requests prefilled again.", names).labels(**labels)
        self.tokens = Counter(f"{prefix}_prefilled_tokens", "Tokens that probes have prefilled.", names).labels(
            **labels
        )
        self._skipped = Counter(f"{prefix}_skipped", "Probes that did not run.", [*names, "reason"])
        text = "k3 of a token's log-probability, full cache against evicted (nats)."
        self._k3 = Histogram(f"{prefix}_k3", text, group, buckets=K3_BUCKETS)
        text = "Tokens compared, by whether the full cache's likeliest token is the evicted server's."
        self._compared = Counter(f"{prefix}_tokens", text, [*group, "agree"])

    def skipped(self, reason: str, count: int) -> None:
        """Count probes that did not run."""
        self._skipped.labels(**self._labels, reason=reason).inc(count)

    def observe(self, group: Label, value: float, agrees: bool) -> None:
        """Count a token."""
        labels = {**self._labels, **group._asdict()}
        self._k3.labels(**labels).observe(value)
        self._compared.labels(**labels, agree="yes" if agrees else "no").inc()


# -- what is recorded -------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What the steps of a sampled request have said, by the token's place in the reply.

    ``place`` is its second draw; ``epoch`` is the monitor's when it arrived.
    """

    place: float
    epoch: int
    told: dict[int, Told] = field(default_factory=dict)


@dataclass
class Entry:
    """A finished request that a probe is to be made of.

    Attributes
    ----------
    message
        The probe's (``monitor.Probe``).
    first
        Place in the reply of the first token that is compared.
    told, epoch
        Of its :class:`Record`.
    extend
        Tokens that will be prefilled if the prefix cache still has the prompt.
    blocked
        Why it has not started yet.
    """

    message: Any
    first: int
    told: dict[int, Told]
    epoch: int
    extend: int
    blocked: str = "load"


class Noted(NamedTuple):
    """A sampled request in the batch that is being run: its line, itself, and the group of its next token."""

    line: int
    req: Any
    label: Label


class Step(NamedTuple):
    """The logits of the noted requests before anything changes them: float32 ``[N, vocabulary]``, and their lines."""

    noted: list[Noted]
    index: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Said:
    """What a step says about the tokens it sampled, ``[N]`` each: on the device, then a copy of it on the host.

    ``finished`` is told of requests that have ended with such a token.
    """

    finished: Callable[[Any], None]
    noted: list[Noted]
    logprob: torch.Tensor
    likeliest: torch.Tensor

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> Said:
        """Copy it with SGLang's own results (SGLang's ``DeviceAuxiliaryOutput``)."""
        return replace(self, logprob=copy(self.logprob), likeliest=copy(self.likeliest))

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Keep what was said of tokens that have become part of a reply (SGLang's ``HostAuxiliaryOutput``)."""
        said = zip(self.noted, self.logprob.tolist(), self.likeliest.tolist(), strict=True)
        for noted, logprob, likeliest in said:
            commit = commits[noted.line]
            if commit is not None:  # a middle chunk, a retracted or a finished request has no new token
                noted.req._kv_quality.told[commit.output_index] = Told(logprob, likeliest, noted.label)
                if noted.req.finished():
                    self.finished(noted.req)


class Recorder:
    """SGLang's ``SamplingObserver``: sees the logits of a step, then the tokens. Nothing of it makes the host wait.

    Parameters
    ----------
    finished
        Is told of sampled requests that have ended.

    Attributes
    ----------
    noted
        Sampled requests of the batch that is being run.
    """

    def __init__(self, finished: Callable[[Any], None]) -> None:
        self.finished = finished
        self.noted: list[Noted] = []

    def is_active(self, sampling_info: Any) -> bool:
        """Whether the batch has sampled requests; if not, the step is as without an observer."""
        return bool(self.noted)

    def before_grammar(self, logits: torch.Tensor, sampling_info: Any) -> Step:
        """Take the sampled requests' logits: the sampler overwrites them."""
        index = upload(np.array([[noted.line] for noted in self.noted]), logits.device)[:, 0]
        return Step(self.noted, index, logits.index_select(0, index).float())

    def after_sample(self, state: Step, token_ids: torch.Tensor) -> Said:
        """Take log q of the tokens and the likeliest ones."""
        tokens = token_ids.index_select(0, state.index).long()
        chosen = state.logits.gather(1, tokens[:, None])[:, 0]
        return Said(self.finished, state.noted, chosen - state.logits.logsumexp(dim=1), state.logits.argmax(dim=1))
