"""The first update of a step: rollouts, rewards and advantages -> gradients, cohort by cohort.

Further passes over the same prompts are made where an algorithm asks for them:

    shuffled_rollouts   each video with its frames shuffled, first, without gradients   (T-GRPO)
    max_refills         other examples for those whose rewards do not differ            (DAPO)
    scope batch         the prefixes again, once the last group of the step is scored   (REINFORCE++)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from longrl.algo.advantages import ADVANTAGES, Advantage, batch_advantages, fill, known
from longrl.config import RlConfig
from longrl.evals.controls import shuffled
from longrl.policy import Policy
from longrl.registry import resolve
from longrl.rewards.compose import Rewards
from longrl.rollout.engine import Engine
from longrl.scoring import Scoring
from longrl.totals import Totals
from longrl.training import Batch, Share
from longrl.types import Group, Prefix, Scored
from longrl.update import Cohort, update

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Part:
    """What came of a share: of the step's batch, or of a refill."""

    share: Share
    totals: Totals = field(default_factory=Totals)
    cohorts: list[Cohort] = field(default_factory=list)
    """What further updates need."""
    waiting: list[tuple[Sequence[Group], list[list[Scored]]]] = field(default_factory=list)
    """Scored groups whose advantages need the whole batch."""


def gather(parts: Sequence[Part], value: Callable[[Part], T]) -> list[T]:
    """Something of each part, of all ranks, on each; those that share prompts count once."""
    return [x for part in parts for x in part.share.ranks.gather(value(part))]


class FirstUpdate:
    """Called once a step, on every rank."""

    def __init__(
        self,
        engine: Engine,
        with_shuffled: Engine | None,
        reference: Policy | None,
        rewards: Rewards,
        config: RlConfig,
    ) -> None:
        """
        Args:
            with_shuffled: the engine for shuffled frames, if there are to be rollouts with them.
            reference: if there is a KL term.
        """
        self.engine, self.with_shuffled, self.reference = engine, with_shuffled, reference
        self.rewards, self.config = rewards, config
        self.advantage: Advantage = resolve(config.algo.advantage, ADVANTAGES, "advantage")

    def __call__(self, step: int, batch: Batch, refill: Callable[[int, int], Batch | None]) -> list[Part]:
        """Accumulates the gradient of a step's batch.

        Args:
            refill: (examples drawn in earlier refills, how many more) -> so many other examples, or fewer; None: there
                are no others.
        """
        parts, drawn = [self._learn(step, share) for share in batch.shares], 0
        for _ in range(self.config.algo.max_refills):
            missing = self.config.prompts_per_step - sum(gather(parts, lambda part: part.totals.kept))
            if missing <= 0:
                break
            with self.engine.time("media"):
                more = refill(drawn, missing)
            if more is None:
                break
            drawn += missing
            parts += [self._learn(step, share) for share in more.shares]
        if self.advantage.scope == "batch":
            self._compare_all(parts)
        return parts

    def _learn(self, step: int, share: Share) -> Part:
        """Samples and scores a share, and accumulates the gradient of what need not wait for other shares."""
        part, engine, config = Part(share=share), self.engine, self.config
        self._share_with(share)
        score = Scoring(self.rewards, config, share.ranks, part.totals, engine.time, self.reference)
        if self.with_shuffled:
            self._roll_shuffled(self.with_shuffled, score, step, share)
        seeds = share.seeds(config.runtime.seed, "rollout", step)
        for groups, scored, prefix in score(self._fresh(engine.rollout(share.examples, share.prompts, seeds))):
            if self.advantage.scope == "batch":
                part.waiting.append((groups, scored))
            else:
                with engine.time("update"):
                    part.cohorts += update(engine.policy, self._in_loss, groups, scored, prefix, config, part.totals)
        part.totals.add(self.rewards.take())
        self.rewards.require_judge(share.ranks)
        return part

    def _roll_shuffled(self, engine: Engine, score: Scoring, step: int, share: Share) -> None:
        """Only of prompts with a video. Those about the same one see the same order, and so share a prefix."""
        names = (self.config.runtime.seed, step)
        seeds = share.seeds(self.config.runtime.seed, "shuffled", step)
        media = [tuple(shuffled(one, *names) for one in prompt.media) for prompt in share.prompts]
        chosen = [
            (example, replace(prompt, media=changed), seed)
            for example, prompt, changed, seed in zip(share.examples, share.prompts, media, seeds, strict=True)
            if any(one is not before for one, before in zip(changed, prompt.media, strict=True))
        ]
        examples, prompts, seeds = zip(*chosen, strict=True) if chosen else ((), (), ())
        with torch.no_grad():
            for groups, prefix in engine.rollout(examples, prompts, seeds):
                if prefix is not None:
                    prefix.release()
                score.compare_with(groups)

    def _fresh(
        self, cohorts: Iterable[tuple[tuple[Group, ...], Prefix | None]]
    ) -> Iterator[tuple[tuple[Group, ...], Prefix | None]]:
        """The same.

        Raises:
            RuntimeError: rollouts of weights that are older than `rollout.max_staleness` allows, or not yet there.
        """
        version, most = self.engine.policy.version, self.config.rollout.max_staleness
        for groups, prefix in cohorts:
            for group in groups:
                for drawn_by in {one.policy_version for one in (*group.rollouts, group.greedy) if one}:
                    if not 0 <= version - drawn_by <= most:
                        raise RuntimeError(
                            f"group {group.id}: rollouts of weights version {drawn_by}, the policy's is {version}, and "
                            f"rollout.max_staleness {most}; the weights were not changed"
                        )
            yield groups, prefix

    def _compare_all(self, parts: Sequence[Part]) -> None:
        """Advantages over the whole step, then its gradients."""
        rewards = [
            part.share.ranks.gather([known(ones) for _, scored in part.waiting for ones in scored]) for part in parts
        ]
        flat = [group for by_rank in rewards for groups in by_rank for group in groups]
        advantages = iter(batch_advantages(flat, self.advantage))
        assigned = [[[next(advantages) for _ in groups] for groups in by_rank] for by_rank in rewards]
        for part, by_rank in zip(parts, assigned, strict=True):
            self._share_with(part.share)
            mine = iter(by_rank[part.share.ranks.dp_rank])
            for groups, scored in part.waiting:
                filled = [fill(ones, next(mine)) for ones in scored]
                with self.engine.time("update"):
                    part.cohorts += update(
                        self.engine.policy, self._in_loss, groups, filled, None, self.config, part.totals
                    )
            part.waiting.clear()

    @property
    def _in_loss(self) -> Policy | None:
        return self.reference if self.config.algo.kl_in_loss else None

    def _share_with(self, share: Share) -> None:
        for one in (self.engine.policy, self.reference) if self.reference else (self.engine.policy,):
            one.share_with(share.ranks.sp)
