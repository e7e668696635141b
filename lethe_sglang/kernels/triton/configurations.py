"""Configurations of kernels that a search found on a GPU, one file a kind of GPU, read before a server captures graphs.

``lethe gpu tune`` writes such a file into the user's cache directory. Without one, kernels take their default
configurations. So they do under deterministic inference: what is found depends on how many requests there are, and
replies may not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lethe_sglang.files import cache_folder
from lethe_sglang.kernels.triton import KERNELS, launchers

assert launchers  # the kernels are known once their modules are loaded


def file_of(device: str) -> Path:
    """Return where the configurations of a GPU lie, by its name as ``torch.cuda.get_device_name`` has it.

    Raises
    ------
    OSError
        If the user has no home.
    """
    return cache_folder("kernels") / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device)}.json"


def found() -> list[dict[str, Any]]:
    """Return what searches of this process have found.

    Returns
    -------
    list of dict
        ``kernel``, the name of its function; ``key``, what the configuration depends on; ``configuration``, its
        meta-parameters with ``num_warps`` and ``num_stages``; ``us`` and ``default_us``, times of it and of the
        kernel's default. All of it is JSON.
    """
    return [
        {
            "kernel": name,
            "key": [_written(part) for part in key],
            "configuration": config.all_kwargs(),
            "us": round(min(kernel.times[key]), 2),
            "default_us": round(kernel.times[key][0], 2),
        }
        for name, kernel in KERNELS.items()
        for key, config in kernel.found.items()
    ]


def take(entries: Iterable[dict[str, Any]], source: str) -> int:
    """Let launches take configurations, as :func:`found` returns them, in place of all that were found before.

    Parameters
    ----------
    entries
        At most one for each key of a kernel.
    source
        What errors call them.

    Returns
    -------
    int
        How many there are.

    Raises
    ------
    ValueError
        If a kernel or a configuration is none of ours: they were found for another version of the kernels.
    """
    taken: dict[str, dict[tuple[Any, ...], Any]] = {name: {} for name in KERNELS}
    for entry in entries:
        name, wanted = entry["kernel"], entry["configuration"]
        known = KERNELS[name].configs if name in KERNELS else []
        config = next((config for config in known if config.all_kwargs() == wanted), None)
        if config is None:
            raise ValueError(
                f"{source}: kernel {name} has no configuration {wanted}; run `lethe gpu tune` again, or remove the file"
            )
        taken[name][tuple(_read(part) for part in entry["key"])] = config
    for name, kernel in KERNELS.items():
        kernel.found = taken[name]
    return sum(map(len, taken.values()))


def use(device: str) -> int:
    """Let launches take what was found on a GPU; returns how many configurations there are, 0 without a file.

    Raises
    ------
    ValueError
        As of :func:`take`, or if the file is not what ``lethe gpu tune`` writes.
    OSError
        If it cannot be read.
    """
    path = file_of(device)
    if not path.exists():
        return 0
    try:
        return take(json.loads(path.read_text(encoding="utf-8"))["configurations"], str(path))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not a file of `lethe gpu tune` ({type(error).__name__}: {error}); run `lethe gpu tune` again, or "
            "remove the file"
        ) from None


def _written(part: Any) -> Any:
    return str(part) if isinstance(part, torch.dtype) else part


def _read(part: Any) -> Any:
    return getattr(torch, part.removeprefix("torch.")) if isinstance(part, str) and part.startswith("torch.") else part
