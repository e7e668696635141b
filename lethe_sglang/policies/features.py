"""What several policies compute of scores and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NEAR_DUPLICATES = 0.5
"""Cosine above which two keys are near-duplicates, as in R-KV's official code."""

AT_ONCE = 2**26
"""Most numbers that a comparison of keys holds at once (256 MB in float32), but for what alone takes more."""

BEHIND = 0.41
"""Part of a place by which the list of keys is behind that of scores: no share of whole percents makes the two tie."""


def pooled(score: Tensor, valid: Tensor, kernel: int, how: str) -> Tensor:
    """Pool scores over neighbouring candidates.

    Parameters
    ----------
    score, valid
        float32 and bool ``[L, B, n]``; what is not valid counts as 0.
    kernel
        Odd number of candidates, centred.
    how
        ``avg`` or ``max``.

    Returns
    -------
    torch.Tensor
        float32 ``[L, B, n]``.
    """
    import torch

    if kernel == 1:
        return score
    flat = score.masked_fill(~valid, 0.0).flatten(0, 1).unsqueeze(1)
    pool = torch.nn.functional.avg_pool1d if how == "avg" else torch.nn.functional.max_pool1d
    return pool(flat, kernel, stride=1, padding=kernel // 2).view(score.shape)


def by_layer(feature: Callable[[Tensor, Tensor], Tensor], keys: Tensor, cells: Tensor, valid: Tensor) -> Tensor:
    """Make a feature of the candidates' keys, a layer at a time: one may compare every key with every other.

    So many requests go together that comparing all their keys makes at most ``AT_ONCE`` numbers, or one alone.

    Parameters
    ----------
    feature
        A policy's ``key_feature``.
    keys
        ``[cells, H, D]``: the flat pool.
    cells, valid
        int and bool ``[L, B, n]``; what is not valid gets a key of zeros, whatever lies in that cell.

    Returns
    -------
    torch.Tensor
        float32 ``[L, B, n]``.
    """
    import torch

    def of(cells: Tensor, valid: Tensor) -> Tensor:
        return feature(keys[cells].float().masked_fill_(~valid[:, :, None, None], 0.0), valid)

    some = max(AT_ONCE // max(keys.shape[1] * valid.shape[2] ** 2, 1), 1)
    parts = [zip(c.split(some), v.split(some), strict=True) for c, v in zip(cells, valid, strict=True)]
    return torch.stack([torch.cat([of(*part) for part in layer]) for layer in parts])


def redundancy(keys: Tensor, valid: Tensor) -> Tensor:
    """Mean cosine of the other candidates' keys to each key, over heads (R-KV, G-KV).

    Each key names the latest of its near-duplicates, and its cosine to that one does not count: the latest of a group
    of duplicates is not redundant, it stands in for the rest.

    Shapes are those of :meth:`~lethe_sglang.policies.base.Policy.key_feature`.
    """
    import torch

    unit = torch.nn.functional.normalize(keys, dim=-1).transpose(1, 2)  # [B, H, n, D]
    unit = unit * valid[:, None, :, None]
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    place = torch.arange(keys.shape[1], device=keys.device)
    latest = torch.where(cosine > NEAR_DUPLICATES, place, -1).amax(-1, keepdim=True)
    cosine = cosine.masked_fill(place == latest, 0.0)
    count = valid.sum(-1).clamp(min=1).view(-1, 1, 1)
    return (cosine.sum(-2) / count).mean(1)


def likeness(keys: Tensor, valid: Tensor) -> Tensor:
    """Cosine of each candidate's key to the mean normalised key of the candidates, over heads (KeyDiff).

    Shapes are those of :meth:`~lethe_sglang.policies.base.Policy.key_feature`.
    """
    import torch

    unit = torch.nn.functional.normalize(keys, dim=-1) * valid[:, :, None, None]
    anchor = unit.sum(1, keepdim=True) / valid.sum(1).clamp(min=1).view(-1, 1, 1, 1)
    return torch.nn.functional.cosine_similarity(keys, anchor, dim=-1).mean(-1)


def masked_softmax(values: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the last axis among valid entries, 0 elsewhere; shapes ``[..., n]``."""
    return values.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)


def over_maximum(values: Tensor, valid: Tensor) -> Tensor:
    """Divide by the largest valid value of the last axis (values that are all 0 stay 0); shapes ``[..., n]``."""
    top = values.masked_fill(~valid, 0.0).amax(-1, keepdim=True)
    return values / top.clamp(min=1e-12)


def places(values: Tensor, valid: Tensor) -> Tensor:
    """Return each candidate's place by descending value, from 0; those that tie go by the later one.

    Parameters
    ----------
    values, valid
        float32 and bool ``[..., n]``; what is not valid comes last.

    Returns
    -------
    torch.Tensor
        float32 ``[..., n]``.
    """
    import torch

    n = values.shape[-1]
    last_to_first = values.masked_fill(~valid, float("-inf")).argsort(dim=-1, stable=True)
    numbers = torch.arange(n - 1, -1, -1, dtype=values.dtype, device=values.device)
    return torch.empty_like(values).scatter_(-1, last_to_first, numbers.expand_as(values))


def better_place(score: Tensor, likeness: Tensor, valid: Tensor, share: float) -> Tensor:
    """Rank candidates by the better of two places: that by score, and that by unlikeness of the key.

    With the places ``p_s`` and ``p_k``, from 0, by descending score and by ascending likeness::

        -min(p_s / (1 - share), (p_k + 0.41) / share)

    So of those that come first about ``share`` come from the top of the list by unlikeness. Those that tie within a
    list go by the later one.

    Parameters
    ----------
    score, likeness, valid
        float32, float32 and bool ``[..., n]``; what is not valid comes last in both lists.
    share
        Of the list by unlikeness, 0 < share < 1.

    Returns
    -------
    torch.Tensor
        float32 ``[..., n]``; larger is better.
    """
    by_key = places(-likeness, valid) + BEHIND
    return -(places(score, valid) / (1 - share)).minimum(by_key / share)
