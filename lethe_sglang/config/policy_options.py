"""Options of single policies, one section each."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import Field, model_validator

from lethe_sglang.config.section import Section

_S = TypeVar("_S", bound=Section)


def _odd_kernel(section: _S, name: str, kernel: int) -> _S:
    if kernel % 2 == 0:
        raise ValueError(f"{name}.kernel: got {kernel}, which has no middle; use an odd number such as {kernel + 1}")
    return section


class SnapKVConfig(Section):
    """Policy snapkv."""

    window: int = Field(
        default=32,
        ge=1,
        description="Decode steps before a round whose attention is summed. Decode steps, >= 1; never more than have "
        "passed since the round before.",
    )
    kernel: int = Field(
        default=5,
        ge=1,
        description="Neighbouring candidates over which scores are averaged. Tokens, odd, >= 1; 1 does not pool.",
    )

    @model_validator(mode="after")
    def _check_kernel(self) -> SnapKVConfig:
        return _odd_kernel(self, "snapkv", self.kernel)


class MorphKVConfig(Section):
    """Policy morphkv."""

    window: int = Field(
        default=32,
        ge=1,
        description="Decode steps before a round whose attention counts. Decode steps, >= 1.",
    )
    fusion: Literal["sum", "max"] = Field(
        default="sum",
        description="How the steps of the window are combined: sum, or max (one strong use is enough).",
    )


class RKVConfig(Section):
    """Policy rkv."""

    window: int = Field(
        default=8,
        ge=1,
        description="Decode steps before a round whose attention is averaged. Decode steps, >= 1.",
    )
    mix_lambda: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Weight of attention against redundancy. 0 <= mix_lambda <= 1; 0.1 is the paper's, 0.5 did better "
        "in later work.",
    )
    kernel: int = Field(
        default=7,
        ge=1,
        description="Neighbouring candidates over which the largest attention is taken. Tokens, odd, >= 1.",
    )
    threshold: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Cosine above which two keys are duplicates; of a token's duplicates the latest does not count. "
        "0 to 1.",
    )

    @model_validator(mode="after")
    def _check_kernel(self) -> RKVConfig:
        return _odd_kernel(self, "rkv", self.kernel)


class GKVConfig(Section):
    """Policy gkv."""

    window: int = Field(
        default=16,
        ge=1,
        description="Decode steps before a round whose attention is averaged. Decode steps, >= 1.",
    )
    alpha: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Factor on the remembered importance per round. 0 <= alpha <= 1.",
    )
    smoothing: Literal["max", "mean", "sum"] = Field(
        default="max",
        description="How a round's importance f joins the remembered F: max(alpha F, f), alpha F + (1 - alpha) f, or "
        "alpha F + f.",
    )
    mix_lambda: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of importance against redundancy. 0 <= mix_lambda <= 1; 1 ignores redundancy.",
    )


class LazyConfig(Section):
    """Policy lazy."""

    threshold: float = Field(
        default=0.001,
        gt=0,
        lt=1,
        description="Attention (mean over query heads) above which a token counts as used. 0 < threshold < 1.",
    )
