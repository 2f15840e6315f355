"""Cohorts as they are scored: rewards, then advantages. Those with late rewards come last, without their prefix."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from longrl.algo.advantages import assign_advantages
from longrl.parallel.ranks import Ranks
from longrl.rewards.compose import Begun, Rewards
from longrl.types import Group, Prefix, Scored


class Scoring:
    """One rank of those that share a prompt calls the rewards, and tells the others what came out."""

    def __init__(
        self, rewards: Rewards, advantage: str, ranks: Ranks, time: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        """
        Args:
            advantage: of `ADVANTAGES`, or `package.module:attr`.
            time: called with "reward", gives the context in which rewards are made, and waited for.
        """
        self.rewards, self.advantage, self.ranks, self.time = rewards, advantage, ranks, time
        self._waiting: deque[list[Begun]] = deque()
        """Late cohorts in their order, on the rank that judges."""

    def __call__(
        self, cohorts: Iterable[tuple[Sequence[Group], Prefix]]
    ) -> Iterator[tuple[Sequence[Group], list[list[Scored]], Prefix | None]]:
        """Yields each cohort with its rewards and advantages.

        A cohort with a reward that is a Future waits until all others have been decoded: whether the answer happens to
        be there already must not change the order in which gradients are added up. Its prefix is released, and the
        update computes it again. Late cohorts keep their order, the same on all ranks that share their prompts.
        """
        late: list[Sequence[Group]] = []
        for groups, prefix in cohorts:
            with self.time("reward"):
                scored = self.ranks.once(self._judge, groups)
            if scored is None:
                prefix.release()
                late.append(groups)
            else:
                yield groups, scored, prefix
        for groups in late:
            with self.time("reward"):
                scored = self.ranks.once(self._wait)
            yield groups, scored, None

    def _judge(self, groups: Sequence[Group]) -> list[list[Scored]] | None:
        """None: some reward is late."""
        begun = [self.rewards.begin(group) for group in groups]
        if any(one.is_late for one in begun):
            self._waiting.append(begun)
            return None
        return self._assign(begun)

    def _wait(self) -> list[list[Scored]]:
        return self._assign(self._waiting.popleft())

    def _assign(self, begun: list[Begun]) -> list[list[Scored]]:
        return [assign_advantages(one.result(), self.advantage) for one in begun]
