"""The verb ``/kv_evict``: a live server says how it evicts, and takes a new configuration.

One message goes from the front (the HTTP server's process, or that of ``sgl.Engine``) to the scheduler, which SGLang
broadcasts to all tensor-parallel ranks like its own control requests; rank 0 answers. SGLang's ``set_internal_state``
does not do: its message is typed to hold numbers only, and the answer is a bare yes or no.

    front: options over the configuration, layers' budgets  ->  every rank: check, apply  ->  front: take it over

Data-parallel replicas get the message from SGLang's controller, and each answers. Their queues differ, so one could
take a change that another refuses. So with several of them all are asked first, and only if all agree all are told;
meanwhile no new request passes the front, so who is idle stays so (:func:`_on_all`).
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types
from sglang.srt.runtime_context import get_parallel
from sglang.utils import TypeBasedDispatcher

from lethe_sglang.config import from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.config.loading import parse_json
from lethe_sglang.engine import doors, entrypoints, guard, reach, replies
from lethe_sglang.engine.monitor import Probe
from lethe_sglang.engine.reconfigure import change, idle_options, unfinished
from lethe_sglang.engine.runtime import Runtime, current
from lethe_sglang.engine.telemetry import replica
from lethe_sglang.errors import ConfigError, one_line, show
from lethe_sglang.observers.measure import Measurer
from lethe_sglang.profiling.settle import settle

PATH = "/kv_evict"


class KvEvictReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """To every rank: what to do (a key of ``ACTIONS``), and its arguments."""

    action: str
    arguments: dict[str, Any]


class KvEvictReqOutput(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """From rank 0 of a replica: which one it is, and the answer or the one line that says why not."""

    replica: int
    error: str | None
    answer: dict[str, Any]


hook_custom_types(KvEvictReq, KvEvictReqOutput)


# -- scheduler --------------------------------------------------------------------------------------------------------


def _check(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    runtime.monitor.settle(scheduler)
    config, budgets = from_mapping(arguments["config"]), tuple(arguments["budgets"])
    return {"changed": change(runtime, config, budgets, unfinished(scheduler))}


def _reconfigure(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    runtime.monitor.settle(scheduler)  # a prefill that nobody has sent is no reason to refuse
    config, budgets = from_mapping(arguments["config"]), tuple(arguments["budgets"])
    try:
        found = runtime.reconfigure(config, budgets, unfinished(scheduler))
    except ConfigError as error:
        if arguments["agreed"]:  # the other replicas have it by now: they would not evict alike
            raise RuntimeError(f"a replica refused a change to which it had agreed: {error}") from error
        raise
    if found["changed"]:
        reach.warn(runtime)
    return found


def _requests(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return runtime.counters.records_after(arguments["after"][replica()])


def _measured(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    measurer = next((o for o in runtime.observers if isinstance(o, Measurer)), None)
    if measurer is None:
        raise ConfigError("kv_evict: the server does not measure")
    return {"measured": measurer.reports(runtime.ranks.mean), "statistics_bytes": measurer.bytes}


ACTIONS: dict[str, Callable[[Runtime, Any, dict[str, Any]], dict[str, Any]]] = {
    "check": _check,
    "reconfigure": _reconfigure,
    "requests": _requests,
    "measured": _measured,
}


def answer(scheduler: Any, request: KvEvictReq) -> KvEvictReqOutput:
    """Carry out a message on this rank."""
    try:
        found = ACTIONS[request.action](current(), scheduler, request.arguments)
    except ConfigError as error:
        return KvEvictReqOutput(replica=replica(), error=str(error), answer={})
    return KvEvictReqOutput(replica=replica(), error=None, answer=found)


def listen(result: None, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_request_dispatcher``: the scheduler understands the message, and that of a probe."""
    pairs = [(KvEvictReq, answer), (Probe, current().monitor.accept)]
    pairs = [(kind, functools.partial(handler, scheduler)) for kind, handler in pairs]
    scheduler._request_dispatcher += TypeBasedDispatcher(pairs)


# -- front ------------------------------------------------------------------------------------------------------------


async def ask(manager: Any, action: str, **arguments: Any) -> list[dict[str, Any]]:
    """Send a message from the front and return the answers of all data-parallel replicas, in their order.

    Raises
    ------
    ConfigError
        If one refuses; where there are several, with its number.
    """
    manager.auto_create_handle_loop()
    replies = await _channel(manager)(KvEvictReq(action=action, arguments=arguments))
    replies.sort(key=lambda reply: reply.replica)
    refused = [reply for reply in replies if reply.error is not None]
    if refused:
        several = len(replies) > 1
        raise one_line([f"dp_rank {r.replica}: {r.error}" if several else r.error for r in refused])
    return [reply.answer for reply in replies]


def _channel(manager: Any) -> Any:
    """Return the manager's line to the schedulers, laid at its first use; each replica answers."""
    if not hasattr(manager, "_lethe_channel"):
        manager._lethe_channel = FanOutCommunicator(manager._dispatch_to_scheduler, get_parallel().num_dp_ranks)
        manager._lethe_lock = asyncio.Lock()
        pairs = [(KvEvictReqOutput, manager._lethe_channel.handle_recv)]
        manager._result_dispatcher += TypeBasedDispatcher(pairs)
    return manager._lethe_channel


async def reconfigure(manager: Any, options: Any) -> dict[str, Any]:
    """Give a live server a new configuration.

    Parameters
    ----------
    manager
        SGLang's tokenizer manager.
    options
        A mapping of options, laid over the running configuration section by section.

    Returns
    -------
    dict
        ``changed``: dotted key -> old and new value; ``effective``: ``now`` or ``next round``; ``configuration``.

    Raises
    ------
    ConfigError
        If the options are not legal or cannot be taken over now; then nothing has changed.
    """
    _channel(manager)
    async with manager._lethe_lock:  # each is laid over what the one before has left
        request = _request(manager)
        config = reconfigured(request.config, options)
        guard.check_defaults(manager.preferred_sampling_params, config, manager.context_len)
        assert request.model is not None, "the launcher takes it"
        budgets = await asyncio.to_thread(settle, config, request.model, _refuse)  # a profile's lock may be held
        plain = config.model_dump(mode="json", exclude_unset=True)
        found = await _on_all(manager, {"config": plain, "budgets": list(budgets)})
        manager.server_args._lethe = replace(request, config=config, budgets=budgets)
    return {**found, "configuration": configuration(manager)}


async def _on_all(manager: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Let every replica take a change, or none."""
    if get_parallel().num_dp_ranks == 1:
        (alone,) = await ask(manager, "reconfigure", **asked, agreed=False)
        return alone
    async with manager.is_pause_cond:  # who comes waits here, as while SGLang changes weights of a paused server
        changed = (await ask(manager, "check", **asked))[0]["changed"]
        if idle_options(changed) and await manager.model_update_lock.is_locked():  # every request reads under it
            raise ConfigError(
                f"kv_evict: {', '.join(idle_options(changed))}: changes on an idle server only, and a request is on "
                "its way; wait until it is done, or abort it (POST /abort_request with abort_all: true)"
            )
        found = await ask(manager, "reconfigure", **asked, agreed=True)
    later = any(each["effective"] != "now" for each in found)
    return {"changed": found[0]["changed"], "effective": "next round" if later else "now"}


async def records(manager: Any, after: Sequence[int]) -> dict[str, Any]:
    """Return what requests have held (``Counters.records_after``).

    Parameters
    ----------
    manager
        SGLang's tokenizer manager.
    after
        Number of a record, or one for each data-parallel replica; ``[0]`` stands for all records.

    Returns
    -------
    dict
        ``requests`` and ``newest``. Of several replicas each record has its ``dp_rank``, and ``newest`` is a list.

    Raises
    ------
    ConfigError
        If there is another number of them than of replicas.
    """
    replicas = get_parallel().num_dp_ranks
    if len(after) != replicas and list(after) != [0]:
        raise ConfigError(
            f"kv_evict: after: got {show(list(after))}, expected {replicas} numbers of records, one for each dp_rank "
            "in its order, or 0 for all"
        )
    found = await ask(manager, "requests", after=list(after) if len(after) == replicas else [0] * replicas)
    if replicas == 1:
        return found[0]
    told = [{**record, "dp_rank": rank} for rank, part in enumerate(found) for record in part["requests"]]
    return {"requests": told, "newest": [part["newest"] for part in found]}


def _refuse(path: Any) -> None:
    raise ConfigError("budget.profile auto: there is no profile of this model yet; make one with lethe profile")


def configuration(manager: Any) -> dict[str, Any]:
    """Return the running configuration, every option, as the front knows it."""
    return _request(manager).config.model_dump(mode="json")


def _request(manager: Any) -> entrypoints.EvictionRequest:
    request = entrypoints.requested(manager.server_args)
    if request is None:
        raise ConfigError("kv_evict: this server runs without eviction; start it with --kv-evict")
    return request


# -- HTTP -------------------------------------------------------------------------------------------------------------


def add_routes(app: Any, manager: Callable[[], Any]) -> None:
    """Add ``/kv_evict`` to SGLang's HTTP server, authorised as its other control requests.

    Parameters
    ----------
    app
        SGLang's FastAPI application.
    manager
        Returns the tokenizer manager; the application exists before it does.
    """
    from sglang.srt.utils.auth import AuthLevel, auth_level
    from starlette.responses import JSONResponse

    async def tell(request: Any) -> dict[str, Any]:
        return {"configuration": configuration(manager())}

    async def take(request: Any) -> dict[str, Any]:
        try:
            text = (await request.body()).decode()
        except UnicodeDecodeError:
            raise ConfigError("kv_evict: the body is not UTF-8; send a JSON mapping of options") from None
        return await reconfigure(manager(), parse_json(text, "kv_evict"))

    async def requests(request: Any) -> dict[str, Any]:
        after = request.query_params.get("after", "0")
        if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18}){0,999}", after):
            raise ConfigError(f"kv_evict: after: got {show(after)}, expected the number of a record, or 0 for all")
        return await records(manager(), [int(number) for number in after.split(",")])

    def endpoint(function: Callable[[Any], Any]) -> Any:
        async def respond(request: Any) -> Any:
            try:
                return JSONResponse(await function(request))
            except ConfigError as error:
                return JSONResponse({"error": {"message": str(error)}}, status_code=400)

        return auth_level(AuthLevel.ADMIN_OPTIONAL)(respond)

    app.add_route(PATH, endpoint(tell), methods=["GET"])
    app.add_route(PATH, endpoint(take), methods=["POST"])
    app.add_route(f"{PATH}/requests", endpoint(requests), methods=["GET"])


# -- sgl.Engine -------------------------------------------------------------------------------------------------------


def engine_reconfigure(engine: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_reconfigure``: see :func:`reconfigure`."""
    found: dict[str, Any] = engine.loop.run_until_complete(reconfigure(engine.tokenizer_manager, options))
    return found


def engine_configuration(engine: Any) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_configuration``: what the engine runs."""
    return configuration(engine.tokenizer_manager)


def engine_requests(engine: Any, after: int | Sequence[int] = 0) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_requests``: see :func:`records`."""
    numbers = [int(number) for number in (after if isinstance(after, Sequence) else [after])]
    found: dict[str, Any] = engine.loop.run_until_complete(records(engine.tokenizer_manager, numbers))
    return found


def engine_measured(engine: Any) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_measured``, for ``lethe profile``: see ``Measurer.reports``."""
    found: list[dict[str, Any]] = engine.loop.run_until_complete(ask(engine.tokenizer_manager, "measured"))
    return found[0]


def open_doors(engine_class: Any) -> None:
    """Offer the verb in this process, in which eviction has been asked for: on ``sgl.Engine`` and, if it runs, HTTP.

    HTTP routes hear what each request asks for from now on, too.
    """
    engine_class.kv_evict_reconfigure = engine_reconfigure
    engine_class.kv_evict_configuration = engine_configuration
    engine_class.kv_evict_requests = engine_requests
    engine_class.kv_evict_measured = engine_measured
    http = sys.modules.get("sglang.srt.entrypoints.http_server")
    if http is not None:
        add_routes(http.app, lambda: http.get_global_state().tokenizer_manager)
        doors.open_to(http.app, lambda: http.get_global_state().tokenizer_manager)
        replies.widen_usage()
