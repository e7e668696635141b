"""What a reply says of its own eviction: ``meta_info.kv_evict``, and ``usage.kv_evict`` in the OpenAI API.

    scheduler: an account beside the last output of a request  ->  detokenizer, which passes it on
    ->  front: into ``meta_info``  ->  OpenAI's routes: into ``usage``

SGLang lets a subclass of its output streamer add a value per request to what it sends, and carries it to the front.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from lethe_sglang.cache.layout import page_ceil
from lethe_sglang.engine.counters import lives
from lethe_sglang.engine.runtime import Runtime, current

KEY = "kv_evict"


# -- scheduler --------------------------------------------------------------------------------------------------------


def account(runtime: Runtime, req: Any) -> dict[str, Any] | None:
    """Say what happened to a request, over all its retractions; None if it is not evicted from.

    Returns
    -------
    dict
        ``rounds``; ``tokens_evicted``, by all of them (mean over the layers); ``tokens_held`` at its end, in whole
        pages, its prompt included; ``share``: tokens that the last round left a layer on average, the recent window
        included, None if it ended with all that it had.
    """
    if not runtime.evicts(req):
        return None
    followed = [state for state in lives(req) if state is not None]
    last = (lives(req) or [None])[-1]
    length = page_ceil(len(req.origin_input_ids) + len(req.output_ids), runtime.page_size)
    share = None
    if last is not None and last.rounds > 0:
        share = round(sum(last.kept) / runtime.num_layers - last.rest + runtime.config.recent, 1)
    return {
        "rounds": sum(state.rounds for state in followed),
        "tokens_evicted": round(sum(sum(state.evicted) for state in followed) / runtime.num_layers, 1),
        "tokens_held": last.held if last is not None else length,
        "share": share,
    }


class LetheOutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Stock, with the account of every request whose last output it is."""

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """Return the accounts, a value for each of ``reqs``; nothing where no request that is evicted from ends."""
        runtime = current()
        told = [account(runtime, req) if req.finished() else None for req in reqs]
        return {KEY: told} if any(told) else {}


def streamer_class(result: type, scheduler: Any) -> type:
    """AFTER ``Scheduler.get_output_streamer_class``."""
    return LetheOutputStreamer


# -- front ------------------------------------------------------------------------------------------------------------


class Tokens(int):
    """A number of tokens that brings an account along: SGLang makes a stream's usage of nothing but such numbers."""

    account: dict[str, Any]


def into_meta_info(
    original: Any, manager: Any, meta_info: dict[str, Any], state: Any, info: dict[str, Any], index: int, reason: Any
) -> None:
    """AROUND ``TokenizerManager.update_request_meta_info``, which would put the account into a list of tokens."""
    told = info[KEY][index] if KEY in info else None
    original(manager, meta_info, state, {key: values for key, values in info.items() if key != KEY}, index, reason)
    if told is not None:
        meta_info[KEY] = told
        if getattr(state.obj, "stream", False):
            meta_info["completion_tokens"] = Tokens(meta_info["completion_tokens"])
            meta_info["completion_tokens"].account = told


def into_usage(usage: Any, responses: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
    """AFTER ``UsageProcessor.calculate_response_usage``."""
    return _with_accounts(usage, [response["meta_info"].get(KEY) for response in responses])


def into_streamed_usage(
    usage: Any, prompt_tokens: Any, reasoning_tokens: Any, completion_tokens: Any, *args: Any, **kwargs: Any
) -> Any:
    """AFTER ``UsageProcessor.calculate_streaming_usage``."""
    return _with_accounts(usage, [getattr(n, "account", None) for _, n in sorted(completion_tokens.items())])


def _with_accounts(usage: Any, told: list[dict[str, Any] | None]) -> Any:
    """Lay one choice's account into ``usage``, or a list of them in the order of the choices."""
    if any(told):
        usage.kv_evict = told[0] if len(told) == 1 else told
    return usage


def widen_usage() -> None:
    """Let SGLang's ``usage`` hold what it does not declare: it and the responses around it would leave that out."""
    from sglang.srt.entrypoints.openai import protocol

    protocol.UsageInfo.model_config["extra"] = "allow"
    protocol.UsageInfo.model_rebuild(force=True)
    for model in list(vars(protocol).values()):
        if isinstance(model, type) and issubclass(model, BaseModel) and "usage" in model.model_fields:
            model.model_rebuild(force=True)
