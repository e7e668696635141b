"""SGLang's Triton backend whose decode reads packed rows and scores; prefill is stock.

There is no plan: lists are written on the device, indptr included, and the kernel reads everything from there. Layers
of one narrow class (``length_classes.py``) share a list that is written when the step begins; the others write theirs
into one buffer in turn, and without classes lengths may differ in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.attention.decode_attention import _MIN_BLOCK_KV
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode, check_extras, check_layer
from lethe_sglang.kernels.common import Lists, Parts

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.kernels.common import Cells
    from lethe_sglang.policies.base import Accumulation


class LetheTritonBackend(ScoredBackend, TritonAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; prefill is stock.

    Parameters
    ----------
    budgets
        k_l of every layer: they make the length classes. None if lengths may differ in every layer.
    """

    def __init__(
        self,
        model_runner: Any,
        pool: PackedKVPool,
        ledger: Ledger,
        accumulation: Accumulation | None,
        budgets: Sequence[int] | None,
    ) -> None:
        super().__init__(model_runner)
        max_batch = self.kv_indptr.shape[0] - 1
        self.scored = ScoredDecode(pool, ledger, self.req_to_token, accumulation, max_batch)
        self.classes = None if budgets is None else LengthClasses(budgets, ledger)
        self.buffers = 1 if self.classes is None else 1 + max(self.classes.buffer_of)
        self._indptrs = [torch.zeros_like(self.kv_indptr) for _ in range(self.buffers - 1)]
        self._graph_indices: list[torch.Tensor] = []
        self._eager_indices: list[torch.Tensor] = []

    def init_cuda_graph_state(self, *args: Any, **kwargs: Any) -> None:
        """Stock, and as many index buffers as there are."""
        super().init_cuda_graph_state(*args, **kwargs)
        self._graph_indices = [torch.zeros_like(self.cuda_graph_kv_indices) for _ in range(self.buffers - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager steps: stock's buffers for one list are made anew, and so are the others."""
        self._eager_indices.clear()
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode():  # splits follow lists, as those of replayed steps do
            longest = self.scored.longest(forward_batch.req_pool_indices, forward_batch.seq_lens)
            self.get_num_kv_splits(self.forward_metadata.num_kv_splits, longest)

    def _lists(self, number: int) -> tuple[Lists, bool]:
        metadata, buffer = self.forward_metadata, 0 if self.classes is None else self.classes.buffer_of[number]
        if buffer == 0:
            return Lists(metadata.kv_indptr, metadata.kv_indices), True
        if metadata.kv_indices is getattr(self, "cuda_graph_kv_indices", None):
            indices = self._graph_indices
        else:
            indices = self._eager_indices
            if not indices:
                indices += [torch.empty_like(metadata.kv_indices) for _ in range(self.buffers - 1)]
        return Lists(self._indptrs[buffer - 1][: len(metadata.kv_indptr)], indices[buffer - 1]), True

    def _update_decode_kv_buffers(
        self, plan: Any, bs: int, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, torch.Tensor]:
        """Graph steps: no lists yet, every layer writes its own; splits follow the longest of them."""
        longest = self.scored.longest(req_pool_indices[:bs], seq_lens[:bs])
        return self.kv_indptr[: bs + 1], self.window_kv_indptr, None, longest

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One query per request over its layer's list; see the base class for shapes."""
        check_extras(layer, kwargs)
        if save_kv_cache:
            where = KVWriteLoc.for_batch(forward_batch)
            self._set_kv_buffer(forward_batch, layer, where, k, v, layer.k_scale, layer.v_scale)
        metadata, scored = self.forward_metadata, self.scored
        lists, cells = self._lists_of(scored.index_of(layer), forward_batch)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = self._attend(query, layer, metadata, lists, cells)
        if scored.scores:
            lse = metadata.attn_lse[: query.shape[0], : query.shape[1]]
            parts = Parts(metadata.num_kv_splits[: query.shape[0]], _MIN_BLOCK_KV)
            scored.score(layer, forward_batch, query, lse, lists, cells, lse_base="e", parts=parts)
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend(self, query: torch.Tensor, layer: Any, metadata: Any, lists: Lists, cells: Cells) -> torch.Tensor:
        check_layer(layer)
        output = torch.empty_like(query)
        scaled = layer.k_scale is not None and layer.v_scale is not None
        self.decode_attention_fwd(
            query,
            cells.keys,
            cells.values,
            output,
            lists.indptr,
            lists.indices,
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
