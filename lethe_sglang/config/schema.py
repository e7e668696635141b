"""The eviction configuration: every option, its unit, its range and its default.

The lengths that follow from it, for one layer right after a round (the kept prompt is not counted)::

    |<------------------ budget.tokens, mean over the layers ------------------>|
    |<---------------- K, mean of k_l ---------------->|<----------- R -------->|
    | sinks | best-ranked tokens; layer l keeps k_l - sinks | recent window      |

R is common to all layers; only k_l differs from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lethe_sglang.config.policy_section import WithPolicy
from lethe_sglang.config.section import Section

DEFAULT_REQUEST_FACTOR = 4
"""Largest per-request budget, in multiples of ``budget.tokens``, when ``requests.max_budget`` is not given."""


@lru_cache(maxsize=64)
def _recent(ratio: float, tokens: int) -> int:
    """Take the ratio as the decimal that was written: 0.07 of 100 is 7, and no rounding error makes it 8.

    Admission asks for it at every step, for each request that runs.
    """
    return math.ceil(Fraction(repr(ratio)) * tokens)


class BudgetConfig(Section):
    """How many tokens a layer keeps, and how the layers share them."""

    tokens: int = Field(
        default=1024,
        ge=2,
        description="Mean number of tokens kept per layer after a round: sinks, best-ranked and recent tokens "
        "together, not counting the kept prompt. Tokens, >= 2. "
        "With allocation list it is the mean of layers, rounded down.",
    )
    allocation: Literal["uniform", "profile", "list", "breakpoint"] = Field(
        default="uniform",
        description="How the layers share the budget. uniform: all alike; profile: by the model's profile and the rule "
        "written in it; list: as written in layers; breakpoint: measured from the scores at every round.",
    )
    profile: str = Field(
        default="auto",
        min_length=1,
        description="Where allocation profile takes the model's profile from. auto: the one in the user's cache, made "
        "at the server's start if there is none; a file that lethe profile has written, which allocation breakpoint "
        "reads too, for its first round; none: no profile, for the other allocations.",
    )
    layers: tuple[Annotated[int, Field(ge=2)], ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="Tokens kept in each layer after a round, recent window included, first layer first. Tokens, >= 2. "
        "Required by allocation list, forbidden otherwise.",
    )

    @property
    def uniform(self) -> bool:
        """Whether all layers keep as many, always; a profile may say so too, but is not known before the start."""
        return self.allocation == "uniform" or len(set(self.layers or ())) == 1

    @property
    def reads_profile(self) -> bool:
        """Whether the layers' shares, with allocation breakpoint those of the first round, come from a profile."""
        return self.allocation == "profile" or (
            self.allocation == "breakpoint" and self.profile not in ("auto", "none")
        )

    @model_validator(mode="before")
    @classmethod
    def _derive_tokens(cls, data: Any) -> Any:
        """Derive ``tokens`` from ``layers`` where a list of budgets leaves it out."""
        if not isinstance(data, Mapping) or data.get("allocation") != "list" or "tokens" in data:
            return data
        layers = data.get("layers")
        if not isinstance(layers, list | tuple) or not layers or not all(type(tokens) is int for tokens in layers):
            return data
        return {**data, "tokens": max(2, sum(layers) // len(layers))}

    @model_validator(mode="after")
    def _check_allocation(self) -> BudgetConfig:
        problems = []
        if self.allocation == "profile" and self.profile == "none":
            problems.append(
                "budget.profile: got none, but budget.allocation profile needs one; "
                "give auto or a file, or set budget.allocation to uniform"
            )
        if self.allocation == "list" and self.layers is None:
            problems.append("budget.layers: required by budget.allocation list; give the tokens to keep in each layer")
        if self.allocation != "list" and self.layers is not None:
            problems.append(
                f"budget.layers: not used by budget.allocation {self.allocation}; "
                "leave it out or set budget.allocation to list"
            )
        if self.allocation == "list" and self.layers is not None:
            mean = sum(self.layers) // len(self.layers)
            if self.tokens != mean:
                problems.append(
                    f"budget.tokens: got {self.tokens}, but the mean of budget.layers, rounded down, is {mean}; "
                    f"set it to {mean} or leave it out"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RoundsConfig(Section):
    """When a request is pruned."""

    when: Literal["always", "pressure"] = Field(
        default="always",
        description="always: a request is pruned whenever it exceeds its budget; pressure: only when the pool is "
        "short, down to a share of it that is the same for all running requests and never less than the budget, "
        "which is a floor then.",
    )
    interval: int = Field(
        default=128,
        ge=1,
        description="Tokens that leave the recent window between two rounds of a request, rounded up to a page "
        "multiple; under pressure, decode steps of all running requests that one event makes room for. Decode tokens, "
        ">= 1.",
    )

    @property
    def by_pressure(self) -> bool:
        """Whether rounds come when the pool is short, and not by a request's own length."""
        return self.when == "pressure"


class RetainConfig(Section):
    """What is never evicted."""

    sinks: int = Field(default=4, ge=0, description="The first positions of the sequence, always kept. Tokens, >= 0.")
    own_sinks: int = Field(
        default=0,
        ge=0,
        description="The first positions behind what is never evicted, always kept too: with prompt keep, the first "
        "tokens that the model generated. Tokens, >= 0; 0 is the paper.",
    )
    recent_ratio: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="Recent window R as a fraction of the mean budget, rounded up to a token. 0 < recent_ratio < 1.",
    )
    prompt: Literal["keep", "evict"] = Field(
        default="keep",
        description="keep: no token of the prompt is ever evicted, whether the prefix cache holds it or not; evict: "
        "only the part that was found in the prefix cache is kept, the rest is evicted like generated tokens and "
        "never enters the prefix cache.",
    )


class RequestsConfig(Section):
    """What one request may change for itself, with ``custom_params.kv_evict``."""

    allow_off: bool = Field(
        default=True,
        description="Whether a request may ask for mode none, that is to keep its whole cache. true or false.",
    )
    max_budget: int | None = Field(
        default=None,
        ge=2,
        description="Largest budget that a request may ask for. Tokens, >= budget.tokens; null is "
        f"{DEFAULT_REQUEST_FACTOR} x budget.tokens.",
    )


class DebugConfig(Section):
    """Checks and records that cost time or memory; all off in production."""

    shadow: bool = Field(
        default=False,
        description="Keep an uncompressed copy of the cache and compare every gathered cell with it (tests), at every "
        "step that runs without a CUDA graph: on a GPU, start with --disable-cuda-graph. true or false.",
    )
    kept_hash: bool = Field(
        default=False,
        description="Hash the kept set of every round and stop where tensor-parallel ranks differ. true or false.",
    )
    record_kept: bool = Field(
        default=False,
        description="Keep the logical positions that each layer kept, for the telemetry. true or false.",
    )
    pack_always: bool = Field(
        default=False,
        description="Pack every interval even if nothing has to be evicted (tests). true or false.",
    )


class PoolConfig(Section):
    """What the KV pool carries."""

    states: Literal["policy", "all"] = Field(
        default="policy",
        description="Which states the pool keeps beside every cell, 4 bytes each. policy: those that the policy needs; "
        "all: those that any policy needs, so that a live server can go over to another one.",
    )


class MonitorConfig(Section):
    """How much of what is served is measured against the full cache."""

    fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Part of the requests that are sampled: once finished, a sampled request of which something was "
        "evicted is prefilled again with the full cache, when nobody waits and memory is free, and compared. "
        "0 <= fraction <= 1; 0 is off.",
    )
    tokens_per_minute: int = Field(
        default=16384,
        ge=1,
        description="Most tokens that are prefilled for it within a minute. Tokens, >= 1.",
    )


class EvictionConfig(WithPolicy):
    """A whole configuration, as one YAML or JSON file holds it: the policy with its own section, and these."""

    budget: BudgetConfig = Field(default_factory=BudgetConfig, description="How many tokens each layer keeps.")
    rounds: RoundsConfig = Field(default_factory=RoundsConfig, description="When a request is pruned.")
    retain: RetainConfig = Field(default_factory=RetainConfig, description="What is never evicted.")
    requests: RequestsConfig = Field(default_factory=RequestsConfig, description="What one request may change.")
    pool: PoolConfig = Field(default_factory=PoolConfig, description="What the KV pool carries.")
    monitor: MonitorConfig = Field(default_factory=MonitorConfig, description="The live quality signal.")
    debug: DebugConfig = Field(default_factory=DebugConfig, description="Checks and records for tests.")

    @property
    def recent(self) -> int:
        """R, tokens of the recent window: ``ceil(recent_ratio * budget.tokens)``, common to all layers."""
        return _recent(self.retain.recent_ratio, self.budget.tokens)

    @property
    def scored(self) -> int:
        """K, mean number of tokens that a layer keeps besides the recent window, sinks included."""
        return self.budget.tokens - self.recent

    @property
    def floor(self) -> int:
        """Smallest legal k_l: the sinks and one token that is ranked."""
        return self.pinned + 1

    @property
    def pinned(self) -> int:
        """Most own tokens of a request that are kept whatever their rank."""
        return max(self.retain.sinks, self.retain.own_sinks)

    @property
    def min_request_budget(self) -> int:
        """Smallest budget that a request may ask for, in tokens; the recent window stays the server's."""
        return self.recent + self.floor

    @property
    def max_request_budget(self) -> int:
        """Largest budget that a request may ask for, in tokens."""
        limit = self.requests.max_budget
        return DEFAULT_REQUEST_FACTOR * self.budget.tokens if limit is None else limit

    def policy_problems(self) -> list[str]:
        """Say where tokens would leave the recent window before a policy that skips steps has scored them once."""
        rule = self.built_policy.accumulation
        if rule is None or rule.in_phase <= self.recent:
            return []
        values = asdict(self.built_policy)  # type: ignore[call-overload]
        option = next((name for name, value in values.items() if value == rule.every), "every")
        return [
            f"{self.policy}.{option}: got {rule.every}, more than the recent window, so that tokens would leave it "
            f"before they are scored; the largest legal value is {self.recent} with these budget.tokens and "
            "retain.recent_ratio"
        ]

    @model_validator(mode="after")
    def _check_lengths(self) -> EvictionConfig:
        problems = []
        if self.budget.allocation == "list" and self.budget.layers is not None:
            smallest = self.recent + self.floor
            problems += [
                f"budget.layers[{layer}]: got {tokens}, which leaves {tokens - self.recent} tokens beside the recent "
                f"window of {self.recent} for {self.pinned} sinks; "
                f"the smallest legal value is {smallest} with this mean"
                for layer, tokens in enumerate(self.budget.layers)
                if tokens < smallest
            ]
        elif self.scored < self.floor:
            smallest = math.ceil(self.floor / (1 - Fraction(repr(self.retain.recent_ratio))))
            problems.append(
                f"budget.tokens: got {self.budget.tokens}, which leaves {self.scored} tokens beside the recent window "
                f"of {self.recent} for {self.pinned} sinks; the smallest legal value is {smallest} with these "
                f"retain.{'sinks' if self.pinned == self.retain.sinks else 'own_sinks'} and retain.recent_ratio"
            )
        limit = self.requests.max_budget
        if limit is not None and limit < self.budget.tokens:
            problems.append(
                f"requests.max_budget: got {limit}, less than the server's own budget; "
                f"the smallest legal value is budget.tokens, {self.budget.tokens}"
            )
        if self.rounds.by_pressure and self.debug.pack_always:
            problems.append("debug.pack_always: packs at fixed lengths and rounds.when pressure has none; leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self
