"""The portable backend: SGLang's ``torch_native`` with a decode that is vectorised over the batch and scores.

Its attention computes the weights themselves, so the score takes these. Reading lengths on the host costs nothing on a
CPU, so the lists of all layers are resolved at once, when the step begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode
from lethe_sglang.kernels.common import TokenLists, token_lists
from lethe_sglang.kernels.reference import attend
from lethe_sglang.kernels.table import read

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.observers.base import Observer
    from lethe_sglang.policies.base import Accumulation


class DecodeLists(NamedTuple):
    """Token lists of one decode step.

    Attributes
    ----------
    tokens
        Lists of all layers.
    first
        First list position that any request scores; n if none does.
    scored
        int64 ``[L, B, n - first]``: the cells to score from there on, 0 where none is; None if none is at all.
    """

    tokens: TokenLists
    first: int
    scored: torch.Tensor | None


class LetheTorchNativeBackend(ScoredBackend, TorchNativeAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; extend is stock.

    Parameters
    ----------
    observers
        Are shown every layer; none in production.
    """

    def __init__(
        self,
        model_runner: Any,
        pool: PackedKVPool,
        ledger: Ledger,
        accumulation: Accumulation | None,
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(model_runner)
        req_to_token = self.req_to_token_pool.req_to_token
        self.scored = ScoredDecode(pool, ledger, req_to_token, accumulation, max_batch=req_to_token.shape[0])
        self.observers = observers
        self.lists: DecodeLists | None = None

    @staticmethod
    def key_scale(layer: Any) -> float:
        """Stock stores and reads keys without fp8's scales here."""
        return 1.0

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """As the other backends, and resolve the token lists of every layer."""
        super().init_forward_metadata(forward_batch)
        self.lists = self._decode_lists(forward_batch) if forward_batch.forward_mode.is_decode() else None

    def _decode_lists(self, forward_batch: Any) -> DecodeLists:
        rows, seq_lens, scored = forward_batch.req_pool_indices, forward_batch.seq_lens, self.scored
        at = read(scored.ledger.table[rows])
        width = int(at.length(seq_lens).max())
        tokens = token_lists(scored.req_to_token, rows, seq_lens, at.spans, scored.pool.cells.blocks, width)
        first = scored.first[: rows.shape[0]]
        start = width if scored.accumulation is None else min(int(first.min()), width)
        if start == width:
            return DecodeLists(tokens, width, None)
        own = torch.arange(start, width, device=first.device) >= first.unsqueeze(1)
        return DecodeLists(tokens, start, torch.where(own, tokens.cells[:, :, start:], 0))

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One query per request over its layer's token list; see the base class for shapes."""
        assert self.lists is not None
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        store, lists, index = self.scored.pool.cells, self.lists, self.scored.index_of(layer)
        cells, length = lists.tokens.cells[index], lists.tokens.length[index]
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output, heads = attend(query, store.keys, store.values, cells, length, layer.scaling)
        for observer in self.observers:
            observer.on_decode_layer(index, forward_batch, cells, length, heads)
        if lists.scored is not None:
            self.scored.accumulate(lists.scored[index], heads[:, :, lists.first :].mean(1), forward_batch.seq_lens)
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        """As the other backends; observers follow."""
        output = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        for observer in self.observers:
            observer.on_extend_layer(self.scored.index_of(layer), forward_batch)
        return output
