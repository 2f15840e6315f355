"""Several rewards, one number: the weighted sum that advantages are computed from."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable

from longrl.registry import resolve
from longrl.rewards.answer import answer_reward
from longrl.rewards.format import format_reward
from longrl.types import Example, Group, Rollout, Scored

logger = logging.getLogger(__name__)

Reward = Callable[[Example, Rollout], float | None]

REWARDS: dict[str, Reward] = {
    "answer": answer_reward,
    "format": format_reward,
}


class Rewards:
    """Scores groups. `failures` counts, by reward name, the rollouts that a reward raised on."""

    def __init__(self, weights: dict[str, float]) -> None:
        if not weights or not any(weights.values()):
            raise ValueError(f"rewards: at least one reward needs a weight other than 0, got {weights}")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"rewards.{name}: the weight must be a finite number, got {weight}")
        self.weights = dict(weights)
        self.failures: Counter[str] = Counter()
        self._rewards: dict[str, Reward] = {name: resolve(name, REWARDS, "reward") for name in weights}

    def __call__(self, group: Group) -> list[Scored]:
        """The group's rollouts in their order, each with its rewards; advantages are still 0."""
        return [self._score(group.example, rollout) for rollout in group.rollouts]

    def _score(self, example: Example, rollout: Rollout) -> Scored:
        parts = {name: self._one(name, example, rollout) for name in self.weights}
        # A reward of weight 0 is only watched: it cannot keep a rollout from being trained.
        weighted = [
            None if (part := parts[name]) is None else weight * part for name, weight in self.weights.items() if weight
        ]
        known = [part for part in weighted if part is not None]
        return Scored(rollout=rollout, rewards=parts, reward=math.fsum(known) if len(known) == len(weighted) else None)

    def _one(self, name: str, example: Example, rollout: Rollout) -> float | None:
        try:
            value = self._rewards[name](example, rollout)
            if value is None:
                return None
            if not math.isfinite(value):
                raise ValueError(f"a reward must be a finite number, got {value}")
            return float(value)
        except Exception as error:  # noqa: BLE001 - a reward is user code: its failure must not end the run, nor pass for a 0
            self.failures[name] += 1
            logger.warning("reward %s of example %s failed: %s: %s", name, example.id, type(error).__name__, error)
            return None


def build_rewards(weights: dict[str, float]) -> Rewards:
    """The scoring function of a run.

    Args:
        weights: Reward name, or `package.module:attr`, -> weight.

    Returns:
        A callable `Group -> list[Scored]`: reward = sum of weight * part, or None if a part of non-zero weight is None.

    Raises:
        ValueError: Unknown name, non-finite weight, or nothing with a weight.
    """
    return Rewards(weights)
