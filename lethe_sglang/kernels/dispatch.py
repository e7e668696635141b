"""Which implementation of the kernels serves a device."""

from __future__ import annotations

import os
from types import ModuleType

import torch


def kernels_for(device: torch.device | str) -> ModuleType:
    """Return the module with the kernels of a device.

    Both have ``schedule``, ``score``, ``fill_lists``, ``fill_pages`` and ``start_states`` for steps, and ``gather``,
    ``likeness``, ``better_place``, ``select``, ``rewrite_rows``, ``place`` and ``repack`` for rounds, with one
    signature.

    Parameters
    ----------
    device
        Where the tensors live.

    Returns
    -------
    module
        ``kernels.triton.launchers`` on a CUDA device, and on any under ``TRITON_INTERPRET=1``; else
        ``kernels.reference``.
    """
    if torch.device(device).type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from lethe_sglang.kernels.triton import launchers

        return launchers
    from lethe_sglang.kernels import reference

    return reference
