"""One request's life under eviction, forced and without a server: faster, and the same to the last cell.

Between two rounds a request only grows, so all tokens between them go through the model at once. Everything that
decides is the product's own: the ledger says when a round is due, ``run_round`` ranks with the policy and packs, lists
are resolved as decode resolves them. What is here is attention over those lists, and the accumulation of its scores
over many steps instead of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lethe_bench.fidelity.network import Network, Part
from lethe_sglang.cache import breakpoints
from lethe_sglang.cache.arrivals import stagger_of
from lethe_sglang.cache.layout import narrow_layers, pinned_cells
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.cache.rounds import run_round
from lethe_sglang.config import EvictionConfig
from lethe_sglang.kernels.common import Cells, token_lists, update
from lethe_sglang.kernels.table import read

ROW = 1
"""The request's row; row 0 is padding, as SGLang's is."""


class Full(NamedTuple):
    """What a document is with the full cache.

    Attributes
    ----------
    tokens
        Prompt and reply.
    prompt
        Tokens of the prompt.
    logits
        float32 ``[T, V]``: log-probabilities of each reply token's step, in nats.
    keys, values
        float32 ``[L, N, Hkv, D]`` of the first N tokens: what no arm needs to compute again before its first round.
    attention
        float32 ``[L, N, N]`` of these, averaged over query heads: row i is what position i attended to.
    """

    tokens: list[int]
    prompt: int
    logits: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attention: torch.Tensor


def causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> tuple[torch.Tensor, ...]:
    """Attend the last C tokens of a list to all before them and themselves.

    Parameters
    ----------
    query
        ``[Hq, C, D]``.
    keys, values
        ``[n, Hkv, D]``, of which the last C entries are the queries' own tokens.
    scaling
        Softmax scale.

    Returns
    -------
    tuple
        Output ``[C, Hq, D]``, and weights averaged over query heads, ``[C, n]``.
    """
    heads, count, dim = query.shape
    n, kv_heads, _ = keys.shape
    q = (query * scaling).reshape(kv_heads, heads // kv_heads * count, dim)
    logits = (q @ keys.permute(1, 2, 0)).view(heads, count, n)
    ahead = torch.ones((count, count), dtype=torch.bool, device=query.device).triu(1)
    logits[..., n - count :].masked_fill_(ahead, float("-inf"))
    weights = logits.softmax(-1)
    out = weights.view(kv_heads, -1, n) @ values.transpose(0, 1)
    return out.view(heads, count, dim).transpose(0, 1), weights.mean(0)


def full(network: Network, prompt: Sequence[int], reply: Sequence[int], known: int) -> Full:
    """Run a document with the full cache, and keep what arms share of its first ``known`` tokens."""
    tokens = [*prompt, *reply]
    keys, values, seen = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        own_keys, own_values = k.transpose(0, 1), v.transpose(0, 1)
        outputs = []
        for start in range(0, len(tokens), STRIP):  # a long document's weights, all at once, would not fit
            end = min(start + STRIP, len(tokens))
            out, weights = causal(q[:, start:end], own_keys[:end], own_values[:end], scaling)
            outputs.append(out)
            if start < known:
                part = torch.zeros((min(end, known) - start, known))
                part[:, : min(end, known)] = weights[: len(part), :known]
                seen.append(part)
        keys.append(own_keys[:known].clone())
        values.append(own_values[:known].clone())
        return torch.cat(outputs)

    [logits] = network.forward(Part(tokens, 0, attend, first=len(prompt) - 1, last=len(tokens) - 1))
    strips = len(seen) // len(keys)
    attention = torch.stack([torch.cat(seen[n * strips : (n + 1) * strips]) for n in range(len(keys))])
    return Full(tokens, len(prompt), logits, torch.stack(keys), torch.stack(values), attention)


STRIP = 256
"""Queries of the full cache that are attended at a time."""


class Replay:
    """One request under one arm, as a server that has no other request would treat it.

    Parameters
    ----------
    network
        The model.
    config
        The arm; its prompt is kept.
    budgets
        k_l of every layer.
    document
        The same request with the full cache.

    Attributes
    ----------
    rounds
        Committed length (tokens) at each round.
    """

    def __init__(self, network: Network, config: EvictionConfig, budgets: tuple[int, ...], document: Full) -> None:
        self.network, self.config, self.document = network, config, document
        self.policy, self.rounds = config.built_policy, list[int]()
        layers, _, heads, dim = document.keys.shape
        blocks = len(document.tokens) + 1
        flat = layers * blocks
        self.cells = Cells(
            key=torch.zeros((flat, heads, dim)),
            value=torch.zeros((flat, heads, dim)),
            score=torch.zeros(flat),
            position=torch.zeros(flat, dtype=torch.int32),
            memory=torch.zeros(flat),
            num_layers=layers,
            blocks=blocks,
        )
        self.req_to_token = torch.zeros((2, blocks), dtype=torch.int32)
        self.adaptive = config.budget.allocation == "breakpoint"
        narrow = None if self.adaptive else narrow_layers(budgets)
        rule = self.policy.accumulation
        window = None if rule is None else rule.window
        self.ledger = Ledger(2, layers, 1, config.recent, config.rounds.interval, "cpu", window=window, narrow=narrow)
        prompt = document.tokens[: document.prompt]
        self._append(0, len(prompt), document.keys[:, : len(prompt)], document.values[:, : len(prompt)])
        self.state = self.ledger.open(
            "",
            ROW,
            len(prompt),
            budgets,
            committed=len(prompt) + 1,  # as a server knows it: at the head of its second decode step
            pinned=pinned_cells(len(prompt), 0, config.retain.sinks, config.retain.own_sinks),
            stagger=stagger_of(prompt),
        )
        self.ledger.flush()

    def run(self) -> torch.Tensor:
        """Force the reply; return log-probabilities of its steps behind the first round, float32 ``[n, V]`` in nats.

        The steps before it are those of the full cache.
        """
        found = [logits for _, _, logits in together(self.network, [self])]
        return torch.cat(found) if found else torch.zeros((0, self.document.logits.shape[1]))

    def parts(self) -> Iterator[Part]:
        """Force the reply, and yield what the model has to be asked: the tokens between two rounds behind the first.

        When the next is asked for, the model has run.
        """
        start = self.document.prompt
        last = len(self.document.tokens) - 1  # the last token is never an input
        while start < last:
            end = min(self.state.due_at, last)
            if self._is_known(end):
                self._take(start, end)
            else:
                yield from self._chunk(start, end)
            if end == self.state.due_at:
                self._round(end)
            start = end

    # -- between rounds -----------------------------------------------------------------------------------------------

    def _append(self, start: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the K and V of positions, ``[L, n, Hkv, D]``, to slots of their own."""
        slots = torch.arange(start, end) + 1
        self.req_to_token[ROW, start:end] = slots.int()
        for buffer, fresh in ((self.cells.key, keys), (self.cells.value, values)):
            buffer.view(self.cells.num_layers, self.cells.blocks, *buffer.shape[1:])[:, start + 1 : end + 1] = fresh

    def _is_known(self, end: int) -> bool:
        """Say whether the full cache's keys, values and attention hold for the tokens before ``end``."""
        return not self.rounds and end <= self.document.keys.shape[1]

    def _take(self, start: int, end: int) -> None:
        """Take over the tokens at ``start <= position < end``, for which the full cache's distributions hold."""
        part = slice(start, end)
        self._append(start, end, self.document.keys[:, part], self.document.values[:, part])
        lists = [torch.arange(end) + 1 + layer * self.cells.blocks for layer in range(self.cells.num_layers)]
        self._score(start, end, lists, list(self.document.attention[:, part, :end]))

    def _chunk(self, start: int, end: int) -> Iterator[Part]:
        """Decode the tokens at ``start <= position < end``; nothing is asked of those before the first round."""
        before = self._lists(start)
        lists, seen = list[torch.Tensor](), list[torch.Tensor]()
        fresh_keys, fresh_values = list[torch.Tensor](), list[torch.Tensor]()
        own = torch.arange(start, end) + 1

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            fresh_keys.append(k.transpose(0, 1))
            fresh_values.append(v.transpose(0, 1))
            keys = torch.cat((self.cells.key[before[layer]], fresh_keys[-1]))
            values = torch.cat((self.cells.value[before[layer]], fresh_values[-1]))
            out, weights = causal(q, keys, values, scaling)
            lists.append(torch.cat((before[layer], own + layer * self.cells.blocks)))
            seen.append(weights)
            return out

        yield Part(self.document.tokens[start:end], start, attend, first=0 if self.rounds else end - start)
        self._append(start, end, torch.stack(fresh_keys), torch.stack(fresh_values))
        self._score(start, end, lists, seen)

    def _lists(self, length: int) -> list[torch.Tensor]:
        """Resolve what each layer attends to, flat cells int64 ``[n_l]``."""
        rows, seq = torch.tensor([ROW]), torch.tensor([length])
        lines = read(self.ledger.table[rows])
        width = int(lines.length(seq).max())
        found = token_lists(self.req_to_token, rows, seq, lines.spans, self.cells.blocks, width)
        return [cells[0, : int(n)] for cells, n in zip(found.cells, found.length[:, 0], strict=True)]

    def _score(self, start: int, end: int, lists: Sequence[torch.Tensor], seen: Sequence[torch.Tensor]) -> None:
        """Accumulate the attention of steps, a layer ``[end - start, n_l]``, in the states of own cells."""
        rule = self.policy.accumulation
        if rule is None:
            return
        steps = torch.arange(start, end) + 1 - self.document.prompt  # the request's own decode steps, from 1
        scored, reset = steps % rule.every == 0, torch.zeros(len(steps), dtype=torch.bool)
        if rule.window is not None:
            length = steps + self.document.prompt
            scored &= length > self.state.listens_from
            reset = length == self.state.listens_from + 1
        memory, score = self.cells.memory, self.cells.score
        assert score is not None
        for cells, attention in zip(lists, seen, strict=True):
            cells, attention = cells[self.document.prompt :], attention[:, self.document.prompt :]
            new = cells[len(cells) - (end - start) :]
            score[new] = torch.arange(start, end).float() if rule.rule == "recurrence" else 0.0
            states: tuple[torch.Tensor, torch.Tensor | None] = score[cells], None
            if rule.rule == "recurrence":
                assert memory is not None
                memory[new] = 0.0
                states = states[0], memory[cells]
                for step, weights in zip((steps + self.document.prompt).tolist(), attention, strict=True):
                    states = update(rule, *states, weights, 1.0, step)
                assert states[1] is not None
                memory[cells] = states[1]
                score[cells] = states[0]
                continue
            after = scored.flip(0).cumsum(0).flip(0) - scored.long()  # scored steps behind each
            weight = torch.where(scored, rule.step_decay**after, 0.0)
            old = rule.step_decay ** int(scored.sum())
            if reset.any():
                weight, old = weight * (torch.arange(len(steps)) >= int(reset.nonzero()[0])), 0.0
            if rule.rule == "sum":
                score[cells] = old * states[0] + weight @ attention
            else:
                score[cells] = torch.maximum(old * states[0], (weight.unsqueeze(1) * attention).amax(0))

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _round(self, committed: int) -> None:
        if self.adaptive:
            plan = breakpoints.plan(self.ledger, self.state, committed, self.config.floor)
        else:
            plan = self.ledger.plan(self.state, committed, self.state.budgets)
        result = run_round([plan], self.cells, self.req_to_token, self.policy)
        self.ledger.commit(self.state, plan)
        if self.adaptive:
            self.state.pending = breakpoints.count(result, [plan])[0]
        self.ledger.flush()
        self.rounds.append(committed)


def together(network: Network, replays: Sequence[Replay]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Force the replies of replays side by side, so that the model sees tokens of all of them at once.

    Yields
    ------
    tuple
        Which of them, the position of the first token, and the log-probabilities behind it and those that follow,
        float32 ``[n, V]`` in nats, n >= 1; a replay's come in their order.
    """
    running = dict(enumerate(replay.parts() for replay in replays))
    while parts := {which: part for which, steps in running.items() if (part := next(steps, None)) is not None}:
        running = {which: running[which] for which in parts}
        for (which, part), logits in zip(parts.items(), network.forward(*parts.values()), strict=True):
            if len(logits):
                yield which, part.start, logits
