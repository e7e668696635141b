"""SGLang's FlashAttention 3 backend whose decode reads packed rows and scores; prefill is stock, and so is the call.

The kernel reads a page table, one for all layers. So every layer has to keep as many cells: then none has excess, each
reads its own buffer, and a request's packed row is a shorter row, whose pages are::

    row[0, P + k)    then    row[T, seq)

k is a multiple of the page size (``Ledger.multiple``), so only the last page is partly used. Lengths and pages are
written where stock writes them, before a step and out of its graph, because what FlashAttention schedules follows from
the lengths. A captured kernel is bounded by the context length, and a packed row is never longer than the sequence. The
score does not read pages: in a step that is scored the list of that one class is filled as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend, FlashAttentionMetadata

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode, check_extras
from lethe_sglang.kernels.common import Batch, Lists
from lethe_sglang.kernels.reference import Pages

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.policies.base import Accumulation


class LetheFlashAttentionBackend(ScoredBackend, FlashAttentionBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; prefill is stock.

    Parameters
    ----------
    budgets
        k_l of every layer, all alike.

    Raises
    ------
    ValueError
        If they are not, or for a model with more than full attention of one query over its own keys.
    """

    def __init__(
        self,
        model_runner: Any,
        pool: PackedKVPool,
        ledger: Ledger,
        accumulation: Accumulation | None,
        budgets: Sequence[int],
    ) -> None:
        super().__init__(model_runner)
        if self.use_mla or self.has_swa or self.local_attn_builder is not None or self.is_encoder_decoder:
            raise ValueError("--kv-evict needs full attention in every layer on fa3; use --kv-evict none")
        if len(set(budgets)) > 1:
            raise ValueError(
                "fa3 reads one page table for all layers, and their budgets differ: set --attention-backend to "
                "flashinfer or triton, or budget.allocation to uniform"
            )
        max_batch = self.req_to_token.shape[0]
        self.scored = ScoredDecode(pool, ledger, self.req_to_token, accumulation, max_batch)
        self.classes = LengthClasses(budgets, ledger)
        ledger.multiple = self.page_size
        self._indptr = torch.zeros(max_batch + 1, dtype=torch.int32, device=self.req_to_token.device)
        self._graph_indices = self._indices = self._indptr[:0]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Stock, and the lists that captured steps score from."""
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        size = 0 if self.scored.accumulation is None else max_bs * self.max_context_len
        self._graph_indices = torch.zeros(size, dtype=torch.int32, device=self._indptr.device)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager steps: as stock, but stock's decode would write whole rows first.

        Raises
        ------
        RuntimeError
            Without ``seq_lens_cpu``.
        """
        if not forward_batch.forward_mode.is_decode():
            super().init_forward_metadata(forward_batch)
            return
        if forward_batch.seq_lens_cpu is None:
            raise RuntimeError("--kv-evict sizes page tables by host lengths, and the batch has none")
        batch, device = forward_batch.seq_lens.shape[0], self._indptr.device
        longest = max(forward_batch.seq_lens_cpu.tolist(), default=1)
        pages = -(-longest // self.page_size)
        metadata = self.forward_metadata = FlashAttentionMetadata(
            cache_seqlens_int32=torch.empty(batch, dtype=torch.int32, device=device),
            max_seq_len_k=longest,
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device),
            page_table=torch.empty((batch, pages), dtype=torch.int32, device=device),
        )
        self._set_decode_page_metadata(None, metadata, forward_batch.req_pool_indices, forward_batch.seq_lens, 0)
        metadata.scheduler_metadata = self._compute_scheduler_metadata(
            batch, longest, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
        )
        if self.scored.scores:
            size = int(forward_batch.seq_lens_cpu.sum())
            self._indices = torch.empty(size, dtype=torch.int32, device=device)
        self._begin(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Stock, which writes pages by :meth:`_set_decode_page_metadata`."""
        self._indices = self._graph_indices
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def _set_decode_page_metadata(
        self, plan: Any, metadata: Any, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, seq_len_delta: int
    ) -> None:
        """Write the lengths and pages of packed rows; a decode step has no use for ``cu_seqlens_k``."""
        batch = Batch(self.req_to_token, self.scored.ledger.table, req_pool_indices, seq_lens)
        self.scored.kernels.fill_pages(batch, self.page_size, metadata.cache_seqlens_int32, metadata.page_table)

    def _begin(self, forward_batch: Any) -> None:
        if self.scored.scores:
            super()._begin(forward_batch)
        else:  # nothing reads lists
            self.scored.begin(forward_batch)

    def _lists(self, number: int) -> tuple[Lists, bool]:
        return Lists(self._indptr, self._indices), True

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """One query per request over its pages; see the base class for shapes."""
        check_extras(layer, kwargs)
        if not self.scored.scores:
            output = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            self._show_pages(layer, forward_batch)
            return output
        query = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        query = query.to(self.kv_cache_dtype).to(q.dtype)  # as the kernel takes it: the log-sum-exp is that one's
        output, lse = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, return_lse=True)
        self._show_pages(layer, forward_batch)
        lists, cells = self._lists(0)[0], self.scored.cells_of(self.scored.index_of(layer), narrow=True)
        self.scored.score(layer, forward_batch, query, lse, lists, cells, lse_base="e")
        return output

    def _show_pages(self, layer: Any, forward_batch: Any) -> None:
        if self.observers:
            metadata = self.forward_metadata
            pages = Pages(metadata.cache_seqlens_int32, metadata.page_table, self.page_size)
            self._show_lists(self.scored.index_of(layer), forward_batch, pages, narrow=True)
