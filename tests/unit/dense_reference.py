"""What each policy should keep, computed directly from stored attention, keys and positions.

Nothing here is shared with the product: numpy in float64, one layer of one request at a time, and every score is
recomputed at every round from the whole history. A ``Rule`` is one paper's rule as the policy's docstring states it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Step(NamedTuple):
    """One decode step: the length with it, attention ``[L, H, T]`` (0 where a token was gone), its mean over heads."""

    length: int
    attention: Array
    mean: Array


class Round(NamedTuple):
    """One round: the sequence length, the length at the round before it, and every layer's candidates."""

    length: int
    since: int
    candidates: list[list[int]]


@dataclass
class History:
    """All that happened to one request.

    Attributes
    ----------
    keys, queries
        float64 ``[L, T, Hkv, D]`` and ``[L, T, H, D]`` for all T positions there will ever be.
    prefix, length
        Positions that are never evicted; tokens so far.
    kept
        Per layer, the positions from ``prefix`` on that it still has.
    since
        Length at the last round, or when the request was first followed: windows do not reach beyond it.
    prompt
        Tokens whose queries were those of a prefill: of these every n-th counts, back from the last.
    unseen
        Positions before it were written before anything was observed; nothing is known of their uses until then.
    """

    keys: Array
    queries: Array
    prefix: int
    length: int
    kept: list[set[int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    since: int = 0
    unseen: int = 0
    prompt: int = 0

    def __post_init__(self) -> None:
        self.kept = [set(range(self.prefix, self.length)) for _ in self.keys]

    def decode(self) -> None:
        """Append one token and attend from it to what every layer still has, itself included."""
        layers, total, heads, dim = self.queries.shape
        kv_head = np.arange(heads) // (heads // self.keys.shape[2])
        attention = np.zeros((layers, heads, total))
        for layer in range(layers):
            self.kept[layer].add(self.length)
            tokens = [*range(self.prefix), *sorted(self.kept[layer])]
            keys = self.keys[layer, tokens][:, kv_head]
            logits = np.einsum("thd,hd->ht", keys, self.queries[layer, self.length]) / math.sqrt(dim)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            attention[layer][:, tokens] = weights / weights.sum(1, keepdims=True)
        self.length += 1
        self.steps.append(Step(self.length, attention, attention.mean(1)))

    def attention(self, layer: int, tokens: list[int], after: int = 0, until: int | None = None) -> Array:
        """Attention averaged over heads, ``[steps, tokens]``, of the steps with ``after < length <= until``."""
        last = self.length if until is None else until
        rows = [s.mean[layer] for s in self.steps if after < s.length <= last]
        return np.array(rows)[:, tokens] if rows else np.zeros((0, len(tokens)))

    def prune(self, rule: Rule, budgets: Sequence[int], recent: int, page: int, sinks: int) -> None:
        """Keep sinks, the best by ``rule`` and the recent window, ties to the later token."""
        boundary = (self.length - recent) // page * page
        candidates = [sorted(p for p in kept if p < boundary) for kept in self.kept]
        for layer, (tokens, budget) in enumerate(zip(candidates, budgets, strict=True)):
            rank = dict(zip(tokens, rule(self, layer, tokens), strict=True))
            order = sorted(tokens, key=lambda p, rank=rank: (p < sinks, rank[p], p), reverse=True)
            if sinks < budget < len(order):
                last, first = rank[order[budget - 1]], rank[order[budget]]
                close = f"{last} and {first} are too close for float32: take another seed"
                assert last == first or last - first > 1e-5 * max(abs(last), abs(first)), close
            self.kept[layer] = {*order[:budget], *(p for p in self.kept[layer] if p >= boundary)}
        self.rounds.append(Round(self.length, self.since, candidates))
        self.since = self.length


Rule = Callable[[History, int, list[int]], Array]


def decayed_sum(gamma: float, every: int = 1) -> Rule:
    """Lethe's equation 5 in closed form; gamma 1 is H2O, gamma 0 TOVA."""

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        prompt = history.prompt
        phases = [prompt - s.length if s.length <= prompt else s.length for s in history.steps]
        scored = [s.mean[layer, tokens] for s, n in zip(history.steps, phases, strict=True) if n % every == 0]
        weight = gamma ** (every * np.arange(len(scored), dtype=np.float64)[::-1])
        return weight @ np.array(scored) if scored else np.zeros(len(tokens))

    return rule


def by_places(first: Rule, key_share: float) -> Rule:
    """The better of a token's places in two lists: that of a rule, and that of keydiff."""

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        lists = [(first, 1 - key_share, 0.0), (keydiff, key_share, 0.41)]
        better = np.full(len(tokens), np.inf)
        for one, share, behind in lists:
            rank = one(history, layer, tokens)
            ordered = sorted(range(len(tokens)), key=lambda i, rank=rank: (rank[i], tokens[i]), reverse=True)
            for place, i in enumerate(ordered):
                better[i] = min(better[i], (place + behind) / share)
        return -better

    return rule


def in_window(history: History, layer: int, tokens: list[int], window: int) -> Array:
    """Attention of the last ``window`` steps, fewer if a round was sooner: ``[steps, tokens]``."""
    return history.attention(layer, tokens, after=max(history.length - window, history.since))


def morphkv(window: int, fusion: str) -> Rule:
    """Sum or maximum over the window."""

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        seen = in_window(history, layer, tokens, window)
        return seen.sum(0) if fusion == "sum" else seen.max(0)

    return rule


def snapkv(window: int, kernel: int) -> Rule:
    """Sum over the window, averaged over neighbouring candidates; beyond either end there is nothing, counted as 0."""

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        total = in_window(history, layer, tokens, window).sum(0)
        half = kernel // 2
        return np.array([total[max(i - half, 0) : i + half + 1].sum() / kernel for i in range(len(tokens))])

    return rule


def cosines(history: History, layer: int, tokens: list[int], head: int) -> Array:
    """Cosine of every key to every other, 0 to itself: ``[tokens, tokens]``."""
    keys = history.keys[layer, tokens, head]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0.0)
    return cosine


def rkv(window: int, mix_lambda: float, kernel: int, threshold: float) -> Rule:
    """``lambda I - (1 - lambda) R``.

    Redundancy as in the official code: every token names the latest of its near-duplicates, and its cosine to that one
    does not count *for the one it named* (the mean runs over who looks, not over who is looked at), so the latest of a
    group of duplicates is not redundant and stays for all of them.
    """

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        mean = in_window(history, layer, tokens, window).sum(0) / window  # a step the window lacks counts as 0
        half = kernel // 2
        importance = np.array([mean[max(i - half, 0) : i + half + 1].max() for i in range(len(tokens))])
        return mix_lambda * importance - (1 - mix_lambda) * redundant(history, layer, tokens, threshold)

    return rule


def redundant(history: History, layer: int, tokens: list[int], threshold: float) -> Array:
    """R of R-KV: a softmax over tokens."""
    similar = np.zeros(len(tokens))
    heads = history.keys.shape[2]
    for head in range(heads):
        cosine = cosines(history, layer, tokens, head)
        for looking in range(len(tokens)):
            duplicates = [other for other in range(len(tokens)) if cosine[looking, other] > threshold]
            if duplicates:
                cosine[looking, duplicates[-1]] = 0.0
        similar += cosine.sum(0) / len(tokens) / heads
    weight = np.exp(similar - similar.max())
    return weight / weight.sum()


def gkv(window: int, alpha: float, mix_lambda: float) -> Rule:
    """F carried from round to round, replayed here from the first round on."""

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        remembered: dict[int, float] = {}
        now = Round(history.length, history.since, [tokens] * len(history.kept))
        for past in [*history.rounds, now]:
            present = past.candidates[layer]
            seen = history.attention(layer, present, max(past.length - window, past.since), past.length).mean(0)
            for token, f in zip(present, seen / seen.max(), strict=True):
                remembered[token] = float(max(alpha * remembered.get(token, 0.0), f))
        similar = redundant(history, layer, tokens, 0.5)
        importance = np.array([remembered[token] for token in tokens])
        return importance * mix_lambda - (1 - mix_lambda) * similar / similar.max()

    return rule


def lazy(threshold: float) -> Rule:
    """Importance from the last use and the longest gap between two uses."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def importance(uses: list[int], now: int) -> float:
        longest = max((b - a for a, b in pairwise(uses)), default=0)
        if longest == 0:
            return 0.0
        return 2 * sigmoid(-1 - (now - uses[-1]) / longest) + 2 / (1 + math.exp(longest - 1))

    def rule(history: History, layer: int, tokens: list[int]) -> Array:
        lengths = np.array([s.length for s in history.steps])
        used = history.attention(layer, tokens) > threshold
        first = [max(token, history.unseen) for token in tokens]  # the step before it was written
        uses = [[start, *lengths[used[:, i]].tolist()] for i, start in enumerate(first)]
        return np.array([importance(u, history.length) for u in uses])

    return rule


def keydiff(history: History, layer: int, tokens: list[int]) -> Array:
    """Minus the cosine to the mean normalised key, averaged over heads."""
    heads = history.keys.shape[2]
    total = np.zeros(len(tokens))
    for head in range(heads):
        keys = history.keys[layer, tokens, head]
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        anchor = unit.mean(0)
        total -= unit @ (anchor / np.linalg.norm(anchor))
    return total / heads


def streaming(history: History, layer: int, tokens: list[int]) -> Array:
    """The later the better."""
    return np.array(tokens, dtype=np.float64)


def random(history: History, layer: int, tokens: list[int]) -> Array:
    """The hash of (layer, position), in integers."""
    modulus, ranks = 2**31, []
    for position in tokens:
        h = (position * 2654435761 + layer * 40503 + 12345) % modulus
        for _ in range(3):
            h = ((h ^ (h // 2**15)) * 739982445 + 1) % modulus
        ranks.append(float(h))
    return np.array(ranks)
