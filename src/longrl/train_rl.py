"""The RL loop. Invariants:

- a group stays whole: its statistics are local, nothing moves between groups;
- each video's prefix is computed once: it serves decoding and the update alike;
- gradients are summed over the step and divided once, by the global count.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from longrl.algo.advantages import assign_advantages
from longrl.algo.losses import policy_loss
from longrl.checkpoint import FOLDER, Checkpoints, pack_optimizer, unpack_optimizer
from longrl.config import RlConfig
from longrl.data.examples import load_examples
from longrl.data.order import step_examples
from longrl.data.prompts import PromptBuilder
from longrl.models import load_family
from longrl.models.streams import make_streams
from longrl.optim import Optimizer
from longrl.policy import Policy
from longrl.report.metrics import Metrics
from longrl.report.progress import Progress
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.runtime import seed_for, start_run
from longrl.types import Group, LossInputs, Prefix, Scored

logger = logging.getLogger(__name__)


def train_rl(config: RlConfig) -> Path:
    """Trains on `data.train` by group-relative policy gradients; resumes where the run directory left off.

    Returns:
        The Hugging Face folder of the last checkpoint.

    Raises:
        ValueError: bad data or configuration.
        RuntimeError: a gradient is not finite, or engine and trainer disagree about log-probs.
    """
    run_dir, seed = start_run(config, config.runtime), config.runtime.seed
    checkpoints = Checkpoints(run_dir / FOLDER, config.checkpoint.keep)
    latest = checkpoints.latest()
    family = load_family(config.model.at(latest.model_path) if latest else config.model, seed)
    if config.data.train is None:
        raise ValueError("data.train is not set; reinforcement learning needs a JSONL file of questions with answers")
    examples = load_examples(config.data.train, config.data, config.video)
    policy = Policy(family, recompute=config.model.recompute)
    reference = None if config.algo.kl == "off" else Policy(load_family(config.model, seed))
    score = build_rewards(config.rewards)
    optimizer = Optimizer(policy.trunk.parameters(), config.optim, config.steps)
    if latest:
        unpack_optimizer(optimizer.adamw, latest.tensors())
    done = policy.version = latest.step if latest else 0

    build = PromptBuilder(family, config)
    with Metrics(run_dir, config.runtime.tensorboard, done + 1) as metrics, Progress("rl", config.steps) as progress:
        engine = NativeEngine(policy, config.rollout, metrics.time)
        for step in range(done + 1, config.steps + 1):
            with metrics.step(step):
                batch = step_examples(examples, step, config.prompts_per_step, config.data.share_media, seed)
                with metrics.time("media"):
                    batch, prompts = build(batch)
                seeds = [seed_for(seed, "rollout", step, example.id) for example in batch]
                totals = Totals()
                for groups, prefix in engine.rollout(batch, prompts, seeds):
                    with metrics.time("reward"):
                        scored = [assign_advantages(score(group), config.algo.advantage) for group in groups]
                    totals.count(groups, scored)
                    with metrics.time("update"):
                        update(policy, reference, groups, scored, prefix, config, totals)
                with metrics.time("optimizer"):
                    norm, lr = optimizer.step(step, totals.denominator)
                policy.version = step
                for name, value in (totals.metrics() | {"grad_norm": norm, "lr": lr}).items():
                    metrics.log(name, value)
                metrics.log("cache/hit_rate", build.cache.hit_rate)
                metrics.log("data/skipped", len(build.skips.names))
            progress.update(metrics.last)
            every = config.checkpoint.every_steps
            if step == config.steps or (every and step % every == 0):
                checkpoints.save(step, family.save, pack_optimizer(optimizer.adamw), {"policy_version": step})
    last = checkpoints.latest()
    assert last is not None
    return last.model_path


@dataclass(slots=True)
class Totals:
    """Sums over a step, and what the gradient is divided by."""

    denominator: int = 0
    rollouts: int = 0
    groups: int = 0
    informative: int = 0
    trained_tokens: int = 0
    logprob_diff: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Over rollouts."""
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Over trained tokens."""

    def count(self, groups: Sequence[Group], scored: Sequence[list[Scored]]) -> None:
        self.groups += len(groups)
        for one in (one for group in scored for one in group):
            self.rollouts += 1
            self.sums["response/tokens"] += len(one.rollout.token_ids)
            self.sums["response/cut"] += one.rollout.finish_reason == "length"
            self.sums["reward/unscored"] += one.reward is None
            self.sums["reward/mean"] += one.reward or 0.0
            for name, value in one.rewards.items():
                self.sums[f"reward/{name}"] += value or 0.0

    def metrics(self) -> dict[str, float]:
        scored = self.rollouts - self.sums["reward/unscored"]
        by_rollout = {
            name: value / max(scored if name.startswith("reward/") and name != "reward/unscored" else self.rollouts, 1)
            for name, value in self.sums.items()
        }
        by_token = {name: value / max(self.trained_tokens, 1) for name, value in self.token_sums.items()}
        return {
            "loss": by_token.pop("loss", 0.0),
            **by_rollout,
            **by_token,
            "groups/informative": self.informative / max(self.groups, 1),
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
        RuntimeError: engine and trainer log-probs differ by more than algo.max_logprob_diff.
    """
    totals.denominator += _denominator(scored, config)
    learns = [reference is not None or any(one.advantage for one in group) for group in scored]
    totals.informative += sum(learns)
    rows = [
        (group.prompt, one)
        for group, ones, useful in zip(groups, scored, learns, strict=True)
        for one in ones
        if useful and one.reward is not None
    ]
    if not rows:
        prefix.release()
        return
    streams = make_streams([prompt for prompt, _ in rows], [one.rollout.token_ids for _, one in rows], prefix.length)
    engine = torch.zeros(streams.mask.shape, dtype=torch.float64)
    engine[streams.mask] = torch.tensor([x for _, one in rows for x in one.rollout.logprobs], dtype=torch.float64)
    advantages = torch.tensor([one.advantage for _, one in rows])
    temperature = config.rollout.temperature
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_prefix = reference.prefix([group.prompt for group in groups])
            assert ref_prefix.length == prefix.length
            ref_logprobs, _ = reference.logprobs(ref_prefix, streams, temperature)

    def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        mask = streams.mask[part]
        difference = ((logprobs.detach() - engine[part]).abs() * mask).max().item()
        totals.logprob_diff = max(totals.logprob_diff, difference)
        # one update a batch: the sampling policy is the current one
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[part],
            advantages=advantages[part],
            mask=mask,
        )
        output = policy_loss(inputs, config.algo)
        totals.trained_tokens += int(mask.sum())
        totals.token_sums["loss"] += output.loss_sum.item()
        totals.token_sums["entropy"] += entropy.sum().item()
        for name, value in output.metrics.items():
            totals.token_sums[name] += value
        return output.loss_sum

    policy.backward(prefix, streams, loss, temperature)
    if not totals.logprob_diff <= config.algo.max_logprob_diff:
        raise RuntimeError(
            f"engine and trainer log-probs differ by {totals.logprob_diff:.2e}, more than algo.max_logprob_diff "
            f"{config.algo.max_logprob_diff:g} (groups {', '.join(group.id for group in groups)}); the weights were "
            "not changed"
        )


def _denominator(scored: Sequence[list[Scored]], config: RlConfig) -> int:
    lengths = [len(one.rollout.token_ids) for group in scored for one in group if one.reward is not None]
    return sum(lengths) if config.algo.normalise == "token" else len(lengths)
