"""Profiles and records for tests."""

from __future__ import annotations

from lethe_sglang.allocation.fingerprint import ModelFingerprint
from lethe_sglang.allocation.profile import (
    PER_PROMPT,
    PER_QUERY,
    STATISTICS,
    Budgets,
    Cost,
    Fidelity,
    Profile,
    PromptsInfo,
    Sensitivity,
    Settings,
    Statistic,
)

MODEL = ModelFingerprint(
    name="toy",
    architecture="ToyForCausalLM",
    config_hash="c0ffee",
    weights="sampled:1234",
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=64,
    dtype="float32",
)
SETTINGS = Settings(max_new_tokens=256, temperature=0.0, seed=1, sinks=4, idle_steps=16)


def profile(
    model: ModelFingerprint = MODEL,
    changed: tuple[float, ...] | None = None,
    rule: str = "concentration",
    alpha: float = 1.0,
    **means: tuple[float, ...],
) -> Profile:
    layers = model.layers
    lost = None if changed is None else tuple(share / 2 for share in changed)
    statistics = {
        name: Statistic(mean=means.get(name, (0.5,) * layers), spread=(0.01,) * layers) for name in STATISTICS
    }
    return Profile(
        rule=rule,
        alpha=alpha,
        model=model,
        versions={"lethe-sglang": "0.1.0"},
        prompts=PromptsInfo(
            source="built-in", hash="beef", count=2, queries=200, prompt_tokens=40.0, answer_tokens=101.0
        ),
        settings=SETTINGS,
        cost=Cost(measuring_seconds=3.0, total_seconds=20.0, statistics_bytes=1000),
        statistics=statistics,
        sensitivity=None if changed is None else Sensitivity(kept=32, prompts=20, changed=changed, lost=lost),
        fidelity=None if changed is None else Fidelity(kept=32, tokens=200, documents=6, kl=changed, recall=lost),
        budgets=Budgets(tokens=64, layers=(64,) * layers),
    )


def record(rid: str, value: float, queries: int = 10, layers: int = 4) -> dict:
    """A prompt's record in which every per-query statistic of layer l has the mean ``value + l``."""
    sums = [[(value + layer) * queries for _ in PER_QUERY] for layer in range(layers)]
    return {
        "rid": rid,
        "prompt_tokens": 20,
        "queries": queries,
        "by_length": {"16": {"queries": queries, "sums": sums}},
        "per_prompt": [[value + layer for _ in PER_PROMPT] for layer in range(layers)],
    }
