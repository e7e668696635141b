"""What one request may change for itself: ``custom_params.kv_evict`` of the OpenAI and the native API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from lethe_sglang.config.errors import unknown_key
from lethe_sglang.config.schema import EvictionConfig
from lethe_sglang.errors import SHOWN_VALUE, one_line, show

_PATH = "custom_params.kv_evict"
_KEYS = ("mode", "budget")
_NAMED = 3
"""Most unknown keys that a message names: it may be of any length what somebody sends."""


@dataclass(frozen=True, kw_only=True)
class RequestOverride:
    """How one request is treated.

    Attributes
    ----------
    mode
        ``on``: it is pruned by the server's policy. ``none``: its whole cache is kept and ``budget`` means nothing.
    budget
        Mean tokens kept per layer after a round, recent window included, the kept prompt not. The recent window stays
        the server's, so K of this request is ``budget - config.recent``.
    own
        Whether the request asked for ``budget``; otherwise it is the server's.
    """

    mode: Literal["on", "none"]
    budget: int
    own: bool = field(default=False, compare=False, repr=False)

    def under(self, config: EvictionConfig) -> RequestOverride:
        """Return it under another configuration than the one it was read with.

        A request that asked for a budget keeps it, or gets the nearest that is legal now; others get the server's.
        Mode none stays, also where new requests may not ask for it any more.
        """
        if not self.own:
            return replace(self, budget=config.budget.tokens)
        largest = max(config.max_request_budget, config.budget.tokens)
        return replace(self, budget=min(max(self.budget, config.min_request_budget), largest))


def parse_request(
    custom_params: Mapping[str, Any] | None, config: EvictionConfig, context_length: int | None = None
) -> RequestOverride:
    """Read the override in a request's ``custom_params``.

    Other keys of ``custom_params`` than ``kv_evict`` belong to others and are not looked at. Null counts as left out,
    and what is left out is the server's default.

    Parameters
    ----------
    custom_params
        The request's ``custom_params``, or None.
    config, context_length
        As for :func:`parse_override`.

    Raises
    ------
    ConfigError
        With one line that names the option, the value given and the legal range; the server answers HTTP 400 with it.

    Examples
    --------
    >>> parse_request({"kv_evict": {"budget": 2048}}, EvictionConfig(), 32768)
    RequestOverride(mode='on', budget=2048)
    """
    if custom_params is not None and not isinstance(custom_params, Mapping):
        raise one_line([f"custom_params: got {show(custom_params)}, expected a mapping or null"])
    return parse_override((custom_params or {}).get("kv_evict"), config, context_length)


def parse_override(
    asked: Any, config: EvictionConfig, context_length: int | None = None, where: str = _PATH
) -> RequestOverride:
    """Read an override, wherever a request has put it.

    Accepted are ``{"mode": "on" | "none", "budget": N}`` with either key left out, and the short forms ``"on"`` and
    ``"none"``.

    Parameters
    ----------
    asked
        What the request says; None is the server's default.
    config
        The server's configuration: it bounds the budget and says whether mode none is allowed.
    context_length
        The model's context length in tokens, if known. No request may ask for more: such a budget would never evict.
        The server's own budget is legal even when it is larger.
    where
        What errors call the place.

    Raises
    ------
    ConfigError
        As for :func:`parse_request`.
    """
    default = RequestOverride(mode="on", budget=config.budget.tokens)
    if asked is None:
        return default
    if isinstance(asked, str):
        asked = {"mode": asked}
    if not isinstance(asked, Mapping):
        raise one_line(
            [f'{where}: got {show(asked)}, expected "on", "none" or a mapping such as {{"budget": {default.budget}}}']
        )

    mode, budget = asked.get("mode"), asked.get("budget")
    unknown = (str(key)[:SHOWN_VALUE] for key in asked if key not in _KEYS)
    problems = [unknown_key(where, key, {where: _KEYS}) for key in islice(unknown, _NAMED)]
    if mode not in (None, "on", "none"):
        problems.append(f'{where}.mode: got {show(mode)}, expected "on" or "none"')
    elif mode == "none":
        if not config.requests.allow_off:
            problems.append(f'{where}.mode: got "none", which this server forbids (requests.allow_off); expected "on"')
        if budget is not None:
            problems.append(f'{where}.budget: got {show(budget)} together with mode "none"; leave one of them out')
    elif budget is not None:
        smallest, largest = config.min_request_budget, config.max_request_budget
        if context_length is not None:
            largest = max(config.budget.tokens, min(largest, context_length))
        if type(budget) is not int or not smallest <= budget <= largest:
            legal = f"an integer from {smallest} to {largest} tokens"
            problems.append(f"{where}.budget: got {show(budget)}, expected {legal}")
    if problems:
        raise one_line(problems)
    if mode == "none":
        return RequestOverride(mode="none", budget=default.budget)
    return default if budget is None else RequestOverride(mode="on", budget=budget, own=True)
