"""Supervised fine-tuning: examples about the same video share its prefix, each demonstrated response is a stream."""

from __future__ import annotations

import logging
from pathlib import Path

from longrl.checkpoint import FOLDER, Checkpoints, pack_optimizer, unpack_optimizer
from longrl.config import SftConfig
from longrl.data.examples import load_examples
from longrl.data.order import step_examples
from longrl.data.prompts import PromptBuilder
from longrl.models import load_family
from longrl.models.streams import cohorts, make_streams
from longrl.optim import Optimizer
from longrl.policy import Policy
from longrl.report.metrics import Metrics
from longrl.report.progress import Progress
from longrl.runtime import start_run
from longrl.types import Example, Prompt

logger = logging.getLogger(__name__)


def train_sft(config: SftConfig) -> Path:
    """Trains on `data.train`, whose rows must have a `response`; resumes where the run directory left off.

    Returns:
        The Hugging Face folder of the last checkpoint.

    Raises:
        ValueError: bad data or configuration.
        RuntimeError: a gradient is not finite.
    """
    run_dir = start_run(config, config.runtime)
    checkpoints = Checkpoints(run_dir / FOLDER, config.checkpoint.keep)
    latest = checkpoints.latest()
    family = load_family(config.model.at(latest.model_path) if latest else config.model, config.runtime.seed)
    examples = _demonstrated(config)
    policy = Policy(family, recompute=config.model.recompute)
    optimizer = Optimizer(policy.trunk.parameters(), config.optim, config.steps)
    if latest:
        unpack_optimizer(optimizer.adamw, latest.tensors())
    build, done = PromptBuilder(family, config), latest.step if latest else 0

    with Metrics(run_dir, config.runtime.tensorboard, done + 1) as metrics, Progress("sft", config.steps) as progress:
        for step in range(done + 1, config.steps + 1):
            with metrics.step(step):
                batch = step_examples(
                    examples, step, config.prompts_per_step, config.data.share_media, config.runtime.seed
                )
                with metrics.time("media"):
                    batch, prompts = build(batch)
                with metrics.time("update"):
                    loss, tokens = _backward(policy, batch, prompts)
                    norm, lr = optimizer.step(step, tokens)
                for name, value in (
                    ("loss", loss / max(tokens, 1)),
                    ("response/tokens", tokens / max(len(batch), 1)),
                    ("grad_norm", norm),
                    ("lr", lr),
                    ("cache/hit_rate", build.cache.hit_rate),
                    ("data/skipped", len(build.skips.names)),
                ):
                    metrics.log(name, value)
            progress.update(metrics.last)
            every = config.checkpoint.every_steps
            if step == config.steps or (every and step % every == 0):
                checkpoints.save(step, family.save, pack_optimizer(optimizer.adamw), {"policy_version": step})
    last = checkpoints.latest()
    assert last is not None
    return last.model_path


def _demonstrated(config: SftConfig) -> list[Example]:
    if config.data.train is None:
        raise ValueError("data.train is not set; supervised fine-tuning needs a JSONL file whose rows have a response")
    examples = load_examples(config.data.train, config.data, config.video)
    for example in examples:
        if not example.response:
            raise ValueError(f"{config.data.train}: example {example.id} has no response; every row needs one here")
    return examples


def _backward(policy: Policy, examples: list[Example], prompts: list[Prompt]) -> tuple[float, int]:
    """Accumulates the gradient of -sum log p(response); returns that sum and the number of response tokens."""
    tokenizer, stop = policy.family.tokenizer, min(policy.family.stop_ids)
    total, tokens = 0.0, 0
    for members in cohorts(prompts):
        shared = [prompts[i] for i in members]
        responses = [[*tokenizer.encode(examples[i].response or "", add_special_tokens=False), stop] for i in members]
        prefix = policy.prefix(shared)
        streams = make_streams(shared, responses, prefix.length)
        sums: list[float] = []

        def loss(logprobs, entropy, rows, sums=sums):
            value = -logprobs.sum()
            sums.append(value.item())
            return value

        policy.backward(prefix, streams, loss)
        total, tokens = total + sum(sums), tokens + sum(map(len, responses))
    return total, tokens
