"""Find a configuration (preset, file or inline JSON), read it, lay the command line's flags over it, check it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lethe_sglang.config.errors import explain, known_keys
from lethe_sglang.config.policy_section import choose, laid_over
from lethe_sglang.config.schema import EvictionConfig
from lethe_sglang.errors import ConfigError, one_line, show

_PACKAGE = Path(__file__).resolve().parents[1]
_PRESET_FOLDERS = (_PACKAGE / "presets", _PACKAGE.parent / "configs")
"""Where presets lie: in an installed wheel, else in a checkout."""


def presets() -> dict[str, Path]:
    """Return the named presets: name -> file, in the order of their names."""
    for folder in _PRESET_FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def resolve(
    policy: str | None = None, source: str | None = None, budget: int | None = None, profile: str | None = None
) -> EvictionConfig:
    """Return the configuration that the four flags ask for.

    Parameters
    ----------
    policy
        ``--kv-evict``: beats the file's ``policy``, whose section then goes. None keeps the file's.
    source
        ``--kv-evict-config``: the name of a preset, the path of a YAML or JSON file, or JSON text that starts with
        ``{``. A preset's name wins over a file of the same name; write ``./name`` for the file. None is the schema's
        defaults.
    budget
        ``--kv-evict-budget``: tokens, beats the file's ``budget.tokens``. None keeps the file's.
    profile
        ``--kv-evict-profile``: beats the file's ``budget.profile``, and asks for ``budget.allocation: profile`` where
        the file names no allocation; none turns allocation profile into uniform. None keeps the file's.

    Raises
    ------
    ConfigError
        With one line that names every option at fault, the value given and what is legal.

    Examples
    --------
    >>> resolve("h2o", '{"rounds": {"interval": 64}}', 512).rounds.interval
    64
    """
    given = {"-config": source and _name(source), "": policy, "-budget": budget, "-profile": profile}
    where = " ".join(f"--kv-evict{end} {value}" for end, value in given.items() if value is not None)
    data = {} if source is None else _read(source)
    if policy is not None:
        data = laid_over(data, {"policy": policy})
    section = data.get("budget", {})
    if isinstance(section, Mapping):
        if budget is not None and section.get("allocation") == "list":
            problem = "not usable with budget.allocation list, where budget.layers fixes the tokens of every layer"
            remedy = "change budget.layers, or set budget.allocation to uniform"
            raise one_line([f"--kv-evict-budget {budget}: {problem}", remedy])
        if budget is not None:
            data["budget"] = section = {**section, "tokens": budget}
        if profile is not None:
            data["budget"] = _with_profile(section, profile)
    config = from_mapping(data, where)
    if profile not in (None, "none") and not config.budget.reads_profile:
        problem = f"--kv-evict-profile {profile}: not read by budget.allocation {config.budget.allocation}"
        raise one_line([problem, "set budget.allocation to profile, or leave the flag out"])
    return config


def _with_profile(section: Mapping[Any, Any], profile: str) -> dict[Any, Any]:
    """Lay ``--kv-evict-profile`` over a budget section: none gives all layers alike, all else asks for a profile."""
    if profile == "none" and section.get("allocation") == "profile":
        return {**section, "allocation": "uniform", "profile": profile}
    return {**({} if profile == "none" else {"allocation": "profile"}), **section, "profile": profile}


def from_mapping(data: Mapping[str, Any], where: str = "") -> EvictionConfig:
    """Check ``data``, the content of a configuration file, and return it as an object.

    Parameters
    ----------
    data
        Sections and options; what is missing takes the schema's default.
    where
        Put before the message of an error: the file or the flags that ``data`` came from.

    Raises
    ------
    ConfigError
        With one line that holds every problem found.
    """
    try:
        return EvictionConfig.model_validate(dict(data))
    except ValidationError as error:
        known = known_keys(EvictionConfig, **choose(data, known_keys(EvictionConfig)).sections)
        message = "; ".join(explain(error, EvictionConfig, known=known))
        raise one_line([f"{where}: {message}" if where else message]) from None


def _name(source: str) -> str:
    """Return what errors call ``source``: JSON text is not repeated."""
    return "JSON text" if source.lstrip().startswith("{") else source


def _read(source: str) -> dict[Any, Any]:
    """Read ``source`` into a new mapping, without checking its keys."""
    label = f"--kv-evict-config {_name(source)}"
    if _name(source) != source:
        data = parse_json(source, label)
    else:
        path = presets().get(source, Path(source))
        with _reading(label):
            text = path.read_text(encoding="utf-8")
        data = parse_json(text, label) if path.suffix == ".json" else parse_yaml(text, label)
    if not isinstance(data, dict):
        given = "nothing" if data is None else show(data)
        raise one_line([f"{label}: holds {given}, expected a mapping of sections such as 'budget:'"])
    return dict(data)


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Turn whatever keeps a text from being read into one line that begins with the text's ``label``."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        match error:
            case FileNotFoundError():
                names = ", ".join(presets()) or "none installed"
                problem = f"no such file, and no preset of that name (presets: {names})"
            case OSError():
                problem = f"cannot be read: {error.strerror}"
            case UnicodeError():
                problem = f"cannot be read: {error}"
            case json.JSONDecodeError():
                problem = f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            case yaml.MarkedYAMLError(problem_mark=mark):
                place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
                problem = f"not YAML{place}: {error.problem}"
            case yaml.YAMLError():
                problem = f"not YAML: {error}"
            case RecursionError():
                problem = "nested too deeply"
            case ValueError():
                problem = f"holds a value that cannot be read: {error}"
            case _:
                raise
        raise one_line([f"{label}: {problem}"]) from None


def parse_json(text: str, label: str) -> Any:
    """Parse JSON text; ``label`` names it in the one-line ``ConfigError`` of text that is not JSON."""
    with _reading(label):
        return json.loads(text, object_pairs_hook=lambda pairs: _no_repeats(pairs, label))


def parse_yaml(text: str, label: str) -> Any:
    """Parse YAML text; ``label`` names it in the one-line ``ConfigError`` of text that is not YAML."""
    with _reading(label):
        return yaml.load(text, Loader=_Loader)


def write_yaml(data: Any, width: int) -> str:
    """Write ``data`` as YAML, every list on a line and broken after ``width`` columns."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=width)


def _no_repeats(pairs: Iterable[tuple[str, Any]], label: str) -> dict[str, Any]:
    """Build a JSON object, refusing a key that appears twice: the last one would silently win."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise one_line([f"{label}: key {show(key)} is given twice in one mapping"])
        result[key] = value
    return result


class _Loader(yaml.SafeLoader):
    """The safe loader of YAML, which also refuses a key that appears twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping from ``node``."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {show(key.value)} is given twice in one mapping", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe writer of YAML, with lists on one line and without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists out."""
        return True


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)
