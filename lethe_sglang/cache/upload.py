"""Host numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def columns_of(tuples: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
    """Return the fields of B equal named tuples of numbers by name: ``[B]``, or ``[B, L]`` where one has L."""
    return {name: np.array(values) for name, values in zip(tuples[0]._fields, zip(*tuples, strict=True), strict=True)}


def upload(lines: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Send lines of host numbers in one copy, without waiting for it.

    A copy costs more than what is in it: each is a call of its own, and one from memory that is not pinned waits for
    all work before it. So whoever has several numbers sends them together.

    Parameters
    ----------
    lines
        int ``[lines, numbers]``.
    device
        Where they go.

    Returns
    -------
    torch.Tensor
        int32 ``[lines, numbers]``.
    """
    host = torch.from_numpy(np.ascontiguousarray(lines, dtype=np.int32))
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
