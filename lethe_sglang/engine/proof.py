"""A server is ready only when every rank of every data-parallel replica has said that it evicts.

A rank says so in what it reports when it has started (``entrypoints.report_rank``). The launcher hears the ranks of one
replica itself. Those of several report to SGLang's controller, which passes on what it needs of them and no more::

    rank: id, pool  ->  launcher                                      --dp-size 1
    rank: id, pool  ->  controller: all of them (relay)  ->  launcher
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lethe_sglang.config import ConfigError
from lethe_sglang.engine import guard

if TYPE_CHECKING:
    from lethe_sglang.engine.entrypoints import EvictionRequest

RANKS = "lethe_ranks"
"""Key of what a controller reports: what its ranks have reported."""


def relay(result: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER ``DataParallelController.get_init_info``: pass on what proves that each rank evicts, and its pool's size.

    The controller has to know the messages of the verb, too: it hands them on to all ranks.
    """
    if getattr(controller.server_args, "_lethe", None) is None:
        return result
    importlib.import_module("lethe_sglang.engine.verb")  # registers them
    kept = ("lethe", "max_total_num_tokens")
    return {**result, RANKS: [{name: info.get(name) for name in kept} for info in controller._scheduler_init_infos]}


def check_ranks(request: EvictionRequest, replicas: int, page_size: int, init_result: Any, processes: Any) -> None:
    """Let the launcher report ready only after every rank has reported the request's id, and every pool holds a floor.

    Parameters
    ----------
    request
        What the operator asked for.
    replicas
        Data-parallel replicas, each of which has to have a rank on this node.
    page_size
        Tokens.
    init_result, processes
        What SGLang's launcher returned: its result, whose ``wait_for_ready`` is replaced, and the processes that end
        if a rank has not proven itself. The ranks of a controller end with it.
    """
    stock_wait = init_result.wait_for_ready

    def wait_for_ready() -> None:
        stock_wait()
        infos = init_result.scheduler_infos
        ranks = [rank for info in infos for rank in info.get(RANKS, [info])]
        reported = [rank.get("lethe") for rank in ranks]
        try:
            if len(ranks) < replicas or any(report != request.request_id for report in reported):
                raise RuntimeError(
                    f"--kv-evict: a scheduler started without eviction (ranks reported {reported}, expected "
                    f"{request.request_id} of each of {max(replicas, len(ranks))}); check SGLANG_PLUGINS and the "
                    "plugin errors in the log"
                )
            for rank in () if request.measures else ranks:
                guard.check_pool(request.config, page_size, rank["max_total_num_tokens"])
        except (ConfigError, RuntimeError) as error:
            for process in processes or ():
                process.kill()
            request.fail(error)
        for info in infos:
            info.pop(RANKS, None)
            info["lethe"] = request.request_id

    init_result.wait_for_ready = wait_for_ready
