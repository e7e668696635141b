"""Triton kernels of the decode step and of a round; each has its torch reference in ``kernels/reference.py``.

A launcher raises a ``ValueError`` that names the first argument whose dtype, shape, stride or value is not what is
documented. It reads nothing back from the device, so a CUDA graph can capture it. It takes the kernel's first
configuration, whatever the load: nothing is searched where servers run, the one round at a server's start compiles all
that later ones take, and nothing depends on how many requests there are. ``lethe gpu kernels`` tries the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from lethe_sglang.kernels.common import Batch, Lists

INTEGER = (torch.int32, torch.int64)
FLOAT = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

KERNELS: dict[str, Kernel] = {}
"""Every kernel by the name of its function, once its module is loaded."""


class Kernel:
    """A kernel with its configurations.

    Parameters
    ----------
    function
        What ``triton.jit`` returned.
    configs
        The first is what launches take, the others what might be better on another GPU.
    """

    def __init__(self, function: Any, configs: Sequence[Any]) -> None:
        self.function = function
        self.configs = list(configs)
        KERNELS[function.fn.__name__] = self

    def launch(self, grid: Callable[[dict[str, Any]], tuple[int, ...]], *args: Any) -> None:
        """Run the kernel.

        Parameters
        ----------
        grid
            Meta-parameters -> programs.
        args
            The kernel's arguments but for the meta-parameters, which are its last ones.
        """
        self.function[grid](*args, **self.configs[0].all_kwargs())

    @contextmanager
    def taking(self, config: Any) -> Iterator[None]:
        """Let launches inside take another configuration."""
        known, self.configs = self.configs, [config]
        try:
            yield
        finally:
            self.configs = known


def config(num_warps: int = 4, num_stages: int = 2, **meta: int) -> Any:
    """One launch configuration with its meta-parameters."""
    return triton.Config(meta, num_warps=num_warps, num_stages=num_stages)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def bucket(n: int) -> int:
    """``n`` rounded up to a power of two: sizes that share a configuration.

    It is asked several times a launch, and Triton's own function, which kernels may call as well, is ten times as slow.
    """
    return 1 << max(n - 1, 0).bit_length()


def expect(
    name: str, tensor: torch.Tensor, dtypes: torch.dtype | tuple[torch.dtype, ...], shape: Sequence[int | None]
) -> None:
    """Check a tensor's dtype and shape (None: any length) and that its last axis is contiguous.

    Raises
    ------
    ValueError
        Naming the tensor, what it must be and what it is.
    """
    if not _fits(tensor.dtype, tensor.shape, tensor.stride(), dtypes, tuple(shape)):
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name} must be {wanted} of shape [{sizes}], last axis contiguous, "
            f"not {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)} strides {tensor.stride()}"
        )


@lru_cache(maxsize=4096)
def _fits(
    dtype: torch.dtype,
    size: torch.Size,
    strides: tuple[int, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
) -> bool:
    """Whether a tensor is what :func:`expect` asks for. The layers of a step ask the same, so answers are kept."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    fits = len(shape) == len(size) and all(n in (None, m) for n, m in zip(shape, size, strict=True))
    return dtype in allowed and fits and (not size or size[-1] <= 1 or strides[-1] == 1)


def expect_contiguous(**tensors: torch.Tensor | None) -> None:
    """Check that tensors are contiguous, all that are not None."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def expect_batch(batch: Batch) -> int:
    """Check the tensors of a batch, all but its ``req_to_token``; return B, its requests."""
    expect("table", batch.table, torch.int32, [None, None])
    expect("rows", batch.rows, INTEGER, [None])
    expect("seq_lens", batch.seq_lens, INTEGER, [batch.rows.shape[0]])
    expect_contiguous(rows=batch.rows, seq_lens=batch.seq_lens)
    return int(batch.rows.shape[0])


def expect_lists(lists: Lists, batch: int) -> None:
    """Check the lists of ``batch`` requests."""
    expect("indptr", lists.indptr, INTEGER, [None])
    expect("indices", lists.indices, INTEGER, [None])
    expect_contiguous(**lists._asdict())
    if lists.indptr.shape[0] < batch + 1:
        raise ValueError(f"indptr holds {lists.indptr.shape[0]} entries; {batch} requests need {batch + 1}")
