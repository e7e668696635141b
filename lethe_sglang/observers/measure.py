"""Measuring mode: statistics of decode queries, accumulated on the device while the model runs uncompressed.

Per row of ``req_to_token`` two kinds of accumulators are kept, and nothing that has one entry per query *and* token:

    queries   [L, R, buckets, statistics]   sums of ``profile.PER_QUERY`` by length of the context
    tokens    [L, R, C]                     per cached token: attention received, its square, last use, came back or not

Both are averages over this rank's query heads; ranks are averaged when a record is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from lethe_sglang.allocation import sparsity
from lethe_sglang.allocation.profile import PER_PROMPT, PER_QUERY
from lethe_sglang.observers.base import Observer

BUCKETS = 24
"""Lengths of contexts are told apart by their power of two."""

IDLE_STEPS = 16
"""Decode steps without a use after which a token counts as idle; recurrence is how many of those come back."""

MASSES = (0.90, 0.95, 0.99)


class Record(NamedTuple):
    """What one finished request leaves behind.

    Attributes
    ----------
    rid
        SGLang's request id.
    prompt_tokens, queries
        Tokens before the first decode query's own, and decode queries.
    bucket_queries
        Queries per bucket of context length; ``BUCKETS`` numbers.
    values
        float32 ``[L, BUCKETS * len(PER_QUERY) + len(PER_PROMPT)]``: sums over queries, then per-prompt statistics.
    """

    rid: str
    prompt_tokens: int
    queries: int
    bucket_queries: tuple[int, ...]
    values: torch.Tensor

    def report(self) -> dict[str, Any]:
        """Return plain numbers, without empty buckets; see ``Measurer.reports``."""
        sums = self.values[:, : BUCKETS * len(PER_QUERY)].view(-1, BUCKETS, len(PER_QUERY))
        return {
            "rid": self.rid,
            "prompt_tokens": self.prompt_tokens,
            "queries": self.queries,
            "by_length": {
                str(1 << b): {"queries": count, "sums": sums[:, b].tolist()}
                for b, count in enumerate(self.bucket_queries)
                if count
            },
            "per_prompt": self.values[:, -len(PER_PROMPT) :].tolist(),
        }


def query_statistics(attention: torch.Tensor, length: torch.Tensor, sinks: int) -> torch.Tensor:
    """Compute the statistics of single queries.

    Parameters
    ----------
    attention
        float32 ``[B, H, n]``: softmax weights of one query per request, 0 beyond its length.
    length
        int ``[B]``: tokens each query sees, itself included.
    sinks
        First positions that count as sinks.

    Returns
    -------
    torch.Tensor
        float32 ``[B, len(PER_QUERY)]``, averaged over heads, in the order of ``PER_QUERY``.
    """
    n = length.unsqueeze(1)
    parts = (
        sparsity.hoyer(attention, n),
        sparsity.entropy(attention),
        sparsity.variance(attention, n),
        *sparsity.coverage(attention, n, MASSES).unbind(-1),
        sparsity.distance(attention, n),
        sparsity.sink_share(attention, sinks),
    )
    return torch.stack([part.mean(1) for part in parts], -1)


class Measurer(Observer):
    """Accumulates the statistics of every running request.

    Parameters
    ----------
    num_rows
        R, rows of ``req_to_token``.
    num_layers
        L.
    sinks
        First positions that count as sinks.
    device
        Where attention runs.

    Attributes
    ----------
    names
        Row -> request id, set when a request is prefilled.
    records
        Finished requests that have not been reported.
    """

    sees_attention: ClassVar[bool] = True

    def __init__(self, num_rows: int, num_layers: int, sinks: int, device: torch.device | str) -> None:
        self.num_layers, self.sinks = num_layers, sinks
        self.names: dict[int, str] = {}
        self.records: list[Record] = []
        self.queries = torch.zeros((num_layers, num_rows, BUCKETS, len(PER_QUERY)), device=device)
        self.bucket_queries = torch.zeros((num_rows, BUCKETS), dtype=torch.int64, device=device)
        self.first = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.last = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.received = torch.zeros((num_layers, num_rows, 0), device=device)
        self.squares = torch.zeros((num_layers, num_rows, 0), device=device)
        self.used_at = torch.zeros((num_layers, num_rows, 0), dtype=torch.int32, device=device)
        self.came_back = torch.zeros((num_layers, num_rows, 0), dtype=torch.bool, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of all accumulators."""
        tensors = (self.queries, self.received, self.squares, self.used_at, self.came_back)
        return sum(t.numel() * t.element_size() for t in tensors)

    def on_prefill(self, row: int, rid: str) -> None:
        """Remember whose row it is."""
        self.names[row] = rid

    def on_decode_layer(
        self, layer: int, forward_batch: Any, cells: torch.Tensor, length: torch.Tensor, attention: torch.Tensor | None
    ) -> None:
        """Add a layer's attention; nothing is evicted, so that a list is the sequence itself."""
        assert attention is not None  # the guard refuses other backends
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        if layer == 0:
            self.begin_step(rows, seq_lens, attention.shape[2])
        self.add(layer, rows, attention, seq_lens)

    def begin_step(self, rows: torch.Tensor, length: torch.Tensor, width: int) -> None:
        """Count one decode step.

        Parameters
        ----------
        rows, length
            int64 ``[B]``: each request's row and tokens, the newest included.
        width
            The longest of them (tokens).
        """
        if width > self.received.shape[2]:
            self._grow(1 << (width - 1).bit_length())
        self.bucket_queries[rows, _bucket(length)] += 1
        self.first[rows] = torch.where(self.first[rows] == 0, length, self.first[rows])
        self.last[rows] = length

    def add(self, layer: int, rows: torch.Tensor, attention: torch.Tensor, length: torch.Tensor) -> None:
        """Add one layer's attention of a decode step, after :meth:`begin_step`.

        Parameters
        ----------
        layer
            Index into the accumulators.
        rows, length
            As in :meth:`begin_step`.
        attention
            float32 ``[B, H, n]`` in order of position, 0 beyond a request's length.
        """
        self.queries[layer, rows, _bucket(length)] += query_statistics(attention, length, self.sinks)
        n = attention.shape[2]
        mean, step = attention.mean(1), length.to(torch.int32).unsqueeze(1)
        self.received[layer, rows, :n] += mean
        self.squares[layer, rows, :n] += mean.square()
        used_at = self.used_at[layer, rows, :n]
        valid = torch.arange(n, device=rows.device) < step
        used = (mean > 1 / step) & valid
        self.came_back[layer, rows, :n] |= used & (used_at > 0) & (step - used_at >= IDLE_STEPS)
        self.used_at[layer, rows, :n] = torch.where(used | (valid & (used_at == 0)), step, used_at)

    def on_close(self, rows: Sequence[int]) -> None:
        """Turn rows that SGLang frees into records, and start them anew."""
        for row in rows:
            name = self.names.pop(row, None)
            last = int(self.last[row])
            if name is not None and last:
                self.records.append(self._record(name, row, int(self.first[row]), last))
            for tensor in (self.queries, self.received, self.squares, self.used_at, self.came_back):
                tensor[:, row] = 0
            for tensor in (self.bucket_queries, self.first, self.last):
                tensor[row] = 0

    def drain(self) -> list[Record]:
        """Hand out the records, once."""
        records, self.records = self.records, []
        return records

    def reports(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, Any]]:
        """Hand out, once, the statistics of requests that have finished, averaged over ranks.

        Parameters
        ----------
        mean
            Averages a tensor over tensor-parallel ranks; every rank must call it at the same time.

        Returns
        -------
        list[dict]
            Per request: ``rid``, ``prompt_tokens``, ``queries``; ``by_length`` maps a power of two to the ``queries``
            whose context has that many to twice as many tokens, and the ``sums`` ``[L][PER_QUERY]`` over them;
            ``per_prompt`` ``[L][PER_PROMPT]``.
        """
        records = self.drain()
        if not records:
            return []
        values = mean(torch.stack([record.values for record in records]).to(self.first.device)).cpu()
        return [record._replace(values=mine).report() for record, mine in zip(records, values, strict=True)]

    def _record(self, name: str, row: int, first: int, last: int) -> Record:
        queries = last - first + 1
        received, squares = self.received[:, row, :last], self.squares[:, row, :last]
        position = torch.arange(last, device=received.device)
        seen_by = (last - torch.maximum(position + 1, torch.tensor(first, device=received.device)) + 1).float()
        mean = received / seen_by
        fluctuation = (squares / seen_by - mean.square()).clamp(min=0).sum(-1)
        back = self.came_back[:, row, :last]
        idle = back | (last - self.used_at[:, row, :last] >= IDLE_STEPS)
        recurrence = back.sum(-1) / idle.sum(-1).clamp(min=1)
        per_prompt = (sparsity.variance(received, torch.tensor(last, device=received.device)), fluctuation, recurrence)
        assert len(per_prompt) == len(PER_PROMPT)
        values = torch.cat([self.queries[:, row].flatten(1), torch.stack(per_prompt, -1)], -1).cpu()
        return Record(name, first - 1, queries, tuple(self.bucket_queries[row].tolist()), values)

    def _grow(self, width: int) -> None:
        for name in ("received", "squares", "used_at", "came_back"):
            old: torch.Tensor = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], width))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


def _bucket(length: torch.Tensor) -> torch.Tensor:
    """Exponent of the largest power of two that is at most ``length``."""
    exponents = torch.arange(1, BUCKETS, device=length.device)
    return ((length.unsqueeze(1) >> exponents) > 0).sum(1)
