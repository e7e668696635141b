"""SGLang's Triton backend whose decode reads packed rows and scores; prefill is stock.

There is no plan: before a layer's attention its lists are written into the buffers stock uses for its own, indptr
included, and the kernel reads everything from the device. Lengths may differ in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode, check_layer
from lethe_sglang.kernels.common import Lists

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.policies.base import Accumulation


class LetheTritonBackend(ScoredBackend, TritonAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; prefill is stock."""

    def __init__(
        self, model_runner: Any, pool: PackedKVPool, ledger: Ledger, accumulation: Accumulation | None
    ) -> None:
        super().__init__(model_runner)
        max_batch = self.kv_indptr.shape[0] - 1
        self.scored = ScoredDecode(pool, ledger, self.req_to_token, accumulation, max_batch)

    def _update_decode_kv_buffers(
        self, plan: Any, bs: int, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, torch.Tensor]:
        """Graph steps: no lists yet, every layer writes its own; splits follow the longest of them."""
        longest = self.scored.longest(req_pool_indices[:bs], seq_lens[:bs])
        return self.kv_indptr[: bs + 1], self.window_kv_indptr, None, longest

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One query per request over its layer's list; see the base class for shapes.

        Raises
        ------
        ValueError
            For attention sinks, score modifiers and the like, which the score does not know.
        """
        extra = [name for name, value in kwargs.items() if value is not None]
        if extra:
            raise ValueError(f"--kv-evict: layer {layer.layer_id} uses {', '.join(extra)}; use --kv-evict none")
        if save_kv_cache:
            where = KVWriteLoc.for_batch(forward_batch)
            self._set_kv_buffer(forward_batch, layer, where, k, v, layer.k_scale, layer.v_scale)
        metadata, scored = self.forward_metadata, self.scored
        lists = Lists(metadata.kv_indptr, metadata.kv_indices)
        scored.fill(layer, forward_batch, lists, fill_indptr=True)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = self._attend(query, layer, metadata)
        if scored.accumulation is not None:
            lse = merge_splits(metadata.attn_lse[: query.shape[0], : query.shape[1]])
            scored.score(layer, forward_batch, query, lse, lists, lse_base="e")
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend(self, query: torch.Tensor, layer: Any, metadata: Any) -> torch.Tensor:
        check_layer(layer)
        cells, output = self.scored.pool.cells, torch.empty_like(query)
        scaled = layer.k_scale is not None and layer.v_scale is not None
        if self.scored.accumulation is not None:
            metadata.attn_lse[: query.shape[0]].fill_(float("-inf"))  # the kernel writes the splits it uses
        self.decode_attention_fwd(
            query,
            cells.keys,
            cells.values,
            output,
            metadata.kv_indptr,
            metadata.kv_indices,
            metadata.attn_logits,
            metadata.attn_lse,
            metadata.num_kv_splits,
            self.max_kv_splits,
            layer.scaling,
            layer.k_scale_float if scaled else 1.0,
            layer.v_scale_float if scaled else 1.0,
            use_pdl=self.use_pdl,
            enable_lean=False,
        )
        return output


def merge_splits(lse: torch.Tensor) -> torch.Tensor:
    """Merge log-sum-exps over parts of a list into the list's.

    Parameters
    ----------
    lse
        float32 ``[B, Hq, splits]``, natural; ``-inf`` for a split that is not in use.

    Returns
    -------
    torch.Tensor
        float32 ``[B, Hq]``, contiguous.
    """
    return torch.logsumexp(lse, dim=-1)
