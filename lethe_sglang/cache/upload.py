"""Host numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(lines: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Send lines of host numbers in one copy, without waiting for it.

    A copy costs more than what is in it: each is a call of its own, and one from memory that is not pinned waits for
    all work before it. So whoever has several numbers sends them together.

    Parameters
    ----------
    lines
        Equally long.
    device
        Where they go.

    Returns
    -------
    torch.Tensor
        int32 ``[lines, numbers]``.
    """
    host = torch.tensor(lines, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
