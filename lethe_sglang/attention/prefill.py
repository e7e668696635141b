"""Scores of private prompts: those of a prefill's last queries (algorithm.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lethe_sglang.kernels.score import observation_attention, replay

if TYPE_CHECKING:
    from lethe_sglang.cache.rounds import Cells
    from lethe_sglang.policies.base import Accumulation

OBSERVATION_WINDOW = 32
"""Queries of a private prefill that initialise its scores."""


def score_prefill(
    rule: Accumulation,
    cells: Cells,
    observed: Mapping[int, int],
    req_to_token: torch.Tensor,
    layer: int,
    forward_batch: Any,
    query: torch.Tensor,
    scaling: float,
) -> None:
    """Score a layer's private tokens of observed prefills as if the last queries had been decode steps.

    Parameters
    ----------
    rule
        What the policy accumulates.
    cells
        The pool; the states of private cells are written.
    observed
        Row -> first private position of each observed prefill (``Ledger.observed``).
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    layer
        Number in the pool.
    forward_batch
        SGLang's extend batch, its keys stored.
    query
        ``[tokens, Hq, D]``: of all requests of the batch.
    scaling
        Softmax scale, times the factor of a stored key.
    """
    if not observed:
        return
    assert cells.score is not None
    rows = forward_batch.req_pool_indices_cpu
    rows = (forward_batch.req_pool_indices if rows is None else rows).tolist()
    window, start = min(rule.window or OBSERVATION_WINDOW, OBSERVATION_WINDOW), 0
    extents = zip(rows, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
    for row, prefix_len, extend_len in extents:
        first = observed.get(row)
        if first is not None and extend_len > 0:
            sequence = layer * cells.blocks + req_to_token[row, : prefix_len + extend_len].to(torch.int64)
            seen = observation_attention(query[start : start + extend_len], cells.keys, sequence, scaling, window)
            score, memory = replay(rule, seen)
            cells.score[sequence[first:]] = score[first:]
            if memory is not None and cells.memory is not None:
                cells.memory[sequence[first:]] = memory[first:]
        start += extend_len
