"""The portable backend: SGLang's ``torch_native`` with a decode that is vectorised over the batch and scores.

Its attention computes the weights themselves, so the score takes these. Reading lengths on the host costs nothing on a
CPU, so all lists are resolved when the step begins: one for all layers that keep as much of every request (and have no
excess), one a layer for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode
from lethe_sglang.kernels.common import TokenLists, slot_lists, token_lists
from lethe_sglang.kernels.reference import Reading, attend
from lethe_sglang.kernels.table import read

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.policies.base import Accumulation


class LayerLists(NamedTuple):
    """What one decode step reads and scores in a layer, or in every layer of a group.

    Attributes
    ----------
    narrow
        Whether ``cells`` are slots of the layer's own buffer; else they are flat cells.
    cells, length
        int64 ``[B, n]`` and ``[B]``: the lists and their valid entries.
    reading
        The same as attention takes it.
    scored
        int64 ``[B, n - first]``: the cells to score from the step's first scored list position on, 0 where none is;
        None if none is at all.
    """

    narrow: bool
    cells: torch.Tensor
    length: torch.Tensor
    reading: Reading
    scored: torch.Tensor | None


class LetheTorchNativeBackend(ScoredBackend, TorchNativeAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; extend is stock."""

    def __init__(
        self, model_runner: Any, pool: PackedKVPool, ledger: Ledger, accumulation: Accumulation | None
    ) -> None:
        super().__init__(model_runner)
        req_to_token = self.req_to_token_pool.req_to_token
        self.scored = ScoredDecode(pool, ledger, req_to_token, accumulation, max_batch=req_to_token.shape[0])
        self.first_scored = 0
        self.lists: list[LayerLists] = []

    @staticmethod
    def key_scale(layer: Any) -> float:
        """Stock stores and reads keys without fp8's scales here."""
        return 1.0

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """As the other backends, and resolve the lists of every layer."""
        super().init_forward_metadata(forward_batch)
        self.lists = self._resolve(forward_batch) if forward_batch.forward_mode.is_decode() else []

    def _groups(self, rows: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Return groups of layers that keep as many cells of every request, none in excess, and all other layers."""
        states = [state for row in rows if (state := self.scored.ledger.requests.get(row)) is not None]
        packed = [state.layout.packed for state in states]
        groups: dict[tuple[int, ...], list[int]] = {}
        wide = []
        for layer in range(self.scored.pool.cells.num_layers):
            kept = tuple(state.kept[layer] for state in states)
            if all(k <= m for k, m in zip(kept, packed, strict=True)):
                groups.setdefault(kept, []).append(layer)
            else:
                wide.append(layer)
        return list(groups.values()), wide

    def _resolve(self, forward_batch: Any) -> list[LayerLists]:
        rows, seq_lens, scored = forward_batch.req_pool_indices, forward_batch.seq_lens, self.scored
        cells, req_to_token = scored.pool.cells, scored.req_to_token
        at = read(scored.ledger.table[rows])
        width = int(at.length(seq_lens).max())
        first = scored.first[: rows.shape[0]]
        self.first_scored = min(int(first.min()), width) if scored.scores else width
        own = torch.arange(self.first_scored, width, device=first.device) >= first.unsqueeze(1)

        def made(narrow: bool, tokens: TokenLists, index: int) -> LayerLists:
            list_, length = tokens.cells[index], tokens.length[index]
            states = torch.where(own, list_[:, self.first_scored :], 0) if self.first_scored < width else None
            return LayerLists(narrow, list_, length, Reading.of(list_, length, cells.key.shape[1]), states)

        groups, wide = self._groups(rows.tolist())
        found: dict[int, LayerLists] = {}
        if groups:
            spans = at.spans._replace(kept=at.kept[:, [layers[0] for layers in groups]])
            tokens = slot_lists(req_to_token, rows, seq_lens, spans, width)
            for index, layers in enumerate(groups):
                found |= dict.fromkeys(layers, made(True, tokens, index))
        if wide:
            asked = torch.tensor(wide, device=rows.device)
            tokens = token_lists(req_to_token, rows, seq_lens, at.spans, cells.blocks, width, layers=asked)
            found |= {layer: made(False, tokens, index) for index, layer in enumerate(wide)}
        return [found[layer] for layer in range(cells.num_layers)]

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One query per request over its layer's list; see the base class for shapes."""
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        index = self.scored.index_of(layer)
        lists = self.lists[index]
        cells = self.scored.cells_of(index, lists.narrow)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output, heads = attend(query, cells.keys, cells.values, lists.reading, layer.scaling)
        if self.observers:
            self._show(index, forward_batch, lists.narrow, lists.cells, lists.length, heads)
        if lists.scored is not None:
            attention = heads[:, :, self.first_scored :].mean(1)
            self.scored.accumulate(cells.states, lists.scored, attention, forward_batch.seq_lens)
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)
