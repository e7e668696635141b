"""An experiment's YAML file: read, checked with messages that name key and legal value, compared with an older one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lethe_bench.accuracy.experiment import (
    ArmConfig,
    BudgetPoint,
    Experiment,
    GridConfig,
    SamplingConfig,
    ServerConfig,
    TaskConfig,
)
from lethe_sglang.config import ConfigError
from lethe_sglang.config.errors import unknown_key
from lethe_sglang.config.loading import parse_yaml
from lethe_sglang.errors import one_line, show


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment from a YAML file.

    Parameters
    ----------
    path
        The file.
    changes
        Top-level keys that replace those of the file.

    Raises
    ------
    ConfigError
        With one line that holds every problem found.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of an experiment's YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; give an experiment's YAML file") from None
    return parse({**data, **(changes or {})} if isinstance(data, dict) else data, str(path))


def parse(data: Any, where: str) -> Experiment:
    """Check the content of an experiment's file; ``where`` is put before the message of an error."""
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        raise one_line([f"{where}: {'; '.join(_explain(error))}"]) from None
    try:
        experiment.every_arm()
    except ConfigError as error:
        message = str(error).replace("legal: none, ", "legal: ")  # the arm full is what none would be
        raise ConfigError(f"{where}: {message}") from None
    return experiment


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Say what keeps results of ``old`` from being continued as ``new``; growth alone (more problems) does not."""
    found = []
    growing = {"tasks", "arms", "grid", "full", "trace"}
    for key in (key for key in Experiment.model_fields if key not in growing):
        exclude = {"sampling": {"samples", "max_new_tokens"}}
        before, after = (show(e.model_dump(mode="json", exclude=exclude)[key]) for e in (old, new))
        if before != after:
            found.append(f"{key}: was {before}, is {after}")
    tasks = {task.label: task for task in new.tasks}
    for was in old.tasks:
        if (now := tasks.get(was.label)) is None:
            found.append(f"tasks: {was.label} is gone")
            continue
        for key in ("path", "tokens", "prompt_suffix"):
            if (a := getattr(was, key)) != (b := getattr(now, key)):
                found.append(f"tasks: {key} of {was.label} was {show(a)}, is {show(b)}")
        if (a := old.limit_of(was)) != (b := new.limit_of(now)):
            found.append(f"tasks: max_new_tokens of {was.label} was {a}, is {b}")
        shrunk = (now.problems or sys.maxsize) < (was.problems or sys.maxsize)
        if shrunk or new.samples_of(now) < old.samples_of(was):
            found.append(f"tasks: {was.label} has fewer problems or samples than before; to run some only, use --limit")
    if found:
        return found
    arms = {arm.name: arm.config for arm in new.every_arm()}
    for arm in old.every_arm():
        if arm.name not in arms:
            found.append(f"arms: {arm.name} is gone; to run some only, use --only")
        elif arms[arm.name] != arm.config:
            found.append(f"arms: {arm.name} is configured differently")
    return found


def _explain(error: ValidationError) -> Iterator[str]:
    """Turn every finding of pydantic into one line: dotted path, given value, legal range."""
    findings = error.errors(include_url=False)
    inside = {finding["loc"][:end] for finding in findings for end in range(len(finding["loc"]))}
    for finding in findings:
        loc = finding["loc"]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
        if finding["type"] == "value_error":
            message = str(finding["ctx"]["error"])
            yield f"{path}: {message}" if path else message
        elif finding["type"] == "extra_forbidden":
            section = path.rpartition(".")[0]
            known = {"": tuple(Experiment.model_fields), section: tuple(_model_at(loc[:-1]).model_fields)}
            yield unknown_key(section, str(loc[-1]), known)
        elif finding["type"] == "missing":
            yield f"{path}: required; give {_legal(loc)}"
        elif not loc:
            yield f"holds {show(finding['input'])}, expected a mapping with keys such as 'tasks'"
        elif loc not in inside:
            yield f"{path}: got {show(finding['input'])}, expected {_legal(loc)}"


def _legal(loc: tuple[int | str, ...]) -> str:
    """Legal values of the key at a place: what its description says before the colon."""
    last = max(i for i, part in enumerate(loc) if isinstance(part, str))
    description = _model_at(loc[:last]).model_fields[str(loc[last])].description
    return str(description).partition(":")[0].rstrip(".")


_MODELS: dict[str, type[BaseModel]] = {
    "server": ServerConfig,
    "tasks": TaskConfig,
    "sampling": SamplingConfig,
    "arms": ArmConfig,
    "grid": GridConfig,
    "budgets": BudgetPoint,
}


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model whose keys stand at a place of an experiment's file."""
    names = [part for part in loc if isinstance(part, str) and part in _MODELS]
    return _MODELS[names[-1]] if names else Experiment
