"""The KV pool: SGLang's own multi-head pool over one flat K and one flat V, plus the states of a cell."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lethe_sglang.kernels.common import Cells

SCRATCH_FRACTION = 0.01
"""Part of the pool's bytes that a launch of rounds may take for what it moves; more due requests are split up."""

HOST_SCRATCH_BYTES = 2**26
"""What a launch may take at least where memory is not the pool's to share out: on a CPU."""


class PackedKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """``MHATokenToKVPool`` whose layers are views of one flat buffer.

    ``k_buffer[l]`` is ``k_flat[l * blocks : (l + 1) * blocks]``, contiguous and with stock's strides, so every stock
    path (stores, prefill, radix, copies, size accounting) is untouched. Cell (l, b) is ``k_flat[l * blocks + b]``.

    Attributes
    ----------
    cells
        The flat buffers and the states the policy declares: 4 bytes a cell each.
    scratch_bytes
        What a launch of rounds may take.
    scratch
        uint8 ``[scratch_bytes]`` on a CUDA device, where it has to be there when it is needed; else None.
    """

    track_score: bool = True
    track_position: bool = False
    track_memory: bool = False

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        if k_shape != v_shape or self.kv_cache_layout != "nhd":
            raise ValueError(
                f"--kv-evict needs keys and values of equal shape in NHD layout, got {k_shape} and {v_shape} in "
                f"{self.kv_cache_layout!r}; use --kv-evict none for this model"
            )
        blocks = k_shape[0]
        num_cells = self.layer_num * blocks
        if num_cells >= 2**31:
            raise ValueError(
                f"--kv-evict addresses cells with 32 bits: {self.layer_num} layers x {blocks} tokens is too many; "
                f"set --max-total-tokens to at most {(2**31 - 1) // self.layer_num - self.page_size}"
            )

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        with (
            self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE),
            torch.cuda.use_mem_pool(self.custom_mem_pool) if self.enable_custom_mem_pool else nullcontext(),
        ):
            flat = (num_cells, *k_shape[1:])
            self.cells = Cells(
                key=zeros(flat, self.store_dtype),
                value=zeros(flat, self.store_dtype),
                score=zeros((num_cells,), torch.float32) if self.track_score else None,
                position=zeros((num_cells,), torch.int32) if self.track_position else None,
                memory=zeros((num_cells,), torch.float32) if self.track_memory else None,
                num_layers=self.layer_num,
                blocks=blocks,
                dtype=None if self.store_dtype == self.dtype else self.dtype,
            )
            self.scratch_bytes, self.scratch = int(SCRATCH_FRACTION * self.cells.bytes), None
            if torch.device(self.device).type == "cuda":
                self.scratch = zeros((self.scratch_bytes,), torch.uint8)
            else:
                self.scratch_bytes = max(self.scratch_bytes, HOST_SCRATCH_BYTES)
        self.k_buffer = list(self.cells.key.split(blocks))
        self.v_buffer = list(self.cells.value.split(blocks))

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        del self.cells, self.scratch


def pool_class(track_score: bool, track_position: bool, track_memory: bool) -> type[PackedKVPool]:
    """Return the pool class that carries just the states a policy declares."""
    tracked = {"track_score": track_score, "track_position": track_position, "track_memory": track_memory}
    return type("PackedKVPool", (PackedKVPool,), tracked)


def state_bytes(pool: PackedKVPool) -> int:
    """Bytes of the states that travel with cells (the plugin's memory that grows with the pool)."""
    states = [s for s in (pool.cells.score, pool.cells.position, pool.cells.memory) if s is not None]
    return sum(s.numel() * s.element_size() for s in states)
