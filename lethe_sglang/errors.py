"""The one error for whatever a user has written wrong, and the two helpers that keep its message to one line."""

from __future__ import annotations

import json
from collections.abc import Iterable

SHOWN_VALUE = 60
"""Longest rendering of a rejected value in a message, in characters."""


class ConfigError(ValueError):
    """A configuration or a request's override that cannot be used; the message is one line and names the option."""


def one_line(problems: Iterable[str]) -> ConfigError:
    """Join ``problems`` into a single error whose message has no line break, and nothing that UTF-8 cannot carry."""
    text = " ".join("; ".join(problems).split())
    return ConfigError(text.encode("utf-8", "backslashreplace").decode())


def show(value: object) -> str:
    """Render a rejected value as it would be written in JSON, shortened to ``SHOWN_VALUE`` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
