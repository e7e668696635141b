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


class Parts(NamedTuple):
    """How SGLang's Triton decode divides lists.

    Attributes
    ----------
    count
        int32 or int64 ``[B]``: parts that each list is to have; as it cannot always, the last ones may stay unused.
    multiple
        Tokens that the length of a part is a multiple of.
    """

    count: torch.Tensor
    multiple: int


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
        float32 ``[B, Hq]``: log-sum-exp of the scaled logits; with ``parts`` ``[B, Hq, most parts]``, those of a list's
        parts, of which the first are in use.
    scaling
        Softmax scale, times the factor of a stored key (fp8).
    lse_base
        Base of the logarithm in ``lse``: FlashInfer's is 2.
    parts
        How lists are divided, with base e; None if they are whole.
    """

    query: torch.Tensor
    keys: torch.Tensor
    lse: torch.Tensor
    scaling: float
    lse_base: Literal["e", "2"] = "e"
    parts: Parts | None = None


class Cells(NamedTuple):
    """The flat pool and the states that travel with a cell.

    Attributes
    ----------
    key, value
        ``[L * blocks, H, D]`` as they are stored and moved: fp8 as bytes.
    score
        float32 ``[L * blocks]`` or None.
    position
        int32 ``[L * blocks]`` or None: logical position of *packed* cells (a tail cell's follows from its row).
    memory
        float32 ``[L * blocks]`` or None: the policy's second state.
    num_layers, blocks
        L and the blocks of the pool, padding included.
    dtype
        Type of keys and values where they are stored as another (fp8), else None.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: torch.Tensor | None
    position: torch.Tensor | None
    memory: torch.Tensor | None
    num_layers: int
    blocks: int
    dtype: torch.dtype | None = None

    @property
    def states(self) -> States:
        """What decode accumulates."""
        return States(self.score, self.memory)

    @property
    def keys(self) -> torch.Tensor:
        """``key`` as attention reads it."""
        return self.key if self.dtype is None else self.key.view(self.dtype)

    @property
    def values(self) -> torch.Tensor:
        """``value`` as attention reads it."""
        return self.value if self.dtype is None else self.value.view(self.dtype)

    def of_layer(self, layer: int) -> Cells:
        """Return views of one layer's cells, in which slot b is cell b."""
        start, end = layer * self.blocks, (layer + 1) * self.blocks
        views = {name: buffer[start:end] for name, buffer in self.buffers.items()}
        return self._replace(**views, num_layers=1)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a round moves, by name."""
        names = ("key", "value", "score", "position", "memory")
        return {name: buffer for name in names if (buffer := getattr(self, name)) is not None}


class Candidate(NamedTuple):
    """The cells that a launch of rounds may evict and what travels with them, in the order of their lists.

    Attributes
    ----------
    cells
        int ``[L, B, n]``: flat cells; 0 beyond a layer's candidates.
    valid
        bool ``[L, B, n]``: false there.
    position
        int32 ``[L, B, n]``: logical positions, or None if they are not tracked.
    score, memory
        float32 ``[L, B, n]``, or None.
    """

    cells: torch.Tensor
    valid: torch.Tensor
    position: torch.Tensor | None
    score: torch.Tensor | None
    memory: torch.Tensor | None


class Extent(NamedTuple):
    """How much a launch of rounds has to do, by host numbers.

    Attributes
    ----------
    candidates
        n: most candidates of a layer of a request.
    kept
        Kept cells of all layers and requests.
    freed, packed, dead
        Slots that go back, and packed and dead positions afterwards, of all requests.
    most_packed
        Most packed blocks of a request afterwards; at least 1.
    old_excess, excess
        Whether any layer has excess before and after.
    """

    candidates: int
    kept: int
    freed: int
    packed: int
    dead: int
    most_packed: int
    old_excess: bool
    excess: bool


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


def slot_lists(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: Spans,
    width: int,
    skip_prefix: bool = False,
) -> TokenLists:
    """Resolve which slots of its own buffer a layer without excess attends to, and in which order.

    List position j of a request is in layer l at (docs/architecture.md) ::

        [0, P + k_l)      row[j]                     prefix, then packed
        [P + k_l, ...)    row[T + j - P - k_l]       tail

    Parameters
    ----------
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    rows
        int64 ``[B]``: the requests' rows.
    seq_lens
        int ``[B]``: logical length (tokens), the newest included.
    spans
        P, T and k_l, of those layers that are asked for.
    width
        n: at least the longest list (tokens).
    skip_prefix
        Leave the prefix out: own tokens only.

    Returns
    -------
    TokenLists
        ``cells[l, b, j]`` for list position j (own position if ``skip_prefix``): a slot.
    """
    base, t, seq = (x.to(torch.int64).view(1, -1, 1) for x in (spans.prefix, spans.tail, seq_lens))
    k = spans.kept.to(torch.int64).t().unsqueeze(2)
    first = base if skip_prefix else torch.zeros_like(base)
    length = base + k + seq - t - first
    j = torch.arange(width, device=req_to_token.device).view(1, 1, -1) + first
    behind = j >= base + k
    position = torch.where(behind, j + (t - base - k), j)
    valid = j < first + length
    slot = req_to_token[rows.view(1, -1, 1), position.mul_(valid)]
    return TokenLists(slot.to(torch.int64).mul_(valid), length.squeeze(2))


def token_lists(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: Spans,
    blocks: int,
    width: int,
    skip_prefix: bool = False,
    layers: torch.Tensor | None = None,
    excess: bool = True,
) -> TokenLists:
    """Resolve which cells every layer of a request attends to, and in which order.

    As :func:`slot_lists`, as flat cells: slot b of layer l is cell ``l * blocks + b``; but excess cells, at list
    positions ``[P + m, P + k_l)``, lie in the buffers of other layers (:func:`holes_of`).

    Parameters
    ----------
    req_to_token, rows, seq_lens, width, skip_prefix
        See :func:`slot_lists`.
    spans
        Of all L layers.
    blocks
        Blocks of the pool, padding included.
    layers
        int64 ``[l]``: the layers that are asked for, in the order of the result; None is all of them.
    excess
        Whether any layer may have excess cells.
    """
    if layers is None:
        layers = torch.arange(spans.kept.shape[1], device=req_to_token.device)
    asked = spans._replace(kept=spans.kept[:, layers], excess=spans.excess[:, layers])
    lists = slot_lists(req_to_token, rows, seq_lens, asked, width, skip_prefix)
    owner = layers.view(-1, 1, 1)
    j = torch.arange(width, device=req_to_token.device)
    valid, slot = j < lists.length.unsqueeze(2), lists.cells
    if excess:
        k, m = asked.kept.to(torch.int64).t().unsqueeze(2), spans.packed.to(torch.int64).view(1, -1, 1)
        base = spans.prefix.to(torch.int64).view(1, -1, 1)
        place = j if skip_prefix else j - base  # among the layer's own cells
        elsewhere = (place >= m) & (place < k)
        number = asked.excess.t().unsqueeze(2) + place - m
        hole, at = holes_of(number.masked_fill(~elsewhere, 0), spans.kept, spans.holes)
        owner = torch.where(elsewhere, hole, owner)
        away = req_to_token[rows.view(1, -1, 1), torch.where(elsewhere, base + at, 0)]
        slot = torch.where(elsewhere, away, slot)
    return TokenLists((owner * blocks + slot).mul_(valid), lists.length)


def holes_of(number: torch.Tensor, kept: torch.Tensor, holes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Resolve in which hole an excess cell lies.

    Parameters
    ----------
    number
        int64 ``[L, B, n]``: ``E_l`` and the cell's place in its layer's excess.
    kept, holes
        int ``[B, L]``: k_l and H_l.

    Returns
    -------
    tuple
        The layer whose buffer holds it and the place among its packed blocks, int64 ``[L, B, n]``: hole g of layer l'
        is the last with ``H_l' <= g``, at ``k_l' + g - H_l'``.
    """
    layers, batch, n = number.shape
    wanted = number.transpose(0, 1).reshape(batch, layers * n)
    starts, kept = holes.to(torch.int64).contiguous(), kept.to(torch.int64)
    owner = torch.searchsorted(starts, wanted, right=True) - 1
    place = kept.gather(1, owner) + wanted - starts.gather(1, owner)
    return tuple(x.view(batch, layers, n).transpose(0, 1) for x in (owner, place))


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
