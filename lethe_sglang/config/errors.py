"""The one error of this package, and how pydantic's findings become lines that a user can act on."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

SHOWN_VALUE = 60
"""Longest rendering of a rejected value in a message, in characters."""

_NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
_PLURALS = {int: "integers", float: "numbers", str: "strings", bool: "true or false values", dict: "mappings"}

KnownKeys = Mapping[str, Sequence[str]]
"""Section path -> the keys it may hold; the top level is the empty path."""


class ConfigError(ValueError):
    """A configuration or a request's override that cannot be used; the message is one line and names the option."""


def one_line(problems: Iterable[str]) -> ConfigError:
    """Join ``problems`` into a single error whose message has no line break."""
    return ConfigError(" ".join("; ".join(problems).split()))


def show(value: object) -> str:
    """Render a rejected value as it would be written in JSON, shortened to ``SHOWN_VALUE`` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def known_keys(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """List the keys of ``model`` (under the empty path) and of each section in it."""
    known = {"": tuple(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            known[name] = tuple(field.annotation.model_fields)
    return known


def unknown_key(section: str, key: str, known: KnownKeys) -> str:
    """Say that ``key`` does not exist in ``section``, and which option was probably meant.

    Parameters
    ----------
    section
        Dotted path of the section, empty for the top level.
    key
        The key as it was written.
    known
        The keys of every section.

    Returns
    -------
    str
        One line: the section that owns a key of this very name, else the nearest key of this section, else the nearest
        key of another, else the keys that the section has. A dotted path in place of nested keys is pointed out.
    """
    own = known.get(section, ())
    elsewhere = {_join(other, name): name for other, names in known.items() if other != section for name in names}
    owners = [path for path, name in elsewhere.items() if name == key.lower()]
    start = f"{_join(section, key)}: unknown key"
    if key in elsewhere and "." in key:
        home, _, name = key.partition(".")
        return f"{start}; options are nested, write {home}: {{{name}: ...}}"
    if owners:
        home = owners[0].rpartition(".")[0]
        return f"{start}; {owners[0]} belongs {f'in section {home}' if home else 'at the top level'}"
    if near := difflib.get_close_matches(key.lower(), own, n=1):
        return f"{start}; did you mean {_join(section, near[0])}?"
    if near := difflib.get_close_matches(key.lower(), elsewhere.values(), n=1):
        path = next(path for path, name in elsewhere.items() if name == near[0])
        return f"{start}; did you mean {path}?"
    return f"{start}; {section or 'the top level'} knows {', '.join(own)}"


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Turn every finding of pydantic into one line: dotted path, given value, legal range."""
    findings = error.errors(include_url=False)
    inside = {finding["loc"][:end] for finding in findings for end in range(len(finding["loc"]))}
    known = known_keys(model)
    problems = []
    for finding in findings:
        loc = finding["loc"]
        if finding["type"] == "value_error":
            problems.append(str(finding["ctx"]["error"]))
        elif finding["type"] in ("extra_forbidden", "invalid_key"):
            problems.append(unknown_key(_path(loc[:-1]), str(loc[-1]), known))
        elif loc not in inside:
            problems.append(f"{_path(loc)}: got {show(finding['input'])}, expected {_legal_at(loc, model)}")
    return problems


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, part)
    return path


def _legal_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Legal values of the option at ``loc``, read off the schema."""
    field = model.model_fields[str(loc[0])]
    annotation: Any = field.annotation
    metadata: list[Any] = field.metadata
    for part in loc[1:]:
        if isinstance(part, int):
            annotation, metadata = _item(annotation)
        else:
            field = annotation.model_fields[part]
            annotation, metadata = field.annotation, field.metadata
    return _legal(annotation, metadata)


def _item(annotation: Any) -> tuple[Any, list[Any]]:
    """Type and constraints of the items of a ``tuple[Annotated[T, Field(...)], ...] | None``."""
    sequence, _ = _optional(annotation)
    item = get_args(sequence)[0]
    if get_origin(item) is not Annotated:
        return item, []
    inner, *extras = get_args(item)
    return inner, [mark for extra in extras for mark in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]


def _optional(annotation: Any) -> tuple[Any, bool]:
    """Split ``T | None`` into T and whether null is legal."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    inner = [option for option in get_args(annotation) if option is not type(None)]
    return inner[0], len(inner) < len(get_args(annotation))


def _legal(annotation: Any, metadata: Sequence[Any]) -> str:
    annotation, nullable = _optional(annotation)
    end = " (or null)" if nullable else ""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation)) + end
    if get_origin(annotation) is tuple:
        item, marks = _item(annotation)
        return f"a list of one or more {_PLURALS[get_origin(item) or item]}{_bounds(marks)}{end}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with keys among {', '.join(annotation.model_fields)}"
    name = "a non-empty string" if annotation is str else _NOUNS[get_origin(annotation) or annotation]
    return f"{name}{_bounds(metadata)}{end}"


def _bounds(metadata: Sequence[Any]) -> str:
    parts = []
    for mark in metadata:
        match mark:
            case annotated_types.Gt(gt=bound):
                parts.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                parts.append(f">= {bound}")
            case annotated_types.Lt(lt=bound):
                parts.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                parts.append(f"<= {bound}")
    return " " + " and ".join(parts) if parts else ""
