"""What pruning one layer alone does to the model's answers: the layers' sensitivity, without right answers.

The model answers the calibration prompts greedily, first uncompressed and then once for every layer with that layer
alone kept to half the budget. What counts is where an answer parts from the uncompressed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lethe_bench.cli.checks import say
from lethe_sglang.allocation.profile import Profile, Sensitivity
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping
from lethe_sglang.profiling.run import Pass, model_of, start

Ask = Callable[[int | None], list[list[int]]]
"""Puts all prompts with a layer pruned (None: none) and returns the token ids of the answers."""


def kept_by(config: EvictionConfig) -> int:
    """Return what a pruned layer keeps: half of the mean budget, in tokens."""
    return config.budget.tokens // 2


def configuration(config: EvictionConfig, layers: int, longest: int) -> EvictionConfig:
    """Return the configuration that the pass starts with, in which layer 0 alone is pruned.

    Parameters
    ----------
    config
        The server's: policy, rounds and retention are taken over; a pruned layer keeps half of ``budget.tokens``,
        half of that as recent window.
    layers
        L.
    longest
        Tokens that no sequence exceeds; the other layers keep as many.

    Raises
    ------
    ConfigError
        If half the budget is too small for the policy's sinks.
    """
    kept = kept_by(config)
    recent = kept // 2
    mean = (kept + (layers - 1) * longest) // layers
    whole = config.model_dump(mode="json", exclude_unset=True)
    retain = {**whole.get("retain", {}), "recent_ratio": (recent - 0.5) / mean}
    try:
        return from_mapping(
            {
                **{name: part for name, part in whole.items() if name not in ("budget", "retain", "debug", "requests")},
                "retain": retain,
                **pruned(0, kept, layers, longest),
            }
        )
    except ConfigError as error:
        raise ConfigError(f"--budget: half of budget.tokens {config.budget.tokens} is too small: {error}") from None


def pruned(layer: int, kept: int, layers: int, longest: int) -> dict[str, Any]:
    """Return the options by which one of ``layers`` layers keeps ``kept`` tokens and all others ``longest``."""
    return {"budget": {"allocation": "list", "layers": [kept if i == layer else longest for i in range(layers)]}}


def measure(layers: int, ask: Ask, kept: int, interval: int) -> Sensitivity:
    """Compare the answers of every layer's pruning with the uncompressed ones.

    Parameters
    ----------
    layers
        L.
    ask
        Puts all prompts.
    kept, interval
        Tokens that a pruned layer keeps, and tokens between rounds.

    Returns
    -------
    Sensitivity
        Per layer, over the prompts.

    Raises
    ------
    ConfigError
        If no answer is long enough to be pruned.
    """
    whole = ask(None)
    count = len(whole)
    _count(1, layers, count)
    if max(map(len, whole)) <= kept + interval:
        raise ConfigError(
            f"--budget: no answer has more than {kept + interval} tokens, so that nothing would be pruned; "
            "give a larger --max-new-tokens or a smaller --budget"
        )
    changed, lost = [], []
    for layer in range(layers):
        common = [agreement(a, b) for a, b in zip(whole, ask(layer), strict=True)]
        changed.append(sum(part < 1 for part in common) / count)
        lost.append(1 - sum(common) / count)
        _count(layer + 2, layers, count)
    return Sensitivity(kept=kept, prompts=count, changed=tuple(changed), lost=tuple(lost))


def _count(rounds: int, layers: int, prompts: int) -> None:
    say(f"lethe sensitivity: {rounds * prompts} of {(layers + 1) * prompts} answers")


def agreement(whole: Sequence[int], pruned: Sequence[int]) -> float:
    """Return the part of an answer before the first token that differs, 0 to 1; a longer answer differs at its end."""
    same = next(
        (i for i, (a, b) in enumerate(zip(whole, pruned, strict=False)) if a != b), min(len(whole), len(pruned))
    )
    return 1.0 if same == len(whole) == len(pruned) else same / max(len(whole), len(pruned))


def run(task: Pass, prompts: Sequence[Sequence[int]], profile: Profile) -> Sensitivity:
    """Start an engine and measure.

    Parameters
    ----------
    task
        The pass: model, configuration, length of answers, server arguments.
    prompts
        Token ids.
    profile
        The model's.

    Raises
    ------
    ConfigError
        If the configuration or the prompts cannot be used, or the profile is of another model.
    """
    layers = profile.model.layers
    longest = max(map(len, prompts)) + task.max_new_tokens + 1
    config = configuration(task.config, layers, longest)
    say(f"lethe sensitivity: starting SGLang with {task.model_path}, to prune {layers} layers one at a time")
    engine = start(
        [
            "--model-path",
            task.model_path,
            "--log-level",
            "error",
            "--random-seed",
            str(task.seed),
            "--disable-cuda-graph",
            *task.server_args,
            "--kv-evict",
            config.policy,
            "--kv-evict-config",
            json.dumps(config.model_dump(mode="json", exclude_unset=True)),
        ]
    )

    def ask(layer: int | None) -> list[list[int]]:
        if layer is not None:
            engine.kv_evict_reconfigure(pruned(layer, kept_by(task.config), layers, longest))
        params: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": task.max_new_tokens}
        if layer is None:
            params["custom_params"] = {"kv_evict": "none"}
        answers = engine.generate(input_ids=[list(ids) for ids in prompts], sampling_params=params)
        return [list(answer["output_ids"]) for answer in answers]

    try:
        profile.check(model_of(engine), "FILE")
        return measure(layers, ask, kept_by(task.config), config.rounds.interval)
    finally:
        engine.shutdown()
