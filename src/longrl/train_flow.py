"""The loop of image and video generation. Invariants:

- a group, the samples of one prompt, stays whole: its rewards are compared with each other;
- sampling and training call one function, and the first update finds the densities that sampling recorded;
- what the samples of a group share is computed once: text embeddings, and the steps up to the first draw;
- gradients are summed over the batch and all ranks, and divided once, by the global count.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from longrl.algo.flow import group_advantages
from longrl.data.media_prompts import load_prompts, require_negative, whole_prompts
from longrl.files import write_whole
from longrl.flow_config import FlowConfig
from longrl.flow_training import FlowTraining, begin_run, held_out, load_family
from longrl.flow_types import Media, MediaPrompt, ScoredMedia
from longrl.flow_update import Samples, count, nft_gradient, policy_gradient
from longrl.parallel.ranks import ALONE, Ranks
from longrl.report.media import sample_name, save_samples, write_media_report
from longrl.report.metrics import Metrics
from longrl.rewards.media import MediaRewards
from longrl.rollout.flow import Sampler
from longrl.rollout.flow_window import stochastic_steps, trained_steps
from longrl.runtime import seed_for
from longrl.totals import Totals

log = logging.getLogger(__name__)


def train_flow(config: FlowConfig, ranks: Ranks = ALONE) -> Path:
    """Trains a generator on the rewards of its samples; resumes where the run directory left off.

    Args:
        config: of the run.
        ranks: the processes that do it together, each of which calls this (`start_ranks`).

    Returns:
        The last checkpoint's adapters or denoiser.

    Raises:
        ValueError: bad prompts or configuration.
        RuntimeError: a loss or gradient is not finite, or sampling and training disagree about densities.
        Stopped: a rank was asked to stop before the last step; the run is saved.
    """
    rewards = MediaRewards(config.rewards, config.scorers, ranks.size)
    prompts = load_prompts(config.prompts.train)
    shown = load_prompts(config.prompts.eval) if config.prompts.eval else None
    if ranks.is_main:
        rewards.check(_blank(config, prompts[0]))
    family, too_long = load_family(config), config.prompts.too_long
    prompts, named = whole_prompts(prompts, family.lengths, too_long, config.prompts.train)
    if shown is None:
        shown = prompts
    else:
        shown, more = whole_prompts(shown, family.lengths, too_long, f"{config.prompts.eval}")
        named += more
    if config.sampling.guidance > 1 or config.warm_up_steps:  # a twin's warm-up reads it too
        named += require_negative(config.prompts.negative or "", family.lengths, too_long)
    rewards.require(list({prompt.text: prompt for prompt in [*prompts, *shown]}.values()))
    training = FlowTraining(config, begin_run(config, family, ranks), ranks)
    _evaluate(training, shown, rewards, "before")
    sampler = training.sampler(config.sampling.steps, config.flow.shared_start)
    with training.metrics() as metrics, training.progress("flow") as progress:
        for step in training.steps_left():
            with metrics.step(step):
                totals, samples, ids = sample_step(training, sampler, prompts, step, rewards, metrics)
                norm, lr = learn_step(training, sampler, samples, totals, step, ids, metrics)
                totals = Totals.sum(ranks.gather_all(totals))
                updates = config.flow.updates_per_batch
                for name, value in (totals.metrics(updates) | {"grad_norm": norm, "lr": lr}).items():
                    metrics.log(name, value)
                metrics.log("data/too_long", len(named))
                training.follow(step)
                if config.held_out.every_steps and training.is_due(step, config.held_out.every_steps):
                    with metrics.time("evaluation"):
                        result = _evaluate(training, shown, rewards, f"step_{step:06d}")
                    metrics.log("held_out/reward", result["reward"])
            progress.update(metrics.last)
            training.save_if_due(step)
    _evaluate(training, shown, rewards, "after")
    if ranks.is_main:
        write_media_report(training.run_dir)
    return training.last_model()


def sample_step(
    training: FlowTraining, sampler: Sampler, prompts: Sequence[MediaPrompt], step: int, rewards: MediaRewards,
    metrics: Metrics,
) -> tuple[Totals, Samples | None, list[str]]:  # fmt: skip
    """This rank's groups of a step with their advantages; None if there are more ranks than prompts."""
    config, ranks, algo = training.config, training.ranks, training.config.flow
    seed, steps, size = config.runtime.seed, config.sampling.steps, algo.group_size
    window = stochastic_steps(algo, steps, step, seed)
    drawn = training.draw(prompts, step)
    mine = drawn[ranks.rank :: ranks.size]
    totals = Totals()
    scored: list[ScoredMedia] = []
    trajectory = embeds = None
    seeds = [seed_for(seed, "sample", step, epoch, prompt.id) for epoch, prompt in mine]
    if mine:
        with metrics.time("text"):
            embeds = training.texts([prompt.text for _, prompt in mine])
        with metrics.time("sampling"):
            if training.old is None:
                trajectory = sampler(embeds, seeds, size, window)
            else:
                with training.old.swapped_in():
                    trajectory = sampler(embeds, seeds, size, window)
        with metrics.time("decoding"):
            made = [training.media(prompt, trajectory.latents[i * size : (i + 1) * size])
                    for i, (_, prompt) in enumerate(mine)]  # fmt: skip
        with metrics.time("reward"):
            scored = rewards.score(made)
    for one in scored:
        _count(totals, one)
    totals.add(rewards.take())
    advantages = _advantages(training, [one.total for one in scored], len(drawn))
    samples = None
    if trajectory is not None and embeds is not None:
        samples = Samples(
            drawn=trajectory,
            embeds=embeds.repeat(size),
            advantages=torch.tensor(advantages).flatten().to(training.family.device),
            scored=torch.tensor([[r is not None for r in one.total] for one in scored])
            .flatten()
            .to(training.family.device),
            trained=trained_steps(algo, steps, window, step, seed),
            seeds=[seed_for(one, "row", i) for one in seeds for i in range(size)],
        )
    return totals, samples, [prompt.id for _, prompt in drawn]


def learn_step(
    training: FlowTraining, sampler: Sampler, samples: Samples | None, totals: Totals, step: int, ids: list[str],
    metrics: Metrics,
) -> tuple[float, float]:  # fmt: skip
    """All updates of a step; returns the mean gradient norm and the learning rate."""
    algo, norms, lr = training.config.flow, [], 0.0
    for update in range(algo.updates_per_batch):
        with metrics.time("update"):
            if samples is not None and training.old is not None:
                nft_gradient(sampler, training.denoiser, samples, algo, totals, training.old)
            elif samples is not None:
                policy_gradient(sampler, training.denoiser, samples, algo, totals, first=update == 0)
        with metrics.time("optimizer"):
            mine = 0 if samples is None else count(samples)
            if update == 0:
                totals.denominator = mine
            norm, lr = training.update(step, sum(training.ranks.gather_all(mine)), ids)
            norms.append(norm)
    return sum(norms) / len(norms), lr


def _blank(config: FlowConfig, prompt: MediaPrompt) -> Media:
    """Something to try the scorers with before a model is loaded."""
    size = config.media
    pixels = np.full((1, size.frames, size.height, size.width, 3), 128, np.uint8)
    return Media(prompt=prompt, pixels=pixels, fps=size.fps if size.frames > 1 else None)


def _count(totals: Totals, scored: ScoredMedia) -> None:
    for total in scored.total:
        totals.means["reward/mean"].add(total)
        totals.means["reward/unscored"].add(total is None)
    for name, values in scored.rewards.items():
        for value in values:
            totals.means[f"reward/{name}"].add(value)


def _advantages(training: FlowTraining, mine: list[list[float | None]], groups: int) -> list[list[float]]:
    """Of this rank's groups, among those of all ranks, in the order in which one process has them."""
    ranks, algo = training.ranks, training.config.flow
    parts = ranks.gather_all(mine)
    everyone = [parts[i % ranks.size][i // ranks.size] for i in range(groups)]
    return group_advantages(everyone, algo.advantage_std, algo.advantage_clip)[ranks.rank :: ranks.size]


def _evaluate(training: FlowTraining, prompts: Sequence[MediaPrompt], rewards: MediaRewards, stage: str) -> dict:
    """Scores held-out samples, also against the next prompt's text, and writes held_out/STAGE.json and the samples."""
    path = training.run_dir / "held_out" / f"{stage}.json"
    if training.ranks.from_main(path.exists):  # of a run that is taken up again
        return json.loads(path.read_text(encoding="utf-8"))
    following = {prompt.id: prompts[(i + 1) % len(prompts)] for i, prompt in enumerate(prompts)}
    places = {prompt.id: i for i, prompt in enumerate(prompts)}
    mine = []
    for media in held_out(training, prompts):
        other = Media(prompt=following[media.prompt.id], pixels=media.pixels, fps=media.fps)
        scored, swapped = rewards.score([media, other])
        mine.append((media.prompt.id, {"rewards": scored.total, "swapped": swapped.total}))
        if places[media.prompt.id] < training.config.held_out.shown:
            save_samples(path.parent / stage / sample_name(places[media.prompt.id]), media)
    found = dict(one for part in training.ranks.gather_all(mine) for one in part)
    by_prompt = [{"id": prompt.id, "prompt": prompt.text} | found[prompt.id] for prompt in prompts]
    values = [value for one in by_prompt for value in one["rewards"] if value is not None]
    result = {"stage": stage, "reward": sum(values) / len(values) if values else None, "prompts": by_prompt}
    if training.ranks.is_main:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(result, indent=1))
    return result
