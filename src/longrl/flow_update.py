"""What a flow run learns from its samples: gradients that add up, one sampling step of a few samples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algo.flow import gaussian_kl, log_density, nft_loss
from longrl.algo.losses import policy_loss
from longrl.algo_config import AlgoConfig
from longrl.flow_config import FlowAlgoConfig
from longrl.flow_types import TextEmbeds, Trajectory
from longrl.models.denoiser import Denoiser, Shadow
from longrl.rollout.flow import Sampler, micro_batches
from longrl.runtime import seed_for
from longrl.totals import Totals
from longrl.types import LossInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """This rank's samples of a step, those of a prompt together."""

    drawn: Trajectory
    embeds: TextEmbeds
    """[N]"""
    advantages: Tensor
    """[N]"""
    scored: Tensor
    """bool [N]; False: a reward failed, and the sample is not trained."""
    trained: list[int]
    """Sampling steps."""
    seeds: list[int]
    """[N], for noise that the update needs."""


def count(samples: Samples) -> int:
    """What the summed loss is divided by, after adding up over ranks: trained sampling steps of all scored samples."""
    return int(samples.scored.sum()) * len(samples.trained)


def policy_gradient(
    sampler: Sampler, denoiser: Denoiser, samples: Samples, algo: FlowAlgoConfig, totals: Totals, first: bool
) -> None:
    """Clipped ratios of the stochastic steps' densities, and the divergence from the reference if kl_coef is set.

    Reference: Flow-GRPO, arXiv 2505.05470, Eq. 5 and 6.

    Args:
        first: the weights are still those that sampled, so that densities must agree.

    Raises:
        RuntimeError: they do not.
    """
    ppo = AlgoConfig(clip_low=algo.clip, clip_high=algo.clip, dual_clip=None)
    start = samples.drawn.steps.start
    for rows, step in _work(sampler, denoiser, samples, algo.kl_coef > 0):
        x, after = (samples.drawn.states[rows, k] for k in (step - start, step - start + 1))
        embeds, scored = samples.embeds[rows], samples.scored[rows].unsqueeze(1)
        each = _together(samples, step)
        if algo.kl_coef:  # first: it may put other weights in place for a while
            with torch.no_grad(), denoiser.reference():
                away = sampler.gaussian(x[::each], embeds[::each], step)[0].repeat_interleave(each, 0)
        mean, std = sampler.gaussian(x[::each], embeds[::each], step)
        mean = mean.repeat_interleave(each, 0)
        logprobs = log_density(after, mean, std)
        inputs = LossInputs(
            logprobs=logprobs.unsqueeze(1),
            old_logprobs=samples.drawn.logprobs[rows, step - start].unsqueeze(1),
            advantages=samples.advantages[rows].unsqueeze(1),
            mask=scored,
        )
        output = policy_loss(inputs, ppo)
        loss, metrics = output.loss_sum, dict(output.metrics)
        if algo.kl_coef:
            divergence = (gaussian_kl(mean, away, std) * scored.squeeze(1)).sum()
            loss, metrics["kl"] = loss + algo.kl_coef * divergence, divergence.item()
        if first:
            _compare(logprobs, inputs.old_logprobs.squeeze(1), algo, totals)
        _learn(loss, metrics, int(scored.sum()), totals)


def nft_gradient(
    sampler: Sampler, denoiser: Denoiser, samples: Samples, algo: FlowAlgoConfig, totals: Totals, old: Shadow
) -> None:
    """DiffusionNFT's loss at the trained steps' sigmas, and kl_coef times the squared distance from the reference's
    velocity.

    Args:
        old: of the model that sampled.
    """
    schedule = sampler.schedule
    for rows, step in _work(sampler, denoiser, samples, True):
        x0, embeds, scored = samples.drawn.latents[rows], samples.embeds[rows], samples.scored[rows]
        generators = [torch.Generator().manual_seed(seed_for(seed, "forward", step)) for seed in samples.seeds[rows]]
        noise = torch.stack([torch.randn(sampler.shape, generator=one) for one in generators]).to(x0)
        sigma, time = schedule.sigmas[step].to(x0), schedule.timesteps[step]
        x = (1 - sigma) * x0 + sigma * noise
        with torch.no_grad(), old.swapped_in():
            before = sampler.model(x, time, embeds)
        if algo.kl_coef:
            with torch.no_grad(), denoiser.reference():
                reference = sampler.model(x, time, embeds)
        velocity = sampler.model(x, time, embeds)
        losses = nft_loss(
            velocity, before, x, x0, sigma.expand(len(x)), samples.advantages[rows], algo.nft_beta, algo.advantage_clip
        )
        loss, metrics = (losses * scored).sum(), {}
        if algo.kl_coef:
            distance = (((velocity - reference) ** 2).flatten(1).mean(1) * scored).sum()
            loss, metrics["kl"] = loss + algo.kl_coef * distance, distance.item()
        _learn(loss, metrics, int(scored.sum()), totals)


def _work(sampler: Sampler, denoiser: Denoiser, samples: Samples, all_rows: bool) -> Sequence[tuple[slice, int]]:
    """Rows and step of each pass: the batches that sampling made. Without signal none, but for ranks that share the
    weights, which must make the same passes."""
    return [
        (rows, step)
        for step in samples.trained
        for rows in micro_batches(len(samples.advantages), sampler.max_rows * _together(samples, step))
        if all_rows or denoiser.sharded or samples.advantages[rows].any()
    ]


def _together(samples: Samples, step: int) -> int:
    """So many rows, one after the other, are in one state before this step: one pass of the denoiser serves them."""
    return samples.drawn.together if step == samples.drawn.steps.start else 1


def _learn(loss: Tensor, metrics: dict[str, float], steps: int, totals: Totals) -> None:
    loss.backward()
    totals.loss_sum += loss.item()
    totals.trained_tokens += steps
    for name, value in metrics.items():
        totals.token_sums[name] += value


def _compare(logprobs: Tensor, old: Tensor, algo: FlowAlgoConfig, totals: Totals) -> None:
    difference = (logprobs.detach() - old).abs().max().item()
    totals.logprob_diff = max(totals.logprob_diff or 0.0, difference)
    bound = algo.max_logprob_diff or algo.clip
    if not difference <= bound:
        raise RuntimeError(
            f"sampling and training differ by {difference:.2e} in a log-prob, more than flow.max_logprob_diff "
            f"({bound:g}, unless set that of flow.clip); compute in float32, or raise it"
        )
