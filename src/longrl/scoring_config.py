"""The scoring section of a configuration, and weights of rewards. Importing this module does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from longrl.model_config import Section
from longrl.types import KINDS

REWARD_PRESETS = {
    # Video-R1, arXiv 2503.21776
    "r1v": {"format": 0.1, "answer": 0.9},
}

REWARD_NAMES = (
    *("answer", "choice", "exact", "format", "grounding", "judge", "length", "math", "number", "ocr", "regression"),
    *("repetition", "rouge"),
)
"""What is built in: rewards/compose.py."""

BY_KIND = {
    "choice": "choice",
    "open": "exact",
    "math": "math",
    "number": "number",
    "ocr": "ocr",
    "free_text": "rouge",
    "regression": "regression",
    "grounding": "grounding",
}
"""Kind of example -> what `answer` is for it, unless `scoring.by_kind` says otherwise."""


def expand_preset(rewards: Any) -> Any:
    """The rewards of a preset, by its name; anything else is itself.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(rewards, str):
        return rewards
    if rewards not in REWARD_PRESETS:
        raise ValueError(
            f"there is no preset {rewards!r}, expected {' or '.join(REWARD_PRESETS)}, or names with weights"
        )
    return REWARD_PRESETS[rewards]


def require_weights(weights: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: a weight is not finite, or nothing has one.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"rewards.{name}: the weight must be a finite number, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"rewards: at least one reward needs a weight other than 0, got {dict(weights)}")


def rewards_of(kind: str, weights: Mapping[str, float], scoring: ScoringConfig) -> list[str]:
    """What scores an example of a kind: the rewards that have a weight, and what `answer` is for it."""
    return [scoring.by_kind.get(kind) or BY_KIND[kind] if name == "answer" else name for name in weights]


def with_answer(weights: Mapping[str, float]) -> dict[str, float]:
    """What scores held-out examples: evaluation asks for `answer` whatever the run names, and calls it accuracy."""
    return {**weights, "answer": weights.get("answer", 0.0)}


def require_used(weights: Mapping[str, float], scoring: ScoringConfig) -> None:
    """
    Raises:
        ValueError: what `scoring` says of a reward that the run does not have.
    """
    used = {*scoring.by_kind.values()}.union(*(rewards_of(kind, weights, scoring) for kind in BY_KIND))
    for name in sorted({*scoring.options, *scoring.in_process} - used):
        raise ValueError(f"scoring: {name!r} is no reward of this run; these are {', '.join(sorted(used))}")


Weights = Annotated[dict[str, float], BeforeValidator(expand_preset)]


class ScoringConfig(Section):
    """Which reward scores what, and with which limits."""

    by_kind: dict[str, str] = Field(default={})
    """Kind of example -> the reward that `answer` is for it, instead of that in `BY_KIND`."""
    options: dict[str, dict[str, bool | int | float | str]] = Field(default={})
    """Reward name -> its keyword arguments."""
    in_process: tuple[str, ...] = ()
    """Rewards of your own that run in the run's process: late ones, and those that hold a model or count. All others of
    your own (`module:attr`, `file.py:attr`) and `math` run in worker processes: they may hang, crash or grow."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Worker processes, of each process that scores."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """What a call in a worker may take."""
    memory_gib: Annotated[float, Field(ge=0.25)] = 2.0
    """What a worker may have."""
    max_failures: Annotated[int, Field(ge=0)] = 100
    """The run stops when more of the last 1,000 responses that a reward was called for have failed, or the first 16
    all have, of several examples. The judge may be away for a while: it stops the run by the former alone, when a step
    ends, saved."""

    @field_validator("options")
    @classmethod
    def _judge_has_none(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if given := options.get("judge"):
            raise ValueError(
                f"judge has no options, got {', '.join(given)}; its settings are those of the section judge"
            )
        return options

    @field_validator("in_process")
    @classmethod
    def _are_outside(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if ":" not in name:
                raise ValueError(f"{name!r} is built in, expected rewards of your own, module:attr or file.py:attr")
        return names

    @field_validator("by_kind")
    @classmethod
    def _kinds_exist(cls, by_kind: dict[str, str]) -> dict[str, str]:
        for kind, name in by_kind.items():
            if kind not in KINDS:
                raise ValueError(f"there is no kind {kind!r}, expected one of {', '.join(KINDS)}")
            if name == "answer":
                raise ValueError(f"{kind} is scored by `answer`, which is what this says the meaning of; name another")
        return by_kind
