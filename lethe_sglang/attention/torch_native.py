"""The portable backend: SGLang's ``torch_native`` with a decode that is vectorised over the batch and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.prefill import score_prefill
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.indices import token_lists
from lethe_sglang.kernels.score import accumulate, attend_heads

if TYPE_CHECKING:
    from lethe_sglang.attention.measure import Measurer
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.cache.shadow import Shadow
    from lethe_sglang.policies.base import Accumulation


class DecodeLists(NamedTuple):
    """Token lists of one decode step.

    Attributes
    ----------
    cells
        int64 ``[L, B, n]``.
    length
        int64 ``[L, B]``.
    scored
        int64 ``[L, B, n - first]``: the cells to score from list position ``first`` on, 0 where none is.
    first
        First list position that any request scores.
    decay
        gamma of this step: float32 ``[B, 1]`` where a window starts anew for some requests, else a number.
    """

    cells: torch.Tensor
    length: torch.Tensor
    scored: torch.Tensor | None
    first: int
    decay: torch.Tensor | float


class LetheTorchNativeBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; extend is stock.

    Parameters
    ----------
    model_runner
        SGLang's runner.
    pool
        The packed pool.
    ledger
        Layouts of decoding requests.
    accumulation
        What the policy accumulates; None scores nothing.
    shadow
        Uncompressed copy to compare gathered cells with (``debug.shadow``).
    measurer
        Sees the attention of every decode query (``debug.measure``).
    """

    def __init__(
        self,
        model_runner: Any,
        pool: PackedKVPool,
        ledger: Ledger,
        accumulation: Accumulation | None,
        shadow: Shadow | None = None,
        measurer: Measurer | None = None,
    ) -> None:
        super().__init__(model_runner)
        self.pool = pool
        self.ledger = ledger
        self.accumulation = accumulation
        self.shadow = shadow
        self.measurer = measurer
        self.kernels = kernels_for(pool.cells.key.device)
        self.lists: DecodeLists | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Start the states of the cells this forward writes and resolve the token lists of every layer."""
        super().init_forward_metadata(forward_batch)
        cells = self.pool.cells
        if forward_batch.out_cache_loc is not None:
            recurs = self.accumulation is not None and self.accumulation.rule == "recurrence"
            positions = forward_batch.positions if recurs else None
            self.kernels.start_states(
                cells.score, cells.memory, forward_batch.out_cache_loc, positions, cells.num_layers
            )
        self.lists = self._decode_lists(forward_batch) if forward_batch.forward_mode.is_decode() else None

    def _decode_lists(self, forward_batch: Any) -> DecodeLists:
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        table = self.ledger.table[rows]
        prefix, tail, score_from, score_after = table[:, :4].unbind(1)
        kept = self.ledger.kept_of(table)
        width = int((prefix + kept.amax(1) + seq_lens - tail).max())
        if self.measurer is not None:
            self.measurer.begin_step(rows, seq_lens, width)
        cells, length = token_lists(
            self.req_to_token_pool.req_to_token,
            rows,
            seq_lens,
            prefix,
            tail,
            kept,
            self.ledger.offsets_of(table),
            self.pool.cells.blocks,
            width,
        )
        scored, first, decay = None, 0, 1.0
        if self.accumulation is not None:
            decay = self.accumulation.step_decay
            first = min(int(score_from.min()), width)
            own = torch.arange(first, width, device=cells.device) >= score_from.unsqueeze(1)
            if self.accumulation.every > 1:
                own &= (seq_lens % self.accumulation.every == 0).unsqueeze(1)
            if self.accumulation.window is not None:
                own &= (seq_lens > score_after).unsqueeze(1)
                decay = torch.where(seq_lens == score_after + 1, 0.0, decay).unsqueeze(1)
            scored = torch.where(own, cells[:, :, first:], 0)
        return DecodeLists(cells, length, scored, first, decay)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One query per request over its layer's token list; see the base class for shapes."""
        assert self.lists is not None
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        store, lists, index = self.pool.cells, self.lists, layer.layer_id - self.pool.start_layer
        if self.shadow is not None:
            self.shadow.check_decode(index, forward_batch, lists.cells[index], lists.length[index])
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output, heads = attend_heads(
            query, store.keys, store.values, lists.cells[index], lists.length[index], layer.scaling
        )
        if self.measurer is not None:
            self.measurer.add(index, forward_batch.req_pool_indices, heads, forward_batch.seq_lens)
        if lists.scored is not None and lists.first < heads.shape[2]:
            assert store.score is not None and self.accumulation is not None
            accumulate(
                self.accumulation,
                store.score,
                store.memory,
                lists.scored[index],
                heads[:, :, lists.first :].mean(1),
                lists.decay,
                forward_batch.seq_lens.unsqueeze(1),
            )
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Stock extend; private tokens of an observed prefill are scored from its last queries."""
        output: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        index = layer.layer_id - self.pool.start_layer
        if self.shadow is not None:
            self.shadow.write_extend(index, forward_batch)
        if self.accumulation is not None:  # this backend stores and reads keys without fp8's scales
            score_prefill(
                self.accumulation,
                self.pool.cells,
                self.ledger.observed,
                self.req_to_token_pool.req_to_token,
                index,
                forward_batch,
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
                layer.scaling,
            )
        return output
