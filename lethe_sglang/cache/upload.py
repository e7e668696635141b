"""Host numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def upload(numbers: Iterable[Sequence[int] | Sequence[Sequence[int]]], device: torch.device) -> list[torch.Tensor]:
    """Send lists of host numbers in one copy, without waiting for it.

    A copy costs more than what is in it: each is a call of its own, and one from memory that is not pinned waits for
    all work before it. So whoever has several lists sends them together.

    Parameters
    ----------
    numbers
        Lists, or lists of equally long lists.
    device
        Where they go.

    Returns
    -------
    list[torch.Tensor]
        int64, of the lists' shapes and in their order: views of one buffer on the device.
    """
    parts = [torch.tensor(part, dtype=torch.int64) for part in numbers]
    host = torch.cat([part.flatten() for part in parts])
    if device.type == "cuda":
        host = host.pin_memory()
    there = host.to(device, non_blocking=True)
    pieces = there.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
