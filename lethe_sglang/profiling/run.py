"""The pass itself: ``sgl.Engine`` in measuring mode over calibration prompts."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lethe_sglang import __version__
from lethe_sglang.allocation.budgets import layer_budgets
from lethe_sglang.allocation.fingerprint import ModelFingerprint, digest, fingerprint_of
from lethe_sglang.allocation.profile import MEASURED_BY, Budgets, Cost, Profile, PromptsInfo, Rule, Settings, save
from lethe_sglang.allocation.rules import weights
from lethe_sglang.config import ConfigError, EvictionConfig
from lethe_sglang.profiling import cache
from lethe_sglang.profiling.prompts import MODEL_FILE, Prompt, generated, hash_of, read
from lethe_sglang.profiling.records import Partial, Record, longest, summarise

_TRIES = 40
"""Generated prompts looked at for each one that the tokenizer can write."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What to measure.

    Attributes
    ----------
    model_path
        Directory or Hugging Face name.
    prompts
        A file of prompts; None takes the model's own, else generated ones.
    out
        Where the profile goes; None is its place in the user's cache.
    num_prompts
        Most prompts to measure.
    max_new_tokens, temperature, seed
        How the model answers; ``seed`` also picks the generated prompts.
    concurrency
        Requests that run at once.
    time_limit
        Seconds after which no further prompts are started; None is no limit.
    raw
        Put prompts as they are, without the chat template.
    rule, alpha
        How servers share the budget by the profile.
    config
        Whose ``budget`` the budgets in the profile are made for, and whose ``retain.sinks`` counts.
    server_args
        More arguments of the engine, as for SGLang's launcher.
    """

    model_path: str
    prompts: Path | None = None
    out: Path | None = None
    num_prompts: int = 16
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 1
    concurrency: int = 4
    time_limit: float | None = None
    raw: bool = False
    rule: Rule = "concentration"
    alpha: float = 1.0
    config: EvictionConfig = field(default_factory=EvictionConfig)
    server_args: tuple[str, ...] = ()

    def engine_args(self) -> list[str]:
        """Return SGLang's arguments."""
        measuring = {"retain": {"sinks": self.config.retain.sinks}}
        backend = [] if "--attention-backend" in self.server_args else ["--attention-backend", "torch_native"]
        return [
            "--model-path",
            self.model_path,
            "--log-level",
            "error",
            *backend,
            *self.server_args,
            "--kv-evict",
            "streaming",
            "--kv-evict-config",
            json.dumps(measuring),
            "--disable-overlap-schedule",
            "--random-seed",
            str(self.seed),
            "--max-running-requests",
            str(self.concurrency),
        ]


class Interrupted(KeyboardInterrupt):
    """The pass was stopped after ``done`` of ``total`` prompts, which are kept in ``path``."""

    def __init__(self, done: int, total: int, path: Path) -> None:
        super().__init__(f"{done} of {total} prompts are kept in {path}; the same command goes on from there")


def measure(task: Pass) -> tuple[Profile, Path]:
    """Run a pass, going on from an interrupted one, and write its profile.

    Returns
    -------
    tuple
        The profile and where it was written.

    Raises
    ------
    ConfigError
        If the prompts or the model cannot be used, or the profile cannot be written.
    Interrupted
        On Ctrl-C, once the engine runs.
    """
    started = time.monotonic()
    given = _given(task)
    _say(f"starting SGLang with {task.model_path}")
    engine = start(task.engine_args(), measures=True)
    try:
        profile, partial = _measure(task, engine, *given)
    finally:
        engine.shutdown()
    cost = profile.cost.model_copy(update={"total_seconds": time.monotonic() - started})
    profile = with_rule(profile.model_copy(update={"cost": cost}), task.rule, task.alpha, task.config)
    try:
        save(profile, partial.profile)
    except OSError as error:
        raise ConfigError(f"--out {partial.profile}: cannot be written: {error.strerror}; give another file") from None
    partial.remove()
    return profile, partial.profile


def prompts_of(task: Pass, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the prompts that a pass puts.

    Raises
    ------
    ConfigError
        If the prompts cannot be used.
    """
    prompts = _given(task)[1] or _writable(tokenizer, task)
    return [tokens_of(tokenizer, prompt, task.raw) for prompt in prompts]


def _given(task: Pass) -> tuple[str, list[Prompt] | None]:
    """Return the prompts of a file and its name; None if they are to be generated."""
    own = Path(task.model_path) / MODEL_FILE
    path = task.prompts if task.prompts is not None else own if own.is_file() else None
    return ("built-in", None) if path is None else (path.name, read(path)[: task.num_prompts])


def start(words: Sequence[str], measures: bool = False) -> Any:
    """Start ``sgl.Engine`` with this plugin by SGLang's arguments; ``measures`` makes it the one of a pass."""
    import sglang as sgl
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(list(words))
    if measures:
        server_args._lethe = replace(server_args._lethe, measures=True)
    return sgl.Engine(server_args=server_args)


def model_of(engine: Any) -> ModelFingerprint:
    """Return the fingerprint of the model that an engine runs."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    return fingerprint_of(model_config_of(engine.server_args), resolved_view(engine.server_args))


def _measure(task: Pass, engine: Any, source: str, given: list[Prompt] | None) -> tuple[Profile, Partial]:
    """Return the profile without its rule, and where finished prompts are kept."""
    from lethe_sglang.observers.measure import IDLE_STEPS

    model = model_of(engine)
    settings = Settings(
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        seed=task.seed,
        sinks=task.config.retain.sinks,
        idle_steps=IDLE_STEPS,
    )
    tokenizer = engine.tokenizer_manager.tokenizer
    prompts = given or _writable(tokenizer, task)
    out = task.out if task.out is not None else cache.file_of(model, cache.directory())
    key = digest([model.key, hash_of(prompts), task.raw, settings.model_dump(mode="json")])
    partial = Partial(out, key)
    ids = [tokens_of(tokenizer, prompt, task.raw) for prompt in prompts]

    def ask(numbers: Sequence[int]) -> tuple[list[Record], int]:
        params = {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens}
        engine.generate(
            input_ids=[ids[i] for i in numbers], sampling_params=params, rid=[f"lethe-{i}" for i in numbers]
        )
        report = engine.kv_evict_measured()
        asked = {f"lethe-{i}": str(i) for i in numbers}
        found = [{**r, "rid": asked[r["rid"]]} for r in report["measured"] if r["rid"] in asked]
        return longest(found), int(report["statistics_bytes"])

    begun = time.monotonic()
    records, size = collect(len(prompts), task.concurrency, ask, partial, task.time_limit)
    seconds = time.monotonic() - begun
    cost = Cost(measuring_seconds=seconds, total_seconds=seconds, statistics_bytes=size)
    return assemble(model, settings, source, hash_of(prompts), records, cost), partial


def collect(
    total: int,
    concurrency: int,
    ask: Callable[[Sequence[int]], tuple[list[Record], int]],
    partial: Partial,
    time_limit: float | None,
) -> tuple[list[Record], int]:
    """Put the prompts that are not finished yet, some at a time.

    Parameters
    ----------
    total
        Prompts, numbered from 0.
    concurrency
        Prompts put at a time.
    ask
        Puts prompts by number; returns their records and the bytes of the device's statistics.
    partial
        Where finished prompts are kept.
    time_limit
        Seconds after which no further prompts are put; at least one lot is.

    Returns
    -------
    tuple
        Records in the prompts' order, and the most bytes reported.

    Raises
    ------
    Interrupted
        On Ctrl-C.
    ConfigError
        If no prompt left a decode query.
    """
    done = {n: r for n, r in partial.load().items() if int(n) < total}
    left = [i for i in range(total) if str(i) not in done]
    size, started = 0, time.monotonic()
    try:
        partial.start(list(done.values()))
        if done:
            _say(f"going on from an interrupted pass, {len(done)} of {total} prompts are there")
        for i in range(0, len(left), concurrency):
            if time_limit is not None and done and time.monotonic() - started > time_limit:
                _say(f"time limit reached after {len(done)} prompts")
                break
            numbers = left[i : i + concurrency]
            found, used = ask(numbers)
            partial.add(found)
            done |= {record["rid"]: record for record in found}
            size = max(size, used)
            _say(f"{len(done)} of {total} prompts, {time.monotonic() - started:.0f} s")
    except KeyboardInterrupt:
        raise Interrupted(len(done), total, partial.path) from None
    except OSError as error:
        raise ConfigError(f"--out: {partial.path}: cannot be written: {error.strerror}; give another file") from None
    if not done:
        raise ConfigError("--prompts: no answer had a second token; give other prompts or a larger --max-new-tokens")
    return [done[n] for n in sorted(done, key=int)], size


def _say(line: str) -> None:
    print(f"lethe profile: {line}", file=sys.stderr, flush=True)


def assemble(
    model: ModelFingerprint, settings: Settings, source: str, prompts_hash: str, records: Sequence[Record], cost: Cost
) -> Profile:
    """Make a profile of what was measured, with the default rule and a budget of nothing."""
    count, queries = len(records), sum(record["queries"] for record in records)
    return Profile(
        rule="concentration",
        alpha=1.0,
        model=model,
        versions={"lethe-sglang": __version__, **{name: metadata.version(name) for name in ("sglang", "torch")}},
        prompts=PromptsInfo(
            source=source,
            hash=prompts_hash,
            count=count,
            queries=queries,
            prompt_tokens=sum(record["prompt_tokens"] for record in records) / count,
            answer_tokens=queries / count + 1,
        ),
        settings=settings,
        cost=cost,
        statistics=summarise(records),
        budgets=Budgets(tokens=2, layers=(1,) * model.layers),
    )


def with_rule(profile: Profile, rule: Rule, alpha: float, config: EvictionConfig) -> Profile:
    """Return a profile with another rule, and with what that makes of the budget of ``config``, recent included.

    Raises
    ------
    ConfigError
        If the rule needs what was not measured.
    """
    if rule in MEASURED_BY and getattr(profile, rule) is None:
        raise ConfigError(f"--rule {rule}: the profile has none; measure it with {MEASURED_BY[rule]}")
    changed = profile.model_copy(update={"rule": rule, "alpha": alpha})
    layers = tuple(k + config.recent for k in layer_budgets(config.scored, weights(changed), config.floor))
    return changed.model_copy(update={"budgets": Budgets(tokens=config.budget.tokens, layers=layers)})


def tokens_of(tokenizer: Any, prompt: Prompt, raw: bool) -> list[int]:
    """Return the token ids of a prompt as a chat server would put it, or as it is if ``raw`` or without a template."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode("\n".join(content for _, content in prompt)))
    messages = [{"role": role, "content": content} for role, content in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _writable(tokenizer: Any, task: Pass) -> list[Prompt]:
    """Take generated prompts that the tokenizer can write: a toy vocabulary may lack capitals or spaces."""
    candidates = itertools.islice(generated(task.seed), _TRIES * task.num_prompts)
    found = list(itertools.islice((p for p in candidates if _round_trips(tokenizer, p[0][1])), task.num_prompts))
    if not found:
        raise ConfigError(f"--prompts: needed, the tokenizer of {task.model_path} cannot write the built-in ones")
    return found


def _round_trips(tokenizer: Any, text: str) -> bool:
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    return "".join(back.split()) == "".join(text.split())
