"""Supervised fine-tuning: examples about the same video share its prefix, each demonstrated response is a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longrl.config import SftConfig
from longrl.data.examples import Skips, load_examples
from longrl.data.prompts import response_ids
from longrl.models.streams import cohorts, make_streams
from longrl.optim import require_finite
from longrl.parallel.ranks import ALONE, Ranks
from longrl.policy import Policy
from longrl.training import Share, Training
from longrl.types import Example


def train_sft(config: SftConfig, ranks: Ranks = ALONE) -> Path:
    """Trains on `data.train`, whose rows must have a `response`; resumes where the run directory left off.

    Args:
        config: of the run.
        ranks: the processes that do it together, each of which calls this (`start_ranks`).

    Returns:
        The Hugging Face folder of the last checkpoint.

    Raises:
        ValueError: bad data or configuration.
        RuntimeError: a loss or gradient is not finite.
    """
    skips = Skips(config.data)
    examples = _demonstrated(config, skips)
    training = Training(config, skips, ranks)

    with training.metrics() as metrics, training.progress("sft") as progress:
        for step in training.steps_left():
            with metrics.step(step):
                with metrics.time("media"):
                    batch = training.draw(examples, step)
                with metrics.time("update"):
                    sums = [_backward(training.policy, share) for share in batch.shares]
                    parts = batch.gather(sums)
                    loss, tokens = sum(loss for loss, _ in parts), sum(tokens for _, tokens in parts)
                    norm, lr = training.update(step, tokens, batch.ids)
                for name, value in (
                    ("loss", loss / tokens if tokens else None),
                    ("response/tokens", tokens / len(batch.ids) if batch.ids else None),
                    ("grad_norm", norm),
                    ("lr", lr),
                    ("cache/hit_rate", training.build.hit_rate),
                    ("data/skipped", len(skips.names)),
                ):
                    metrics.log(name, value)
            progress.update(metrics.last)
            training.save_if_due(step)
    return training.last_model()


def _demonstrated(config: SftConfig, skips: Skips) -> list[Example]:
    if config.data.train is None:
        raise ValueError("data.train is not set; supervised fine-tuning needs rows with a response")
    return load_examples(config.data.train, config.data, config.video, skips, cache=config.cache, demonstrations=True)


def _backward(policy: Policy, share: Share) -> tuple[float, int]:
    """Accumulates the gradient of -sum log p(response); returns that sum and the number of response tokens."""
    total, tokens = 0.0, 0
    policy.share_with(share.ranks.sp)
    for members in cohorts(share.prompts):
        ids = [share.examples[i].id for i in members]
        shared = [share.prompts[i] for i in members]
        responses = [
            response_ids(
                policy.family, share.examples[i].response or "", f"the response of example {share.examples[i].id}"
            )
            for i in members
        ]
        prefix = policy.prefix(shared)
        streams = make_streams(shared, responses, prefix.length)

        def loss(logprobs: Tensor, entropy: Tensor, rows: slice, ids: Sequence[str] = ids) -> Tensor:
            nonlocal total
            value = -logprobs.sum()
            require_finite("the loss", value.item(), ids)
            total += value.item()
            return value

        policy.backward(prefix, streams, loss)
        tokens += sum(map(len, responses))
    return total, tokens
