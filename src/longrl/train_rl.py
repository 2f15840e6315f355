"""The RL loop. Invariants:

- a group stays whole: its statistics are local, nothing moves between groups;
- each video's prefix is computed once: it serves decoding and the first update alike;
- a group that waits, for its rewards, for other groups or for another update, holds no keys and values;
- gradients are summed over the batch and all ranks, and divided once, by the global count;
- ranks that share a prompt make the same calls, data-parallel ranks meet at the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from longrl.algo.advantages import ADVANTAGES, Advantage, require_group_size
from longrl.algo.losses import LOSSES
from longrl.config import RlConfig
from longrl.data.examples import Skips, load_examples
from longrl.evals.runner import evaluate, load_questions
from longrl.first_update import FirstUpdate, Part, gather
from longrl.parallel.ranks import ALONE, Ranks
from longrl.policy import load_reference
from longrl.registry import resolve
from longrl.report.metrics import Metrics
from longrl.rewards.compose import Rewards, build_rewards
from longrl.rollout.ahead import Ahead
from longrl.rollout.engine import build_engine, settle_engine
from longrl.rollout.vllm_rules import VLLM_ROOM
from longrl.totals import Totals
from longrl.training import Batch, Training
from longrl.types import Example
from longrl.update import update_again


def train_rl(config: RlConfig, ranks: Ranks = ALONE) -> Path:
    """Trains on `data.train` by policy gradients; resumes where the run directory left off.

    Args:
        config: of the run.
        ranks: the processes that do it together, each of which calls this (`start_ranks`).

    Returns:
        The Hugging Face folder of the last checkpoint.

    Raises:
        ValueError: bad data or configuration.
        RuntimeError: a loss or gradient is not finite, or engine and trainer disagree about log-probs.
    """
    asked, config = config, settle_engine(config, ranks)
    skips, eval_skips = Skips(config.data), Skips(config.data)
    examples = _questions(config, skips)
    held_out = load_questions(config, eval_skips) if config.eval_every_steps else []
    rewards, advantage = _scoring(config, examples, held_out, ranks)
    training = Training(config, skips, ranks, asked)
    policy = training.policy
    reference = load_reference(policy, config, ranks)

    with (
        training.metrics() as metrics,
        training.progress("rl") as progress,
        closing(build_engine(config, policy, metrics.time, ranks, greedy=advantage.greedy)) as engine,
    ):
        training.build.limit_to(engine.longest_prompt, engine.longest_clip, VLLM_ROOM)
        with_shuffled = None
        if count := config.algo.shuffled_rollouts:
            with_shuffled = engine.resampled(config.rollout.model_copy(update={"group_size": count}))
        first_update = FirstUpdate(engine, with_shuffled, reference, rewards, config)
        ahead = Ahead(engine, training, examples) if config.rollout.max_staleness else None
        training.pending = ahead and ahead.pending
        for step in training.steps_left():
            with metrics.step(step):
                with metrics.time("media"):
                    batch = ahead.draw(step) if ahead else training.draw(examples, step)
                with training.kept(step - 1):
                    rewards.require_judge(ranks)  # lost in evaluation
                    if ahead:
                        ahead(step, batch)
                    parts = first_update(step, batch, partial(training.refill, examples, step))
                norm, lr = _update(training, step, batch, parts, config, metrics)
                engine.update_weights()
                totals = Totals.sum(gather(parts, lambda part: part.totals))
                loop = {"grad_norm": norm, "lr": lr, "cache/hit_rate": training.build.hit_rate}
                loop["data/skipped"] = len(skips.names)
                for name, value in (totals.metrics(config.algo.updates_per_batch) | loop).items():
                    metrics.log(name, value)
                if held_out and training.is_due(step, config.eval_every_steps):
                    with metrics.time("evaluation"):
                        result = evaluate(
                            policy, held_out, config, eval_skips, rewards, stage=f"step {step}", ranks=ranks
                        )
                    found = {"accuracy": result.overall.accuracy, "unscored": result.unscored}
                    for name, value in (found | result.asked).items():
                        metrics.log(f"eval/{name}", value)
            progress.update(metrics.last)
            training.save_if_due(step)
    return training.last_model()


def _scoring(
    config: RlConfig, examples: Sequence[Example], held_out: Sequence[Example], ranks: Ranks
) -> tuple[Rewards, Advantage]:
    """Of names and data that have been looked at, before a model is loaded.

    Raises:
        ValueError: an example that cannot be scored, an unknown name, a group that is too small, a judge not there.
    """
    evaluates = config.eval_every_steps > 0
    rewards = build_rewards(config.rewards, config.scoring, config.judge, ranks.dp_size, evaluates=evaluates)
    rewards.require(examples, held_out, expressions=ranks.is_main)
    advantage: Advantage = resolve(config.algo.advantage, ADVANTAGES, "advantage")
    require_group_size(config.algo.advantage, advantage, config.rollout.group_size)
    resolve(config.algo.loss, LOSSES, "loss")
    if ranks.is_main:
        rewards.check()
    return rewards, advantage


def _update(
    training: Training, step: int, batch: Batch, parts: Sequence[Part], config: RlConfig, metrics: Metrics
) -> tuple[float, float]:
    """All optimizer steps of a batch: the gradient of the first is there, the others compute theirs.

    Returns:
        The mean norm of the gradients, and the learning rate.
    """
    count = sum(gather(parts, lambda part: part.totals.denominator))
    norms, lr = [], 0.0
    for update in range(config.algo.updates_per_batch):
        if update:
            with metrics.time("update"):
                for part in parts:
                    training.policy.share_with(part.share.ranks.sp)
                    for cohort in part.cohorts:
                        update_again(training.policy, cohort, config, part.totals)
        with metrics.time("optimizer"):
            norm, lr = training.update(step, count, batch.ids)
            norms.append(norm)
    return sum(norms) / len(norms), lr


def _questions(config: RlConfig, skips: Skips) -> list[Example]:
    if config.data.train is None:
        raise ValueError("data.train is not set; reinforcement learning needs questions with answers")
    return load_examples(config.data.train, config.data, config.video, skips, cache=config.cache)
