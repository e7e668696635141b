"""The artifact of the one-time pass: a versioned YAML file with a model's fingerprint and its layers' statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lethe_sglang.allocation.fingerprint import ModelFingerprint, Part
from lethe_sglang.config import ConfigError
from lethe_sglang.config.loading import write_yaml
from lethe_sglang.files import write_atomically

FORMAT = 2
"""Version of the file; a reader knows exactly one."""

STATISTICS = {
    "hoyer": "Hoyer sparsity of a query's attention, 0 (uniform) to 1 (one token)",
    "entropy": "entropy of a query's attention, nats",
    "variance": "variance of a query's attention over tokens, in units of the squared mean",
    "coverage_90": "tokens that hold 90 % of a query's attention",
    "coverage_95": "tokens that hold 95 % of a query's attention",
    "coverage_99": "tokens that hold 99 % of a query's attention",
    "distance": "mean distance to what is attended to, tokens",
    "sink_share": "share of attention on the sinks",
    "concentration": "variance over tokens of all attention received, in units of the squared mean",
    "fluctuation": "variance over queries of the attention a token receives, summed over tokens",
    "recurrence": "share of tokens that became important again, of those that had stayed unimportant for a while",
}
"""Every statistic, in the order of the file, with its meaning and unit."""

PER_QUERY = tuple(STATISTICS)[:8]
"""Statistics of single queries, which are also kept by length of the context."""

PER_PROMPT = tuple(STATISTICS)[8:]
"""Statistics of the tokens of a whole answer."""

Rule = Literal["concentration", "sensitivity", "hoyer", "pyramid", "d2o", "cake", "zipvl", "fidelity", "recurrence"]
"""How the layers' statistics become their shares (``allocation.rules``)."""

MEASURED_BY = {"sensitivity": "lethe sensitivity", "fidelity": "lethe eval layers"}
"""Rules that need what ``lethe profile`` does not measure, and the command that adds it to a profile."""

Layers = tuple[float, ...]


class PromptsInfo(Part):
    """What the model was asked.

    Attributes
    ----------
    source
        File name or ``built-in``.
    hash
        Of all prompts as they were put to the model.
    count, queries
        Prompts measured, and their decode queries in all.
    prompt_tokens, answer_tokens
        Means per prompt.
    """

    source: str
    hash: str
    count: int = Field(ge=1)
    queries: int = Field(ge=1)
    prompt_tokens: float = Field(ge=0)
    answer_tokens: float = Field(ge=0)


class Settings(Part):
    """How the pass was run; see ``lethe profile --help``. ``idle_steps`` defines recurrence, in decode steps."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    seed: int
    sinks: int = Field(ge=0)
    idle_steps: int = Field(ge=1)


class Cost(Part):
    """What the pass took: seconds of measuring, seconds in all, device bytes of the statistics."""

    measuring_seconds: float = Field(ge=0)
    total_seconds: float = Field(ge=0)
    statistics_bytes: int = Field(ge=0)


class Statistic(Part):
    """One statistic of every layer.

    Attributes
    ----------
    mean
        Mean over prompts of each prompt's mean over its decode queries.
    spread
        Standard deviation over prompts.
    by_length
        Mean over all queries whose context has at least that many tokens and fewer than twice as many.
    """

    mean: Layers
    spread: Layers
    by_length: dict[int, Layers] = Field(default_factory=dict)


class Sensitivity(Part):
    """What pruning one layer alone does to greedy answers, against those of the uncompressed model.

    Attributes
    ----------
    kept
        Tokens the pruned layer keeps.
    prompts
        Answers compared.
    changed
        Per layer, share of the answers that differ, 0 to 1.
    lost
        Per layer, mean part of an answer from the first token on that differs, 0 to 1.
    """

    kept: int = Field(ge=1)
    prompts: int = Field(ge=1)
    changed: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    lost: tuple[Annotated[float, Field(ge=0, le=1)], ...]


class Fidelity(Part):
    """What pruning one layer alone costs in replies that are forced, against the full cache.

    Attributes
    ----------
    kept
        Tokens the pruned layer keeps, recent window included.
    tokens
        Tokens of a reply.
    documents
        Replies compared.
    kl
        Per layer, mean of ``KL(full || pruned)`` over steps, in nats.
    recall
        Per layer, rise of the negative log-likelihood of values stated early, in nats a token; 0 if no reply has any.
    """

    kept: int = Field(ge=1)
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    kl: Layers
    recall: Layers


class Budgets(Part):
    """What the rule makes of a budget of ``tokens``, to look at: servers derive theirs from the statistics."""

    tokens: int = Field(ge=2)
    layers: tuple[Annotated[int, Field(ge=1)], ...]


class Profile(Part):
    """A whole artifact.

    Attributes
    ----------
    rule, alpha
        How servers share the budget by this profile (``rules.weights``).
    """

    format: Literal[2] = 2
    rule: Rule
    alpha: float = Field(ge=-16, le=16)
    model: ModelFingerprint
    versions: dict[str, str]
    prompts: PromptsInfo
    settings: Settings
    cost: Cost
    statistics: dict[str, Statistic]
    sensitivity: Sensitivity | None = None
    fidelity: Fidelity | None = None
    budgets: Budgets

    @model_validator(mode="after")
    def _check_layers(self) -> Profile:
        if missing := [name for name in STATISTICS if name not in self.statistics]:
            raise ValueError(f"statistics.{missing[0]}: missing")
        rows: list[tuple[str, Sequence[float]]] = [("budgets.layers", self.budgets.layers)]
        for name, statistic in self.statistics.items():
            found = (statistic.mean, statistic.spread, *statistic.by_length.values())
            rows += [(f"statistics.{name}", row) for row in found]
        if self.sensitivity is not None:
            rows += [("sensitivity.changed", self.sensitivity.changed), ("sensitivity.lost", self.sensitivity.lost)]
        if self.fidelity is not None:
            rows += [("fidelity.kl", self.fidelity.kl), ("fidelity.recall", self.fidelity.recall)]
        for name, row in rows:
            if len(row) != self.model.layers:
                raise ValueError(f"{name}: got {len(row)} values for {self.model.layers} layers")
        if not all(0 <= h <= 1 for h in self.mean("hoyer")):
            raise ValueError("statistics.hoyer: outside of 0 to 1")
        if self.rule in MEASURED_BY and getattr(self, self.rule) is None:
            raise ValueError(f"rule {self.rule}: the profile has none; measure it with {MEASURED_BY[self.rule]}")
        return self

    def mean(self, statistic: str) -> Layers:
        """Return a statistic's mean of every layer."""
        return self.statistics[statistic].mean

    def check(self, model: ModelFingerprint, where: str) -> None:
        """Refuse another model.

        Raises
        ------
        ConfigError
            One line that says what differs.
        """
        if differing := self.model.differences(model):
            raise ConfigError(
                f"{where}: profile of another model ({self.model.name}): {', '.join(differing)}; make one with "
                f"lethe profile --model-path {model.name}, or set budget.profile to auto"
            )


def save(profile: Profile, path: Path) -> None:
    """Write a profile; a reader sees the old file or the whole new one.

    Raises
    ------
    OSError
        If the directory cannot be written to.
    """
    text = "# Attention statistics of one model, made by `lethe profile`; see docs/profiling.md.\n"
    text += write_yaml(_rounded(profile.model_dump(mode="json")), 120)
    write_atomically(path, text)


def load(path: Path, where: str | None = None) -> Profile:
    """Read a profile.

    Parameters
    ----------
    path
        The file.
    where
        What an error names; None is the path.

    Raises
    ------
    ConfigError
        One line, if it cannot be read, is no profile or is of another version.
    """
    name = where or str(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}; make it with lethe profile") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise ConfigError(f"{name}: not YAML; make it again with lethe profile") from None
    if not isinstance(data, dict) or "format" not in data:
        raise ConfigError(f"{name}: not a profile; make one with lethe profile")
    if data["format"] != FORMAT:
        raise ConfigError(
            f"{name}: format {data['format']}, this version reads format {FORMAT}; make it again with lethe profile"
        )
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        message = f"{option}{': ' if option else ''}{first['msg']}".replace("Value error, ", "")
        raise ConfigError(f"{name}: {message}; make it again with lethe profile") from None


def _rounded(value: Any) -> Any:
    """Six significant digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
