"""What an RL step adds up: over its groups, its updates and the ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from longrl.types import Group, Scored


@dataclass(slots=True)
class Mean:
    """Of the values that there were."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total += value
            self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Totals:
    """Sums over a step, and what the gradient is divided by."""

    denominator: int = 0
    loss_sum: float = 0.0
    trained_tokens: int = 0
    logprob_diff: float | None = None
    """Largest; None: nothing was compared."""
    stale_logprob_diff: float | None = None
    """Likewise, of rollouts that older weights than the policy's drew."""
    means: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    """Over rollouts or groups."""
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Over trained tokens."""
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What is reported as it is: calls, money."""

    @classmethod
    def sum(cls, parts: Sequence[Totals]) -> Totals:
        """Those of several ranks as one."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def add(self, part: Totals) -> None:
        self.denominator += part.denominator
        self.loss_sum += part.loss_sum
        self.trained_tokens += part.trained_tokens
        for name, mean in part.means.items():
            self.means[name].total += mean.total
            self.means[name].count += mean.count
        for mine, theirs in ((self.token_sums, part.token_sums), (self.sums, part.sums)):
            for name, value in theirs.items():
                mine[name] += value
        self.logprob_diff = _largest(self.logprob_diff, part.logprob_diff)
        self.stale_logprob_diff = _largest(self.stale_logprob_diff, part.stale_logprob_diff)

    @property
    def kept(self) -> int:
        """Groups that are trained: with dynamic sampling, those whose rewards differ."""
        return int(self.means["groups/kept"].total)

    def count(self, groups: Sequence[Group], scored: Sequence[list[Scored]]) -> None:
        for one in (one for group in scored for one in group):
            self.means["response/tokens"].add(len(one.rollout.token_ids))
            self.means["response/cut"].add(one.rollout.finish_reason == "length")
            self.means["reward/unscored"].add(one.reward is None)
            self.means["reward/failed"].add(bool(one.failed))
            self.means["reward/mean"].add(one.reward)
            for name, value in one.rewards.items():
                self.means[f"reward/{name}"].add(value)

    @property
    def counts(self) -> dict[str, float | None]:
        """What does not depend on training."""
        return {**{name: mean.value for name, mean in self.means.items()}, **self.sums}

    def metrics(self, updates: int = 1) -> dict[str, float | None]:
        """updates: so many passes over the batch the sums of losses and tokens are of; the denominator is of one."""
        return {
            "loss": self.loss_sum / (updates * self.denominator) if self.denominator else None,
            **self.counts,
            **{name: value / self.trained_tokens for name, value in self.token_sums.items()},
            "sampling/logprob_diff": self.logprob_diff,
            **({} if self.stale_logprob_diff is None else {"sampling/stale_logprob_diff": self.stale_logprob_diff}),
        }


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)
