"""SGLang's FlashInfer backend whose decode reads packed rows and scores; prefill is stock.

A layer's buffer, or the flat pool, is a paged cache of page size 1. Lists are written where the wrapper will read them:
FlashInfer's fa2 reads indices when it runs, and plans from lengths alone. So there is one wrapper and one plan per
length class and step. A narrow class has one list, filled when the step begins; layers of the other classes fill one
buffer in turn, because they run one after the other::

    plan of a class (host lengths)  ->  for each of its layers: fill indices if wide, run with log-sum-exp, score

A plan that splits along the sequence may not take a list for longer than it is: chunks behind its end would underflow.
Class lengths are therefore exact, and a list is never written beyond them. The single-plan variant does not split: its
one plan does not depend on lengths, every layer writes its indptr as well, and lengths may differ in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import BatchDecodeWithPagedKVCacheWrapper, FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.attention.scored import ScoredBackend, ScoredDecode
from lethe_sglang.cache.layout import ceil_div
from lethe_sglang.kernels.common import Lists

if TYPE_CHECKING:
    from lethe_sglang.cache.ledger import Ledger
    from lethe_sglang.cache.pool import PackedKVPool
    from lethe_sglang.policies.base import Accumulation

INT_WORKSPACE_BYTES = 2**20
"""Integer workspace of a class (FlashInfer's own: 8 MiB a wrapper); a plan that does not fit raises in FlashInfer."""

STAGED = 3
"""Plans of a class that may be on their way to the device. Under overlap the host is one step ahead of it."""


class Staging:
    """Where the plans of one class are written on the host, before they are copied to its integer workspace.

    FlashInfer only queues that copy, so what a plan was written to may not be written again before the copy is done.

    Parameters
    ----------
    device
        Where the integer workspace lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        pin = device.type == "cuda"
        self.buffers = [torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=pin) for _ in range(STAGED)]
        self.copied: list[Any] = [None] * STAGED
        self.turn = 0

    def take(self) -> torch.Tensor:
        """Return a buffer for the next plan; waits for the last copy from it, which is long done as a rule."""
        self.turn = (self.turn + 1) % STAGED
        if self.copied[self.turn] is not None:
            self.copied[self.turn].synchronize()
        return self.buffers[self.turn]

    def queued(self) -> None:
        """Note that the copy of the plan just written stands in the current stream's queue."""
        if self.module is not None:
            self.copied[self.turn] = self.module.Event()
            self.copied[self.turn].record()


class ClassPlanner:
    """Plans a decode step; stands in for SGLang's ``FlashInferIndicesUpdaterDecode``.

    Parameters
    ----------
    stock
        The updater it stands in for: heads, head size and types of a plan.
    classes
        Length classes; None is the single-plan variant.
    rows
        Returns the rows of the batch whose forward is being prepared (host numbers, without padding).
    device
        Where the lists live.
    staging
        Of each plan.

    Attributes
    ----------
    capturing
        Whether a CUDA graph is being captured: its dummy batch has no rows.
    """

    def __init__(
        self,
        stock: Any,
        classes: LengthClasses | None,
        rows: Callable[[], Sequence[int]],
        device: torch.device | str,
        staging: Sequence[Staging],
    ) -> None:
        self.stock = stock
        self.classes = classes
        self.rows = rows
        self.device = torch.device(device)
        self.staging = staging
        self.capturing = False

    def indptr(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Return where each list begins and the last one ends: int32 ``[plans, B + 1]`` on the host."""
        if self.classes is None:
            lengths = seq_lens.unsqueeze(0)
        else:
            lengths = self.classes.lengths(() if self.capturing else self.rows(), seq_lens)
        shape = (lengths.shape[0], lengths.shape[1] + 1)
        indptr = torch.zeros(shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        indptr[:, 1:] = lengths.cumsum(1)
        return indptr

    def update(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor | None,
        seq_lens_sum: int | None,
        decode_wrappers: Sequence[Any],
        encoder_lens: Any,
        spec_info: Any,
        fixed_split_size: int | None = None,
        disable_split_kv: bool | None = None,
        *,
        plan: Any,
        req_pool_indices: torch.Tensor,
    ) -> None:
        """Plan every wrapper for this step, by host numbers alone; arguments are the stock updater's.

        Raises
        ------
        RuntimeError
            Without ``seq_lens_cpu``, or if rows and lengths do not belong together.
        """
        if seq_lens_cpu is None:
            raise RuntimeError("--kv-evict plans FlashInfer's decode from host lengths, and the batch has none")
        indptr = self.indptr(seq_lens_cpu)
        whole = bool(disable_split_kv) or self.classes is None
        options = {
            "fixed_split_size": fixed_split_size,
            "disable_split_kv": whole,
            "data_type": self.stock.data_type,
            "q_data_type": self.stock.q_data_type,
            "non_blocking": True,
        }
        heads = (self.stock.num_qo_heads, self.stock.num_kv_heads, self.stock.head_dim)
        last_page_len = torch.ones(indptr.shape[1] - 1, dtype=torch.int32)
        eager: dict[int, torch.Tensor] = {}
        ends = indptr[:, -1].tolist()
        buffer_of = (0,) if self.classes is None else self.classes.buffer_of
        for wrapper, line, number, staging in zip(decode_wrappers, indptr, buffer_of, self.staging, strict=True):
            own = options
            if wrapper.is_cuda_graph_enabled:  # over its own buffers; a replan copies no indptr to the device
                indices = wrapper._paged_kv_indices_buf[:0]
                wrapper._paged_kv_indptr_buf.copy_(line, non_blocking=True)
                if hasattr(wrapper.begin_forward, "func"):  # SGLang installs fast_decode_plan behind the first plan
                    own = {**options, "global_override_indptr_cpu": line}
            else:
                if number not in eager:
                    size = max(end for end, n in zip(ends, buffer_of, strict=True) if n == number)
                    eager[number] = torch.empty(size, dtype=torch.int32, device=self.device)
                indices = eager[number]
            wrapper._pin_memory_int_workspace_buffer = staging.take()
            wrapper.begin_forward(line, indices, last_page_len, *heads, 1, **own)
            staging.queued()


class LetheFlashInferBackend(ScoredBackend, FlashInferAttnBackend):  # type: ignore[misc]
    """Decode reads packed rows and adds the step's attention to the score of own cells; prefill is stock.

    Parameters
    ----------
    budgets
        k_l of every layer: they make the length classes.
    rows
        Returns the rows of the batch whose forward is being prepared (host numbers, without padding). SGLang's view of
        a replayed batch names them on the device only.
    single_plan
        One plan for all layers, without splitting along the sequence.

    Attributes
    ----------
    planner
        Plans the steps.
    """

    indices_updater_decode: Any

    def __init__(
        self,
        model_runner: Any,
        pool: PackedKVPool,
        ledger: Ledger,
        accumulation: Accumulation | None,
        budgets: Sequence[int],
        rows: Callable[[], Sequence[int]],
        single_plan: bool = False,
    ) -> None:
        super().__init__(model_runner)
        if self.num_wrappers != 1 or self.decode_uses_dequant_workspace:
            raise ValueError("--kv-evict needs full attention over a KV cache that FlashInfer reads as it is stored")
        req_to_token = self.req_to_token_pool.req_to_token
        device, max_batch = req_to_token.device, self.kv_last_page_len.shape[0]
        self.scored = ScoredDecode(pool, ledger, req_to_token, accumulation, max_batch)
        self.classes = None if single_plan else LengthClasses(budgets, ledger)
        if single_plan:
            self.decode_use_tensor_cores = True  # the other kernel's plan splits whatever it is told
        count = 1 if self.classes is None else len(self.classes.layers)
        width = 4 * ceil_div(max_batch + 1, 4)  # rows begin at 16 bytes, or every kernel is compiled twice
        self.class_indptr = torch.zeros((count, width), dtype=torch.int32, device=device)
        self._int_workspaces = [
            torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device) for _ in range(count)
        ]
        staging = [Staging(device) for _ in range(count)]
        self.planner = ClassPlanner(self.indices_updater_decode, self.classes, rows, device, staging)
        self.indices_updater_decode = self.planner
        self.decode_wrappers = [self._wrapper(number) for number in range(count)]

    def _wrapper(self, number: int, **buffers: Any) -> Any:
        """Make one wrapper. The wrappers of a class share its integer workspace: a step plans only one of them."""
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self.workspace_buffer,
            "NHD",
            backend=self.decode_backend,
            use_tensor_cores=self.decode_use_tensor_cores,
            **buffers,
        )
        wrapper.reset_workspace_buffer(self.workspace_buffer, self._int_workspaces[number])
        if self.classes is None:  # its kernel reads indptr before it waits for the one in front, which writes it
            wrapper.run = partial(wrapper.run, enable_pdl=False)
        return wrapper

    def init_cuda_graph_state(self, *args: Any, **kwargs: Any) -> None:
        """Stock, and as many index buffers as there are."""
        super().init_cuda_graph_state(*args, **kwargs)
        count = 1 if self.classes is None else 1 + max(self.classes.buffer_of)
        first = self.cuda_graph_kv_indices[0]
        self.graph_indices = [first, *(torch.zeros_like(first) for _ in range(count - 1))]

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list[Any]:
        """Make the wrappers of one captured batch size, over buffers whose addresses the graphs hold.

        Its variants have the same: the one plan of a step serves whichever is replayed.
        """
        if bs in self.decode_cuda_graph_metadata:
            return list(self.decode_cuda_graph_metadata[bs])
        buffer_of = (0,) if self.classes is None else self.classes.buffer_of
        return [
            self._wrapper(
                number,
                use_cuda_graph=True,
                paged_kv_indptr_buffer=self.class_indptr[number, : num_tokens + 1],
                paged_kv_indices_buffer=self.graph_indices[buffer_of[number]],
                paged_kv_last_page_len_buffer=self.kv_last_page_len[:num_tokens],
            )
            for number in range(len(self.decode_wrappers))
        ]

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Stock, which plans through :class:`ClassPlanner`."""
        self.planner.capturing = in_capture
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self.planner.capturing = False

    def _lists(self, number: int) -> tuple[Lists, bool]:
        wrapper = self.forward_metadata.decode_wrappers[number]
        return Lists(wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf), self.classes is None

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One query per request over its layer's list; see the base class for shapes."""
        if k is not None and save_kv_cache:
            where = KVWriteLoc.for_layer(forward_batch, layer)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, *self._kv_write_scales(layer))
        scored, index = self.scored, self.scored.index_of(layer)
        wrapper = self.forward_metadata.decode_wrappers[0 if self.classes is None else self.classes.of_layer[index]]
        lists, cells = self._lists_of(index, forward_batch)
        query = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        options = {
            "sm_scale": layer.scaling,
            "logits_soft_cap": layer.logit_cap,
            "k_scale": layer.k_scale_float,
            "v_scale": layer.v_scale_float,
        }
        cache = cells.keys, cells.values
        if not scored.scores:
            output = wrapper.forward(query, cache, **options)
        else:
            output, lse = wrapper.forward_return_lse(query, cache, **options)
            scored.score(layer, forward_batch, query, lse, lists, cells, lse_base="2")
        return output.view(-1, layer.tp_q_head_num * layer.head_dim)
