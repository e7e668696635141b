"""The verb ``/kv_evict``: a live server says how it evicts, and takes a new configuration.

One message goes from the front (the HTTP server's process, or that of ``sgl.Engine``) to the scheduler, which SGLang
broadcasts to all tensor-parallel ranks like its own control requests; rank 0 answers. SGLang's ``set_internal_state``
does not do: its message is typed to hold numbers only, and the answer is a bare yes or no.

    front: options over the configuration, layers' budgets  ->  every rank: check, apply  ->  front: take it over
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types
from sglang.utils import TypeBasedDispatcher

from lethe_sglang.config import from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.config.loading import parse_json
from lethe_sglang.engine import doors, entrypoints, guard, reach, replies
from lethe_sglang.engine.monitor import Probe
from lethe_sglang.engine.reconfigure import unfinished
from lethe_sglang.engine.runtime import Runtime, current
from lethe_sglang.errors import ConfigError, show
from lethe_sglang.observers.measure import Measurer
from lethe_sglang.profiling.settle import settle

PATH = "/kv_evict"


class KvEvictReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """To every rank: what to do (a key of ``ACTIONS``), and its arguments."""

    action: str
    arguments: dict[str, Any]


class KvEvictReqOutput(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """From rank 0: the answer, or the one line that says why not."""

    error: str | None
    answer: dict[str, Any]


hook_custom_types(KvEvictReq, KvEvictReqOutput)


# -- scheduler --------------------------------------------------------------------------------------------------------


def _reconfigure(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    config, budgets = from_mapping(arguments["config"]), tuple(arguments["budgets"])
    found = runtime.reconfigure(config, budgets, unfinished(scheduler))
    if found["changed"]:
        reach.warn(runtime)
    return found


def _requests(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return runtime.counters.records_after(arguments["after"])


def _measured(runtime: Runtime, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    measurer = next((o for o in runtime.observers if isinstance(o, Measurer)), None)
    if measurer is None:
        raise ConfigError("kv_evict: the server does not measure")
    return {"measured": measurer.reports(runtime.ranks.mean), "statistics_bytes": measurer.bytes}


ACTIONS: dict[str, Callable[[Runtime, Any, dict[str, Any]], dict[str, Any]]] = {
    "reconfigure": _reconfigure,
    "requests": _requests,
    "measured": _measured,
}


def answer(scheduler: Any, request: KvEvictReq) -> KvEvictReqOutput:
    """Carry out a message on this rank."""
    try:
        found = ACTIONS[request.action](current(), scheduler, request.arguments)
    except ConfigError as error:
        return KvEvictReqOutput(error=str(error), answer={})
    return KvEvictReqOutput(error=None, answer=found)


def listen(result: None, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_request_dispatcher``: the scheduler understands the message, and that of a probe."""
    pairs = [(KvEvictReq, answer), (Probe, current().monitor.accept)]
    pairs = [(kind, functools.partial(handler, scheduler)) for kind, handler in pairs]
    scheduler._request_dispatcher += TypeBasedDispatcher(pairs)


# -- front ------------------------------------------------------------------------------------------------------------


async def call(manager: Any, action: str, **arguments: Any) -> dict[str, Any]:
    """Send a message from the front and return the answer.

    Raises
    ------
    ConfigError
        If the scheduler refuses.
    """
    manager.auto_create_handle_loop()
    (reply,) = await _channel(manager)(KvEvictReq(action=action, arguments=arguments))
    if reply.error is not None:
        raise ConfigError(reply.error)
    found: dict[str, Any] = reply.answer
    return found


def _channel(manager: Any) -> Any:
    """Return the manager's line to the scheduler, laid at its first use. One answers: data parallelism is refused."""
    if not hasattr(manager, "_lethe_channel"):
        manager._lethe_channel = FanOutCommunicator(manager._dispatch_to_scheduler, 1)
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
        found = await call(manager, "reconfigure", config=plain, budgets=list(budgets))
        manager.server_args._lethe = replace(request, config=config, budgets=budgets)
    return {**found, "configuration": configuration(manager)}


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
        if not re.fullmatch(r"[0-9]{1,18}", after):
            raise ConfigError(f"kv_evict: after: got {show(after)}, expected the number of a record, or 0 for all")
        return await call(manager(), "requests", after=int(after))

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


def engine_requests(engine: Any, after: int = 0) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_requests``: see ``Counters.records_after``."""
    found: dict[str, Any] = engine.loop.run_until_complete(call(engine.tokenizer_manager, "requests", after=int(after)))
    return found


def engine_measured(engine: Any) -> dict[str, Any]:
    """Become ``sgl.Engine.kv_evict_measured``, for ``lethe profile``: see ``Measurer.reports``."""
    found: dict[str, Any] = engine.loop.run_until_complete(call(engine.tokenizer_manager, "measured"))
    return found


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
