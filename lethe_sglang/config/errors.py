"""How pydantic's findings become lines that a user can act on."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lethe_sglang.config.replaced import replaced_key, replaced_value
from lethe_sglang.errors import show

_FIELDS = "__pydantic_fields__"
"""Where both models and dataclasses of pydantic list their options."""

_NOUNS = {int: "an integer", float: "a number", str: "a non-empty string", bool: "true or false", dict: "a mapping"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_PLURALS = {int: "integers", float: "numbers", str: "strings", bool: "true or false values", dict: "mappings"}

KnownKeys = Mapping[str, Sequence[str]]
"""Section path -> the keys it may hold; the top level is the empty path."""


def fields_of(model: type[Any]) -> Mapping[str, FieldInfo]:
    """Return the options of a section: a pydantic model, or a policy, which is a pydantic dataclass."""
    fields: Mapping[str, FieldInfo] = getattr(model, _FIELDS)
    return fields


def known_keys(model: type[BaseModel], **sections: type[Any]) -> dict[str, tuple[str, ...]]:
    """List the keys of ``model`` (under the empty path), of each section in it, and of further ``sections``."""
    known = {"": (*fields_of(model), *sections)}
    own: dict[str, Any] = {name: field.annotation for name, field in fields_of(model).items()}
    return known | {name: tuple(fields_of(kind)) for name, kind in (own | sections).items() if hasattr(kind, _FIELDS)}


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
    return f"{start}; {section or 'the top level'} knows {', '.join(own) or 'no options'}"


def explain(error: ValidationError, model: type[Any], section: str = "", known: KnownKeys | None = None) -> list[str]:
    """Turn every finding of pydantic into one line: dotted path, given value, legal range.

    Parameters
    ----------
    error
        What pydantic found wrong.
    model
        What was built: a pydantic model or dataclass.
    section
        Dotted path of ``model`` itself, empty for the top level.
    known
        The keys of every section, to say where an unknown one belongs; None takes those of ``model``.
    """
    findings = error.errors(include_url=False)
    inside = {finding["loc"][:end] for finding in findings for end in range(len(finding["loc"]))}
    known = known_keys(model) if known is None else known
    problems = []
    for finding in findings:
        loc, given = finding["loc"], finding["input"]
        path, home = (_path((section, *part) if section else part) for part in (loc, loc[:-1]))
        if finding["type"] in ("value_error", "assertion_error"):
            text = str(finding["ctx"]["error"])
            start = f"{path}: got {show(given)}, " if loc else f"{path}: "
            problems.append(text if text.startswith(path) else start + text)
        elif finding["type"] in ("extra_forbidden", "invalid_key", "unexpected_keyword_argument"):
            problems += replaced_key(path, given) or [unknown_key(home, str(loc[-1]), known)]
        elif loc not in inside:
            legal = _legal_at(loc, model)
            expected = f"expected {legal}" if legal else finding["msg"][:1].lower() + finding["msg"][1:]
            problems.append(f"{path}: got {show(given)}, {replaced_value(path, given) or expected}")
    return problems


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, part)
    return path


def _legal_at(loc: tuple[int | str, ...], model: type[Any]) -> str:
    """Legal values of the option at ``loc``, read off the schema; empty if its type is not one of ours."""
    annotation: Any = model
    metadata: list[Any] = []
    for part in loc:
        if isinstance(part, int) and get_origin(_optional(annotation)[0]) is tuple:
            annotation, metadata = _item(annotation)
        elif hasattr(annotation, _FIELDS) and part in fields_of(annotation):
            field = fields_of(annotation)[str(part)]
            annotation, metadata = field.annotation, field.metadata
        else:
            return ""
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
        return "one of " + ", ".join(map(str, get_args(annotation))) + end
    if get_origin(annotation) is tuple:
        item, marks = _item(annotation)
        plural = _PLURALS.get(get_origin(item) or item)
        return f"a list of one or more {plural}{_bounds(marks)}{end}" if plural else ""
    if hasattr(annotation, _FIELDS):
        return f"a mapping with keys among {', '.join(fields_of(annotation))}"
    name = _NOUNS.get(get_origin(annotation) or annotation)
    return f"{name}{_bounds(metadata)}{end}" if name else ""


def _bounds(metadata: Sequence[Any]) -> str:
    parts = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _BOUNDS.items() if hasattr(m, name)]
    return " " + " and ".join(parts) if parts else ""
