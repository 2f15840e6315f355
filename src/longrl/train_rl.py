"""The RL loop. Invariants:

- a group stays whole: its statistics are local, nothing moves between groups;
- each video's prefix is computed once: it serves decoding and the update alike;
- gradients are summed over the step and all ranks, and divided once, by the global count;
- ranks that share a prompt make the same calls, data-parallel ranks meet at the end of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from longrl.algo.advantages import ADVANTAGES, assign_advantages
from longrl.algo.losses import LOSSES, denominator, policy_loss
from longrl.config import RlConfig
from longrl.data.examples import Skips, load_examples
from longrl.evals.runner import evaluate, load_questions
from longrl.models.streams import Streams, make_streams
from longrl.optim import require_finite
from longrl.parallel.ranks import ALONE, Ranks
from longrl.policy import Policy, StreamLoss, load_reference
from longrl.registry import resolve
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.runtime import seed_for
from longrl.training import Training
from longrl.types import Example, Group, LossInputs, Prefix, Scored


def train_rl(config: RlConfig, ranks: Ranks = ALONE) -> Path:
    """Trains on `data.train` by group-relative policy gradients; resumes where the run directory left off.

    Args:
        config: of the run.
        ranks: the processes that do it together, each of which calls this (`start_ranks`).

    Returns:
        The Hugging Face folder of the last checkpoint.

    Raises:
        ValueError: bad data or configuration.
        RuntimeError: a loss or gradient is not finite, or engine and trainer disagree about log-probs.
    """
    skips, eval_skips, seed = Skips(config.data), Skips(config.data), config.runtime.seed
    examples = _questions(config, skips)
    held_out = load_questions(config, eval_skips) if config.eval_every_steps else []
    score = build_rewards(config.rewards)
    resolve(config.algo.advantage, ADVANTAGES, "advantage")
    resolve(config.algo.loss, LOSSES, "loss")
    training = Training(config, skips, ranks)
    policy = training.policy
    reference = load_reference(policy, config, ranks)

    def judge(groups: Sequence[Group]) -> list[list[Scored]]:
        return [assign_advantages(score(group), config.algo.advantage) for group in groups]

    with training.metrics() as metrics, training.progress("rl") as progress:
        engine = NativeEngine(policy, config.rollout, metrics.time)
        for step in training.steps_left():
            with metrics.step(step):
                with metrics.time("media"):
                    batch = training.draw(examples, step)
                named = zip(batch.epochs, batch.examples, strict=True)
                seeds = [seed_for(seed, "rollout", step, epoch, example.id) for epoch, example in named]
                totals = Totals()
                for groups, prefix in engine.rollout(batch.examples, batch.prompts, seeds):
                    with metrics.time("reward"):
                        scored = ranks.once(judge, groups)
                    totals.count(groups, scored)
                    with metrics.time("update"):
                        update(policy, reference, groups, scored, prefix, config, totals)
                with metrics.time("optimizer"):
                    totals = Totals.sum(ranks.gather(totals))
                    norm, lr = training.update(step, totals.denominator, batch.ids)
                for name, value in (totals.metrics() | {"grad_norm": norm, "lr": lr}).items():
                    metrics.log(name, value)
                metrics.log("cache/hit_rate", training.build.hit_rate)
                metrics.log("data/skipped", len(skips.names))
                if held_out and training.is_due(step, config.eval_every_steps):
                    with metrics.time("evaluation"):
                        result = evaluate(policy, held_out, config, eval_skips, stage=f"step {step}", ranks=ranks)
                    metrics.log("eval/accuracy", result.overall.accuracy)
            progress.update(metrics.last)
            training.save_if_due(step)
    return training.last_model()


def _questions(config: RlConfig, skips: Skips) -> list[Example]:
    if config.data.train is None:
        raise ValueError("data.train is not set; reinforcement learning needs a JSONL file of questions with answers")
    return load_examples(config.data.train, config.data, config.video, skips)


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
    means: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    """Over rollouts or groups."""
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Over trained tokens."""

    @classmethod
    def sum(cls, parts: Sequence[Totals]) -> Totals:
        """Those of several ranks as one."""
        whole = cls()
        for part in parts:
            whole.denominator += part.denominator
            whole.loss_sum += part.loss_sum
            whole.trained_tokens += part.trained_tokens
            for name, mean in part.means.items():
                whole.means[name].total += mean.total
                whole.means[name].count += mean.count
            for name, value in part.token_sums.items():
                whole.token_sums[name] += value
        whole.logprob_diff = max((p.logprob_diff for p in parts if p.logprob_diff is not None), default=None)
        return whole

    def count(self, groups: Sequence[Group], scored: Sequence[list[Scored]]) -> None:
        for one in (one for group in scored for one in group):
            self.means["response/tokens"].add(len(one.rollout.token_ids))
            self.means["response/cut"].add(one.rollout.finish_reason == "length")
            self.means["reward/unscored"].add(one.reward is None)
            self.means["reward/mean"].add(one.reward)
            for name, value in one.rewards.items():
                self.means[f"reward/{name}"].add(value)

    def metrics(self) -> dict[str, float | None]:
        return {
            "loss": self.loss_sum / self.denominator if self.denominator else None,
            **{name: mean.value for name, mean in self.means.items()},
            **{name: value / self.trained_tokens for name, value in self.token_sums.items()},
            "sampling/logprob_diff": self.logprob_diff,
        }


def update(
    policy: Policy,
    reference: Policy | None,
    groups: Sequence[Group],
    scored: Sequence[list[Scored]],
    prefix: Prefix,
    config: RlConfig,
    totals: Totals,
) -> None:
    """Accumulates the gradient of one cohort's groups and releases their prefix.

    Every scored rollout counts in the denominator; those of a group without signal (all advantages zero and no KL term)
    are not run.

    Raises:
        RuntimeError: engine and trainer log-probs differ by more than algo.max_logprob_diff, or the loss is not finite.
    """
    rows: list[tuple[Group, Scored]] = []
    for group, ones in zip(groups, scored, strict=True):
        trained = [(group, one) for one in ones if one.reward is not None]
        lengths = [len(one.rollout.token_ids) for _, one in trained]
        totals.denominator += denominator(lengths, config.algo.normalise)
        informative = reference is not None or any(one.advantage for one in ones)
        totals.means["groups/informative"].add(informative)
        rows += trained if informative else []
    if not rows:
        prefix.release()
        return
    streams = make_streams(
        [group.prompt for group, _ in rows], [one.rollout.token_ids for _, one in rows], prefix.length
    )
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_prefix = reference.prefix([group.prompt for group in groups])
            assert ref_prefix.length == prefix.length
            ref_logprobs, _ = reference.logprobs(ref_prefix, streams, config.rollout.temperature)
            reference.reshard()
    loss = _loss(rows, streams, ref_logprobs, config, totals)
    policy.backward(prefix, streams, loss, config.rollout.temperature)


def _loss(
    rows: Sequence[tuple[Group, Scored]],
    streams: Streams,
    ref_logprobs: Tensor | None,
    config: RlConfig,
    totals: Totals,
) -> StreamLoss:
    """The loss of the streams, of which row n is rollout rows[n]; it checks them before they are differentiated."""
    engine = torch.zeros(streams.mask.shape, dtype=torch.float64)
    engine[streams.mask] = torch.tensor([x for _, one in rows for x in one.rollout.logprobs], dtype=torch.float64)
    advantages = torch.tensor([one.advantage for _, one in rows])
    ids = sorted({group.id for group, _ in rows})

    def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        mask = streams.mask[part]
        difference = (logprobs.detach() - engine[part])[mask].abs().max().item()
        if not difference <= config.algo.max_logprob_diff:  # true of NaN too
            raise RuntimeError(
                f"engine and trainer log-probs differ by {difference:.2e}, more than algo.max_logprob_diff "
                f"{config.algo.max_logprob_diff:g} (groups {', '.join(ids)}); the weights were not changed"
            )
        totals.logprob_diff = max(totals.logprob_diff or 0.0, difference)
        # one update a batch: the sampling policy is the current one
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[part],
            advantages=advantages[part],
            mask=mask,
        )
        output = policy_loss(inputs, config.algo)
        loss_sum = output.loss_sum.item()
        require_finite("the loss", loss_sum, ids)
        totals.loss_sum += loss_sum
        totals.trained_tokens += int(mask.sum())
        totals.token_sums["entropy"] += entropy.sum().item()
        for name, value in output.metrics.items():
            totals.token_sums[name] += value
        return output.loss_sum

    return loss
