"""What torch computes on every device, a CUDA device included: so nothing here may wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from lethe_sglang.kernels.table import Spans

if TYPE_CHECKING:
    from lethe_sglang.policies.base import Accumulation


class Batch(NamedTuple):
    """The requests of a decode step, and where to look them up.

    Attributes
    ----------
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    table
        int32 ``[R, columns]``: the device table (``kernels/table.py``).
    rows
        int32 or int64 ``[B]``: the requests' rows; 0 for a padded row of a CUDA graph.
    seq_lens
        int32 or int64 ``[B]``: logical length (tokens), the newest included; a padded row may have 0.
    """

    req_to_token: torch.Tensor
    table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor


class Lists(NamedTuple):
    """One layer's lists of flat cell indices: list b is ``indices[indptr[b]:indptr[b + 1]]``.

    Both int32 or int64, ``indptr`` at least ``[B + 1]``.
    """

    indptr: torch.Tensor
    indices: torch.Tensor


class Schedule(NamedTuple):
    """What a decode step scores, in every layer alike.

    Attributes
    ----------
    first
        int32 ``[B]``: list position of the first scored token (a prefix is not scored); ``NEVER`` scores none.
    decay
        float32 ``[B]``: gamma of this step.
    step
        int32 or int64 ``[B]``: sequence length (tokens), this step's token included.
    """

    first: torch.Tensor
    decay: torch.Tensor
    step: torch.Tensor


class States(NamedTuple):
    """S and M of the whole pool, float32 ``[L * blocks]``, or None if the policy has no such state."""

    score: torch.Tensor | None
    memory: torch.Tensor | None


class Attention(NamedTuple):
    """What one layer's attention read and the normaliser it found.

    Attributes
    ----------
    query
        ``[B, Hq, D]``, float32, float16 or bfloat16; D at most 256.
    keys
        ``[cells, Hkv, D]``: the flat pool; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, contiguous.
        Query head h reads KV head ``h // (Hq / Hkv)``.
    lse
        float32 ``[B, Hq]``: log-sum-exp of the scaled logits.
    scaling
        Softmax scale, times the factor of a stored key (fp8).
    lse_base
        Base of the logarithm in ``lse``: FlashInfer's is 2.
    """

    query: torch.Tensor
    keys: torch.Tensor
    lse: torch.Tensor
    scaling: float
    lse_base: Literal["e", "2"] = "e"


class TokenLists(NamedTuple):
    """Padded token lists of all layers of a batch.

    Attributes
    ----------
    cells
        int64 ``[L, B, n]``: flat cell index; 0 (the padding block's cell) beyond a list's end.
    length
        int64 ``[L, B]``: tokens in each list.
    """

    cells: torch.Tensor
    length: torch.Tensor


def token_lists(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: Spans,
    blocks: int,
    width: int,
    skip_prefix: bool = False,
) -> TokenLists:
    """Resolve which cells every layer of a request attends to, and in which order.

    List position j of a request is in layer l at (docs/architecture.md) ::

        [0, P)            l * blocks + row[j]                          prefix
        [P, P + k_l)      (cell % L) * blocks + row[P + cell // L]     packed, cell = off_l + j - P
        [P + k_l, ...)    l * blocks + row[T + j - P - k_l]            tail

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    rows
        int64 ``[B]``: the requests' rows.
    seq_lens
        int ``[B]``: logical length (tokens), the newest included.
    spans
        P, T, k_l and off_l.
    blocks
        Blocks of the pool, padding included.
    width
        n: at least the longest list (tokens).
    skip_prefix
        Leave the prefix out: own tokens only.

    Returns
    -------
    TokenLists
        ``cells[l, b, j]`` for list position j (own position if ``skip_prefix``).
    """
    num_layers = spans.kept.shape[1]
    base, t, seq = (x.to(torch.int64).view(1, -1, 1) for x in (spans.prefix, spans.tail, seq_lens))
    k, off = (x.to(torch.int64).t().unsqueeze(2) for x in (spans.kept, spans.offset))
    p = torch.zeros_like(base) if skip_prefix else base
    length = p + k + seq - t

    j = torch.arange(width, device=req_to_token.device).view(1, 1, -1)
    number = j + (off - p)
    packed = (j >= p) & (number < off + k)
    block = torch.div(number, num_layers, rounding_mode="trunc")
    position = torch.where(packed, block + base, torch.where(j < p, j, j + (t - p - k)))
    valid = j < length
    slot = req_to_token[rows.view(1, -1, 1), position.mul_(valid)]
    layer = torch.arange(num_layers, device=req_to_token.device).view(-1, 1, 1)
    owner = torch.where(packed, number.sub_(block, alpha=num_layers), layer)
    return TokenLists(owner.mul_(blocks).add_(slot).mul_(valid), length.squeeze(2))


def update(
    rule: Accumulation,
    score: torch.Tensor,
    memory: torch.Tensor | None,
    attention: torch.Tensor,
    decay: torch.Tensor | float,
    step: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply one step's attention to the states of cells; see ``policies.base.Accumulation`` for the rules.

    ``score`` may be overwritten.

    Parameters
    ----------
    rule
        What the policy accumulates.
    score, memory, attention
        float32 of one shape; memory only with rule recurrence.
    decay, step
        gamma of this step and the sequence length, each broadcastable.

    Returns
    -------
    tuple
        The new score and memory.
    """
    if rule.rule == "sum":
        return score.mul_(decay).add_(attention), memory
    if rule.rule == "max":
        return torch.maximum(score.mul_(decay), attention), memory
    assert memory is not None
    renewed = attention > rule.threshold
    gap = torch.where(renewed, step - score, 0.0)
    stamp = torch.where(renewed, torch.as_tensor(step, dtype=score.dtype, device=score.device), score)
    return stamp, torch.maximum(memory, gap)
