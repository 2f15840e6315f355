"""Cohorts as they are scored: rewards, what is added to them, advantages. Late cohorts come last, without prefix."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from longrl.algo.advantages import ADVANTAGES, Advantage, assign_advantages
from longrl.algo.shaping import is_informative, overlong, shape, temporal
from longrl.config import RlConfig
from longrl.parallel.ranks import Ranks
from longrl.policy import Policy
from longrl.registry import resolve
from longrl.rewards.compose import Begun, Rewards
from longrl.totals import Totals
from longrl.types import Group, Prefix, Scored
from longrl.update import divergences


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A group with its rewards, and with those that it is compared with."""

    scored: list[Scored]
    greedy: Scored | None
    """Of the greedy response."""
    shuffled: list[Scored]
    """Of rollouts with shuffled frames."""


class Asked:
    """The rewards of a group that have been called; some may be late."""

    def __init__(self, rewards: Rewards, group: Group, shuffled: Begun | None) -> None:
        self.group = rewards.begin(group)
        self.greedy = rewards.begin(replace(group, rollouts=(group.greedy,))) if group.greedy else None
        self.shuffled = shuffled

    @property
    def is_late(self) -> bool:
        return any(one is not None and one.is_late for one in (self.group, self.greedy, self.shuffled))

    def result(self) -> Judged:
        """Waits."""
        return Judged(
            scored=self.group.result(),
            greedy=self.greedy.result()[0] if self.greedy else None,
            shuffled=self.shuffled.result() if self.shuffled else [],
        )


class Scoring:
    """One rank of those that share a prompt calls the rewards, and tells the others what came out."""

    def __init__(
        self,
        rewards: Rewards,
        config: RlConfig,
        ranks: Ranks,
        totals: Totals,
        time: Callable[[str], AbstractContextManager[None]],
        reference: Policy | None = None,
    ) -> None:
        """
        Args:
            totals: count all that is scored.
            time: called with "reward", gives the context in which rewards are made, and waited for.
            reference: of the KL term in the reward, if there is one.
        """
        self.rewards, self.config, self.ranks, self.totals, self.time = rewards, config, ranks, totals, time
        self.reference = reference
        self.advantage: Advantage = resolve(config.algo.advantage, ADVANTAGES, "advantage")
        self._waiting: deque[list[Asked]] = deque()
        """Late cohorts in their order, on the rank that judges."""
        self._shuffled: dict[str, deque[Begun]] = defaultdict(deque)
        """By group, on the rank that judges."""

    def compare_with(self, groups: Sequence[Group]) -> None:
        """Calls the rewards of rollouts with shuffled frames, before their prompts' own are scored."""
        with self.time("reward"):
            self.ranks.once(self._begin_shuffled, groups)

    def __call__(
        self, cohorts: Iterable[tuple[Sequence[Group], Prefix | None]]
    ) -> Iterator[tuple[Sequence[Group], list[list[Scored]], Prefix | None]]:
        """Yields what is to be trained of each cohort, with rewards and, if their scope is a group, advantages.

        With dynamic sampling the rollouts of a group whose rewards are all equal are counted, then given none: the
        group stays, as its prompt is part of what its cohort shares.

        A cohort with a reward that is a Future waits until all others have been decoded: whether the answer happens to
        be there already must not change the order in which gradients are added up. So does every cohort if the scope of
        advantages is the batch. Its prefix is released, and the update computes it again. Late cohorts keep their
        order, the same on all ranks that share their prompts.
        """
        late: list[tuple[Sequence[Group], list[Judged] | None]] = []
        for groups, prefix in cohorts:
            with self.time("reward"):
                judged = self.ranks.once(self._judge, groups)
            if judged is None or self.advantage.scope == "batch":
                _release(prefix)
                late.append((groups, judged))
                continue
            if kept := self._compare(groups, judged):
                yield *kept, prefix
            else:
                _release(prefix)
        for groups, judged in late:
            if judged is None:
                with self.time("reward"):
                    judged = self.ranks.once(self._wait)
            if kept := self._compare(groups, judged):
                yield *kept, None

    def _begin_shuffled(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._shuffled[group.id].append(self.rewards.begin(group))

    def _judge(self, groups: Sequence[Group]) -> list[Judged] | None:
        """None: some reward is late."""
        asked = [Asked(self.rewards, group, self._take_shuffled(group)) for group in groups]
        if any(one.is_late for one in asked):
            self._waiting.append(asked)
            return None
        return [one.result() for one in asked]

    def _take_shuffled(self, group: Group) -> Begun | None:
        waiting = self._shuffled[group.id]
        return waiting.popleft() if waiting else None

    def _wait(self) -> list[Judged]:
        return [one.result() for one in self._waiting.popleft()]

    def _compare(
        self, groups: Sequence[Group], judged: Sequence[Judged]
    ) -> tuple[Sequence[Group], list[list[Scored]]] | None:
        """On all ranks: shapes the rewards and assigns advantages; None: no group is to be trained."""
        algo = self.config.algo
        scored = self._shape(groups, judged)
        self.totals.count(groups, scored)
        if algo.max_refills:
            kept = [self._has_signal(one) for one in judged]
            for keep in kept:
                self.totals.means["groups/kept"].add(keep)
            if not any(kept):
                return None
            scored = [ones if keep else _unscored(ones) for ones, keep in zip(scored, kept, strict=True)]
        if self.advantage.scope == "group":
            scored = [
                assign_advantages(ones, algo.advantage, one.greedy.reward if one.greedy else None)
                for ones, one in zip(scored, judged, strict=True)
            ]
        return groups, scored

    def _has_signal(self, one: Judged) -> bool:
        """Whether there are rewards that differ, from the greedy response's if they are compared with that."""
        if not self.advantage.greedy:
            return is_informative(one.scored)
        return one.greedy is not None and one.greedy.reward is not None and is_informative([*one.scored, one.greedy])

    def _shape(self, groups: Sequence[Group], judged: Sequence[Judged]) -> list[list[Scored]]:
        algo, limit = self.config.algo, self.config.rollout.max_new_tokens
        scored = [one.scored for one in judged]
        if self.advantage.greedy:  # without what they are compared with they have no reward to compare
            scored = [
                one.scored if one.greedy and one.greedy.reward is not None else _unscored(one.scored) for one in judged
            ]
        if algo.shuffled_rollouts:
            bonus = [temporal(one.scored, one.shuffled, algo.accuracy, algo.temporal_bonus) for one in judged]
            scored = [shape(ones, "temporal", values) for ones, values in zip(scored, bonus, strict=True)]
        if (buffer := algo.overlong_buffer) is not None:
            scored = [
                shape(ones, "overlong", [overlong(len(one.rollout.token_ids), limit, buffer) for one in ones])
                for ones in scored
            ]
        if algo.kl_in_reward:
            assert self.reference is not None, "algo.kl_in is reward, but there is no reference"
            penalties = divergences(self.reference, groups, scored, self.config)
            scored = [
                shape(ones, "kl", [-algo.kl_coef * value for value in values])
                for ones, values in zip(scored, penalties, strict=True)
            ]
        return scored


def _release(prefix: Prefix | None) -> None:
    if prefix is not None:
        prefix.release()


def _unscored(scored: Sequence[Scored]) -> list[Scored]:
    return [replace(one, reward=None) for one in scored]
