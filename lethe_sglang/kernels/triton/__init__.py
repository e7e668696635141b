"""Triton kernels of the decode step and of a round; each has its torch reference in ``kernels/reference.py``.

A launcher raises a ``ValueError`` that names the first argument whose dtype, shape, stride or value is not what is
documented. It reads nothing back from the device, so a CUDA graph can capture it. It never benchmarks on its own:
during SGLang's warm-up every sequence has one token, and a search would measure nothing.
Configurations are searched where a caller asks for it, with arguments that look like the load::

    with tuning():
        score(...)  # on scratch states: the search runs the kernel many times

and what is found serves all later launches of the same key, in other processes by way of a file
(:mod:`~lethe_sglang.kernels.triton.configurations`). Before that, and under Triton's interpreter, a launch takes the
kernel's default configuration.
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

KERNELS: dict[str, Tuned] = {}
"""Every kernel by the name of its function, once its module is loaded."""

_search = False


@contextmanager
def tuning() -> Iterator[None]:
    """Let the launches inside search their configurations on a CUDA device; the tensors they write are garbage after.

    Raises
    ------
    RuntimeError
        Without a CUDA device, or while a CUDA graph is being captured: the search has to wait for the device.
    """
    global _search
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        raise RuntimeError("configurations are searched on a CUDA device, outside of CUDA graph capture")
    _search = True
    try:
        yield
    finally:
        _search = False


class Tuned:
    """A kernel with its configurations.

    Parameters
    ----------
    kernel
        What ``triton.jit`` returned.
    configs
        To search among; the first is the default.

    Attributes
    ----------
    found
        Key -> the best configuration a search found for it.
    times
        Key -> microseconds of each of ``configs`` in that search, inf where one cannot run.
    """

    def __init__(self, kernel: Any, configs: Sequence[Any]) -> None:
        self.kernel = kernel
        self.configs = list(configs)
        self.found: dict[tuple[Any, ...], Any] = {}
        self.times: dict[tuple[Any, ...], list[float]] = {}
        KERNELS[kernel.fn.__name__] = self

    def launch(self, grid: Callable[[dict[str, Any]], tuple[int, ...]], key: tuple[Any, ...], *args: Any) -> None:
        """Run the kernel.

        Parameters
        ----------
        grid
            Meta-parameters -> programs.
        key
            What the best configuration depends on.
        args
            The kernel's arguments but for the meta-parameters, which are its last ones.
        """
        if _search:
            search = triton.autotune(configs=self.configs, key=[])(self.kernel)
            search[grid](*args)
            self.found[key] = search.best_config
            self.times[key] = [1e3 * search.configs_timings[config][0] for config in self.configs]
            return
        self.kernel[grid](*args, **self.found.get(key, self.configs[0]).all_kwargs())


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
