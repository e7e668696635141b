"""What an accuracy experiment runs: its YAML file, its arms, its problems, and the command lines of its servers.

One stock server answers for the arm ``full``; one server of the plugin answers for all others, because an idle one can
goes from arm to arm (``POST /kv_evict``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from lethe_bench.accuracy.datasets import DATASETS, Item, dataset_items, family_items
from lethe_bench.cli import server_args
from lethe_bench.machine import readable
from lethe_bench.servers import launch_command
from lethe_bench.tasks import FAMILIES
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping
from lethe_sglang.config.policy_section import laid_over
from lethe_sglang.config.section import Section
from lethe_sglang.errors import show

FULL = "full"
"""The arm that stock SGLang runs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._+-]*")
_OWN_SERVER_ARGS = {
    "--model-path": "use model_path",
    "--host": "",
    "--port": "",
    "--config": "",
    "--max-total-tokens": "use server.max_total_tokens",
    "--page-size": "use server.page_size",
    "--max-running-requests": "use server.max_running_requests",
    "--kv-evict": "use arms",
    "--kv-evict-config": "use base",
    "--kv-evict-budget": "use arms",
    "--kv-evict-profile": "use arms",
}
"""Server arguments that an experiment sets, and the key that changes them, if there is one."""


def _length(value: Any) -> int | str:
    """Check a bound on generated tokens: a count, or a multiple of the reference reply such as ``2x``."""
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?x", value) and float(value[:-1]) > 0:
        return value
    raise ValueError(f"got {show(value)}, expected an integer >= 1 or a factor on the reference reply such as 2x")


def _length_or_none(value: Any) -> int | str | None:
    return None if value is None else _length(value)


Length = Annotated[int | str, PlainValidator(_length)]
OptionalLength = Annotated[int | str | None, PlainValidator(_length_or_none)]


class ServerConfig(Section):
    """What all servers of an experiment have in common."""

    max_total_tokens: int | None = Field(
        default=None, ge=1, description="an integer >= 1 or null: the KV pool in tokens; null leaves it to SGLang."
    )
    page_size: int | None = Field(
        default=None, ge=1, description="an integer >= 1 or null: tokens per page; null leaves it to SGLang."
    )
    max_running_requests: int | None = Field(
        default=None, ge=1, description="an integer >= 1 or null: requests in a batch; null leaves it to SGLang."
    )
    extra: tuple[str, ...] = Field(
        default=(), strict=False, description="a list of strings: more arguments of every server."
    )
    timeout: float = Field(default=14400, gt=0, description="a number > 0: seconds that one request may take.")

    @model_validator(mode="after")
    def _check_extra(self) -> ServerConfig:
        try:
            server_args.check(self.extra, "lethe eval", _OWN_SERVER_ARGS, "extra")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class TaskConfig(Section):
    """Problems of one family or one benchmark."""

    family: str | None = Field(default=None, description=f"one of {', '.join(FAMILIES)}.")
    dataset: str | None = Field(default=None, description=f"one of {', '.join(DATASETS)}.")
    path: str | None = Field(default=None, description="a string: the local file of a dataset.")
    problems: int | None = Field(
        default=None, ge=1, description="an integer >= 1, or null for all of a dataset: how many, from the beginning."
    )
    tokens: tuple[int, int] = Field(
        default=(200, 560), strict=False, description="a list of two integers: shortest and longest reference chain."
    )
    prompt_suffix: str | None = Field(
        default=None, description="a string or null: put after every question instead of the dataset's instruction."
    )
    max_new_tokens: OptionalLength = Field(default=None, description="as in sampling, which it beats.")
    samples: int | None = Field(default=None, ge=1, description="an integer >= 1: beats sampling.samples.")

    @property
    def label(self) -> str:
        """What the task is called in results."""
        return str(self.family or self.dataset)

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if (self.family is None) == (self.dataset is None):
            raise ValueError("give either family or dataset")
        for key, known in (("family", FAMILIES), ("dataset", DATASETS)):
            if (name := getattr(self, key)) is not None and name not in known:
                raise ValueError(f"{key}: unknown {show(name)}{_nearest(name, known)}; legal: {', '.join(known)}")
        if self.family is None and self.path is None:
            raise ValueError("path: required with dataset; give its local file")
        if self.family is not None:
            if self.problems is None:
                raise ValueError("problems: required with family; give an integer >= 1")
            if given := [key for key in ("path", "prompt_suffix") if getattr(self, key) is not None]:
                raise ValueError(f"{given[0]}: only with dataset; leave it out")
        if not 0 < self.tokens[0] <= self.tokens[1]:
            raise ValueError(f"tokens: got {show(list(self.tokens))}, expected [shortest, longest]")
        return self


class SamplingConfig(Section):
    """How replies are drawn."""

    temperature: float = Field(default=0.0, ge=0, description="a number >= 0: 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="a number > 0 and <= 1.")
    max_new_tokens: Length = Field(default="2x", description="an integer >= 1 or a factor such as 2x.")
    samples: int = Field(default=1, ge=1, description="an integer >= 1: replies per problem.")
    seed: int = Field(default=0, ge=0, description="an integer >= 0: seeds the replies where the server allows it.")

    @model_validator(mode="after")
    def _check_greedy(self) -> SamplingConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: got {self.samples} with temperature 0, which repeats one reply; set it to 1")
        return self


class ArmConfig(Section):
    """One eviction configuration."""

    name: str = Field(description="a name of letters, digits and @ . _ + -.")
    config: dict[str, Any] = Field(default_factory=dict, description="a mapping, laid over base section by section.")


class BudgetPoint(Section):
    """One budget of a grid."""

    tokens: int = Field(ge=2, description="an integer >= 2: budget.tokens.")
    interval: int = Field(ge=1, description="an integer >= 1: rounds.interval.")


class GridConfig(Section):
    """Every policy at every budget; the arms are called ``policy@tokens``."""

    policies: tuple[str, ...] = Field(strict=False, min_length=1, description="a list of one or more policies.")
    budgets: tuple[BudgetPoint, ...] = Field(
        strict=False, min_length=1, description="a list of one or more mappings of tokens and interval."
    )


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes
    ----------
    name
        Unique; ``full`` is stock SGLang.
    index
        Its place among the arms that evict; None for ``full``.
    mapping
        What it lays over the base.
    config
        What comes out; None for ``full``.
    """

    name: str
    index: int | None
    mapping: dict[str, Any]
    config: EvictionConfig | None


class Experiment(Section):
    """A whole experiment, as one YAML file holds it."""

    name: str = Field(description="a name of letters, digits and @ . _ + -: the results directory.")
    model_path: str = Field(min_length=1, description="a string: directory of the model.")
    server: ServerConfig = Field(default_factory=ServerConfig, description="a mapping.")
    tasks: tuple[TaskConfig, ...] = Field(strict=False, min_length=1, description="a list of one or more mappings.")
    split: str = Field(default="test", min_length=1, description="a string: range of seeds of generated problems.")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="a mapping.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="a mapping: variables of the model's chat template."
    )
    base: dict[str, Any] = Field(
        default_factory=dict, description="a mapping: an eviction configuration as for --kv-evict-config."
    )
    grid: GridConfig | None = Field(default=None, description="a mapping of policies and budgets, or null.")
    arms: tuple[ArmConfig, ...] = Field(
        default=(), strict=False, description="a list of mappings with name and config."
    )
    full: bool = Field(default=True, description="true or false: whether stock SGLang is an arm.")
    concurrency: int = Field(default=16, ge=1, le=512, description="an integer from 1 to 512: requests open at a time.")
    trace: int = Field(default=0, ge=0, description="an integer >= 0: problems per arm whose kept sets are recorded.")

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        for name in (self.name, *(arm.name for arm in self.arms)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"name: got {show(name)}, expected letters, digits and @ . _ + -")
        names = [FULL, *(name for name, _ in self.mappings())]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"arms: {show(repeated[0])} is there twice; give every arm a name of its own")
        labels = [task.label for task in self.tasks]
        if repeated := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"tasks: {show(repeated[0])} is there twice; give each family and dataset once")
        for i, task in enumerate(self.tasks):
            if task.dataset is not None and isinstance(self.limit_of(task), str):
                raise ValueError(f"tasks[{i}].max_new_tokens: a dataset has no reference reply; give an integer >= 1")
        if not self.full and len(names) == 1:
            raise ValueError("arms: nothing to run; set full to true, or give arms or a grid")
        return self

    def limit_of(self, task: TaskConfig) -> int | str:
        """Return the bound on generated tokens of a task: a count, or a factor on the reference reply."""
        return self.sampling.max_new_tokens if task.max_new_tokens is None else task.max_new_tokens

    def samples_of(self, task: TaskConfig) -> int:
        """Return how many replies a problem of a task gets."""
        return self.sampling.samples if task.samples is None else task.samples

    def mappings(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and configuration (to be laid over the base) of every arm that evicts."""
        if self.grid is not None:
            for point in self.grid.budgets:
                for policy in self.grid.policies:
                    shape = {"budget": {"tokens": point.tokens}, "rounds": {"interval": point.interval}}
                    yield f"{policy}@{point.tokens}", {"policy": policy, **shape}
        for arm in self.arms:
            yield arm.name, arm.config

    def server_config(self) -> dict[str, Any]:
        """Return what ``--kv-evict-config`` takes: the base, with a pool that serves every policy."""
        return laid_over(self.base, {"pool": {"states": "all"}, "debug": {"record_kept": self.trace > 0}})

    def every_arm(self) -> list[Arm]:
        """Return all arms, ``full`` first.

        Raises
        ------
        ConfigError
            If the configuration of an arm is not legal; the message names the arm.
        """
        found = [Arm(FULL, None, {}, None)] if self.full else []
        for i, (name, mapping) in enumerate(self.mappings()):
            found.append(Arm(name, i, mapping, from_mapping(laid_over(self.base, mapping), where=f"arm {name}")))
        return found

    def items(self, data_dir: Path | None = None) -> dict[str, list[Item]]:
        """Make or read the problems: label of a task -> problems.

        Parameters
        ----------
        data_dir
            Where relative paths of datasets start; None is the working directory.
        """
        found = {}
        for task in self.tasks:
            if task.family is not None:
                found[task.label] = family_items(task.family, self.split, task.problems or 0, task.tokens)
            else:
                path = (data_dir or Path()) / str(task.path)
                found[task.label] = dataset_items(task.label, path, task.problems, task.prompt_suffix)
        return found

    def server_command(self, port: int, config: Path | None) -> list[str]:
        """Command line of a server: stock for ``config`` None, else with eviction as that file says."""
        command = launch_command(self.model_path, port)
        for key in ("max_total_tokens", "page_size", "max_running_requests"):
            if (value := getattr(self.server, key)) is not None:
                command += [f"--{key.replace('_', '-')}", str(value)]
        command += self.server.extra
        if config is not None:
            command += ["--kv-evict", str(self.base.get("policy", "lethe")), "--kv-evict-config", str(config)]
        return command

    def readable(self, command: Iterable[str]) -> list[str]:
        """Return a command line without the paths of this machine."""
        return readable(command, self.model_path)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {show(near[0])}?)" if near else ""
