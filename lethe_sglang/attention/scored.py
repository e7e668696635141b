"""What decode does beside attention, whichever of SGLang's backends computes it.

Owns: the states of written cells, the step's schedule, a layer's token list, the score of own cells.
Does not own: the attention itself, its plans and its buffers (``flashinfer.py``, ``triton.py``, ``torch_native.py``).

Everything reads tensors of fixed address (the runner's input buffers, the ledger's table, the pool) and nothing is
read back from the device, so a CUDA graph can hold all of it. Lists that layers share are filled when a step begins;
the list of a layer that may have excess right before its attention. So rows and table are read until the last such
layer, and without any the shared reads of a decode step end at the graph's head.

A backend whose attention is a kernel hands over its log-sum-exp (:meth:`ScoredDecode.score`, which computes the weights
of own cells again); one that has the weights at hand hands over these (:meth:`ScoredDecode.accumulate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

from lethe_sglang.attention.prefill import OBSERVATION_WINDOW, observation_attention, replay
from lethe_sglang.kernels import reference
from lethe_sglang.kernels.common import Attention, Batch, Lists, Parts, Schedule, States
from lethe_sglang.kernels.dispatch import kernels_for
from lethe_sglang.kernels.table import NEVER, read

if TYPE_CHECKING:
    from lethe_sglang.attention.length_classes import LengthClasses
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.phase import Phase
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.kernels.common import Cells
    from lethe_sglang.observers.base import Observer
    from lethe_sglang.policies.base import Accumulation

PLAIN, SCORED = "plain", "scored"
"""The variants of a captured decode step of a policy that scores every n-th; in the order of what they need."""


class ScoreVariants:
    """Which of its captured variants a decode step is replayed from: SGLang's ``AttentionGraphVariants``."""

    capture_labels = (PLAIN, SCORED)

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def select(self, forward_batch: Any) -> str:
        """Return the variant of the step whose forward is being prepared."""
        return SCORED if self.phase.scores else PLAIN


class ScoredDecode:
    """Lists and scores of decode steps.

    Parameters
    ----------
    pool
        The packed pool.
    ledger
        Layouts of decoding requests; attention reads its device table.
    req_to_token
        int32 ``[R, C]``: SGLang's rows.
    accumulation
        What the policy accumulates; None scores nothing.
    max_batch
        Most requests of a step, padded rows of a CUDA graph included.

    Attributes
    ----------
    first, decay
        int32, float32 ``[max_batch]``: the step's schedule (``schedule`` of the kernels).
    """

    def __init__(
        self,
        pool: PackedKVPool,
        ledger: Ledger,
        req_to_token: torch.Tensor,
        accumulation: Accumulation | None,
        max_batch: int,
    ) -> None:
        self.pool = pool
        self.ledger = ledger
        self.req_to_token = req_to_token
        self.accumulation = accumulation
        self.kernels = kernels_for(req_to_token.device)
        self.first = torch.full((max_batch,), NEVER, dtype=torch.int32, device=req_to_token.device)
        self.decay = torch.ones((max_batch,), dtype=torch.float32, device=req_to_token.device)
        self._started = torch.zeros(req_to_token.shape[0], dtype=torch.int64, device=req_to_token.device)

    @property
    def scores(self) -> bool:
        """Whether the decode step that is run or captured is scored."""
        variant = get_capture_attention_variant()
        return self.accumulation is not None and (self.ledger.phase.scores if variant is None else variant == SCORED)

    def index_of(self, layer: Any) -> int:
        """Return a layer's number in the pool."""
        return int(layer.layer_id - self.pool.start_layer)

    def begin(self, forward_batch: Any) -> None:
        """Start the states of the cells this forward writes; resolve a scored decode step's schedule."""
        cells, rule, phase = self.pool.cells, self.accumulation, self.ledger.phase
        decodes, slots, positions = forward_batch.forward_mode.is_decode(), forward_batch.out_cache_loc, None
        if phase.every > 1 and decodes:
            if not self.scores:
                return
            slots, at = self._unstarted(forward_batch)
        elif slots is not None:
            at = forward_batch.positions
        if slots is not None:
            positions = at if rule is not None and rule.rule == "recurrence" else None
            self.kernels.start_states(cells.states, slots, positions, cells.num_layers)
        if rule is None:
            return
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        if decodes:
            first, decay, _ = self.schedule_of(seq_lens)
            if phase.every > 1 and not phase.by_length:
                rule = rule._replace(decay=rule.step_decay, every=1)
            self.kernels.schedule(self.batch_of(forward_batch), rule, first, decay)
        if phase.every > 1 and rows is not None:
            self._started[rows.to(torch.int64)] = seq_lens.to(torch.int64)

    def _unstarted(self, forward_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots and positions written since their request was scored last, int64 ``[B * n]``; others are 0.

        No more than n of a request: it is scored in one of n steps. What its prefill has written has started.
        """
        rows, lengths = (x.to(torch.int64) for x in (forward_batch.req_pool_indices, forward_batch.seq_lens))
        at = lengths.unsqueeze(1) - 1 - torch.arange(self.ledger.phase.every, device=lengths.device)
        fresh = (at >= self._started[rows].unsqueeze(1)) & (at >= 0)
        at = at.masked_fill(~fresh, 0)
        slots = self.req_to_token[rows.unsqueeze(1), at].masked_fill(~fresh, 0)
        return slots.flatten().to(torch.int64), at.flatten()

    def batch_of(self, forward_batch: Any) -> Batch:
        """Return SGLang's decode batch as the kernels take it."""
        return Batch(self.req_to_token, self.ledger.table, forward_batch.req_pool_indices, forward_batch.seq_lens)

    def schedule_of(self, seq_lens: torch.Tensor) -> Schedule:
        """Return the schedule of a step of requests that are this long (tokens, the newest included)."""
        return Schedule(self.first[: len(seq_lens)], self.decay[: len(seq_lens)], seq_lens)

    def longest(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """Return each request's longest list over the layers, int ``[B]`` (tokens), on the device."""
        return read(self.ledger.table[rows]).length(seq_lens).amax(1)

    def fill(self, layer: int, forward_batch: Any, lists: Lists, fill_indptr: bool, narrow: bool) -> None:
        """Write a layer's lists: where ``indptr`` says, or ``indptr`` as well (see ``kernels/triton/indices.py``).

        ``narrow`` asks for slots of the layer's own buffer, which serve every layer of its class.
        """
        batch, blocks = self.batch_of(forward_batch), None if narrow else self.pool.cells.blocks
        self.kernels.fill_lists(batch, layer, blocks, lists, fill_indptr)

    def cells_of(self, layer: int, narrow: bool) -> Cells:
        """Return the cells that a layer's list counts: its own, or all of the pool."""
        return self.pool.cells.of_layer(layer) if narrow else self.pool.cells

    def score(
        self,
        layer: Any,
        forward_batch: Any,
        query: torch.Tensor,
        lse: torch.Tensor,
        lists: Lists,
        cells: Cells,
        lse_base: Literal["e", "2"],
        parts: Parts | None = None,
    ) -> None:
        """Add a layer's attention of this step to the states of own cells.

        ``query``, ``lse``, ``lse_base`` and ``parts`` are those of :class:`~lethe_sglang.kernels.common.Attention`,
        ``lists`` what it has read, ``cells`` what these count.

        Raises
        ------
        ValueError
            For a layer whose logits are more than scaled products.
        """
        if not self.scores:
            return
        assert self.accumulation is not None
        check_layer(layer)
        attention = Attention(query, cells.keys, lse, layer.scaling * key_scale(layer), lse_base, parts)
        states = States(cells.score, cells.memory if self.accumulation.rule == "recurrence" else None)
        self.kernels.score(self.accumulation, attention, lists, self.schedule_of(forward_batch.seq_lens), states)

    def accumulate(self, states: States, cells: torch.Tensor, attention: torch.Tensor, step: torch.Tensor) -> None:
        """Add attention that a backend has at hand to the states of cells; for the arguments, see ``accumulate``."""
        assert self.accumulation is not None
        reference.accumulate(self.accumulation, states, cells, attention, self.schedule_of(step))

    def observe(self, layer: Any, query: torch.Tensor, scaling: float) -> None:
        """Score a layer's own tokens of observed prefills as if the last queries had been decode steps.

        Parameters
        ----------
        layer
            SGLang's; the keys of the batch are stored. ``Ledger.observed`` names what is observed of the batch.
        query
            ``[tokens, Hq, D]``: of all requests of the batch.
        scaling
            Softmax scale, times the factor of a stored key.
        """
        rule, observed = self.accumulation, self.ledger.observed
        if rule is None or not observed:
            return
        cells = self.pool.cells.of_layer(self.index_of(layer))
        assert cells.score is not None
        window = min(rule.window or OBSERVATION_WINDOW, OBSERVATION_WINDOW)
        for row, first, length, start, end in observed:
            slots = self.req_to_token[row, :length].to(torch.int64)
            seen = observation_attention(query[start:end], cells.keys, slots, scaling, window)
            score, memory = replay(rule, seen)
            cells.score[slots[first:]] = score[first:]
            if memory is not None and cells.memory is not None:
                cells.memory[slots[first:]] = memory[first:]


def key_scale(layer: Any) -> float:
    """Return the factor of a stored key: 1 unless the KV cache is fp8 with scales."""
    return 1.0 if layer.k_scale_float is None else float(layer.k_scale_float)


def check_extras(layer: Any, extras: Mapping[str, Any]) -> None:
    """Refuse what a model hands attention beside query, key and value: sinks, score modifiers and the like.

    Raises
    ------
    ValueError
        Naming the layer and what it uses, which the score does not know.
    """
    if used := [name for name, value in extras.items() if value is not None and value is not False]:
        raise ValueError(f"--kv-evict: layer {layer.layer_id} uses {', '.join(used)}; use --kv-evict none")


def check_layer(layer: Any) -> None:
    """Refuse a layer whose attention is not the softmax of scaled products: its score would be another's.

    Raises
    ------
    ValueError
        Naming the layer and what it does to its logits.
    """
    temperature = getattr(layer, "xai_temperature_len", -1)
    if layer.logit_cap or (temperature is not None and temperature > 0):
        what = f"caps its logits at {layer.logit_cap}" if layer.logit_cap else "scales its logits by position"
        raise ValueError(f"--kv-evict: layer {layer.layer_id} {what}, which the score does not; use --kv-evict none")


class ScoredBackend(AttentionBackend):  # type: ignore[misc]
    """Mixin in front of one of SGLang's backends: when states start, steps are scheduled and prefills observed.

    A subclass is made from SGLang's ``model_runner`` and what :class:`ScoredDecode` takes besides.

    Attributes
    ----------
    scored
        Set by the subclass once SGLang's backend is built.
    classes
        Which layers share plans and lists; None where every layer has a list of its own.
    observers
        Are shown every layer; none in production, where nothing of them runs or enters a graph.
    """

    scored: ScoredDecode
    classes: LengthClasses | None = None
    observers: Sequence[Observer] = ()
    key_scale = staticmethod(key_scale)

    @property
    def accumulation(self) -> Accumulation | None:
        """What the policy accumulates."""
        return self.scored.accumulation

    @accumulation.setter
    def accumulation(self, rule: Accumulation | None) -> None:
        self.scored.accumulation = rule

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager steps: stock's metadata, then what the forward needs of ours."""
        super().init_forward_metadata(forward_batch)
        self._begin(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Stock's metadata; a prefill's graph holds no metadata of ours, so its states start here."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if not forward_batch.forward_mode.is_decode_or_idle():
            self.scored.begin(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Record what a decode step needs of ours into its graph."""
        super().init_forward_metadata_in_graph(forward_batch)
        self._begin(forward_batch)

    def _begin(self, forward_batch: Any) -> None:
        self.scored.begin(forward_batch)
        if self.classes is not None and forward_batch.forward_mode.is_decode():
            for number, layers in enumerate(self.classes.layers):
                if self.classes.narrow[number]:
                    lists, fill_indptr = self._lists(number)
                    self.scored.fill(layers[0], forward_batch, lists, fill_indptr, narrow=True)

    def _lists(self, number: int) -> tuple[Lists, bool]:
        """Return where the lists of a class lie in this step, and whether their indptr has yet to be written."""
        raise NotImplementedError

    def _lists_of(self, layer: int, forward_batch: Any) -> tuple[Lists, Cells]:
        """Return a layer's lists, filled, and the cells that they count."""
        number = 0 if self.classes is None else self.classes.of_layer[layer]
        narrow = self.classes is not None and self.classes.narrow[number]
        lists, fill_indptr = self._lists(number)
        if not narrow:
            self.scored.fill(layer, forward_batch, lists, fill_indptr, narrow=False)
        if self.observers:
            self._show_lists(layer, forward_batch, lists, narrow)
        return lists, self.scored.cells_of(layer, narrow)

    def _show_lists(self, layer: int, forward_batch: Any, lists: Lists | reference.Pages, narrow: bool) -> None:
        """Show observers the lists that a layer's kernel reads, as they lie there."""
        self._show(layer, forward_batch, narrow, *reference.padded(lists, forward_batch.seq_lens.shape[0]))

    def _show(
        self,
        layer: int,
        forward_batch: Any,
        narrow: bool,
        cells: torch.Tensor,
        length: torch.Tensor,
        attention: torch.Tensor | None = None,
    ) -> None:
        """Show observers a layer's lists; ``narrow`` ones are of slots of its own buffer."""
        flat = cells + layer * self.scored.pool.cells.blocks if narrow else cells
        for observer in self.observers:
            observer.on_decode_layer(layer, forward_batch, flat, length, attention)

    def shared_read_ends(self, fm: Any) -> Any:
        """Rows and table are read at the head of a decode step, and before every layer that has its own list."""
        if not fm.is_decode():
            return super().shared_read_ends(fm)
        shared = self.classes is not None and all(self.classes.narrow)
        return SharedReadEnds.IN_REPLAY if shared else SharedReadEnds.POST_REPLAY

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        """Stock extend; own tokens of an observed prefill are scored from its last queries."""
        output = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self.scored.observe(layer, query, layer.scaling * self.key_scale(layer))
        for observer in self.observers:
            observer.on_extend_layer(self.scored.index_of(layer), forward_batch)
        return output
