"""Reinforcement learning of flow models: the stochastic sampler's Gaussians, advantages, and DiffusionNFT's loss.

A rectified flow carries noise (sigma = 1) to data (sigma = 0) by dx = v(x, sigma) dsigma. The stochastic differential
equation with the same marginals,

    dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dsigma + s dw,

taken in steps dt = sigma_next - sigma < 0, is a policy: each step is a Gaussian, whose log-density is known.

Reference: Flow-GRPO, arXiv 2505.05470, Eq. 9 and 12; DanceGRPO, arXiv 2505.07818, Eq. 9 (the same with constant s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from longrl.algo.advantages import dr_grpo

NoiseSchedule = Literal["flow", "constant"]

_STD_EPS = 1e-4
"""Added to the standard deviation of rewards: Flow-GRPO's value."""
_MIN_WEIGHT = 1e-5
_PURE_NOISE = 2e-3
"""A first sigma this near to 1 is 1."""


def noise_scales(sigmas: Tensor, level: float, schedule: NoiseSchedule) -> Tensor:
    """s of every step.

    flow: s = level * sqrt(sigma / (1 - sigma)), where a first sigma of 1, or nearly 1 (schedulers round it or begin a
    little below), takes the next sigma in the denominator (Flow-GRPO).
    constant: s = level (DanceGRPO's eta).

    Args:
        sigmas: [T + 1], falling from at most 1 to 0.

    Returns:
        [T]
    """
    if schedule == "constant":
        return torch.full_like(sigmas[:-1], level)
    rest = 1 - sigmas[:-1]
    if rest[0] < _PURE_NOISE:
        rest = torch.cat([1 - sigmas[1:2], rest[1:]])
    return level * (sigmas[:-1] / rest).sqrt()


def transition(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, scale: float) -> tuple[Tensor, float]:
    """The Gaussian of one step; scale 0 gives the Euler step of the ordinary differential equation.

    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt, std = s sqrt(-dt).

    Args:
        x, velocity: [N, ...], fp32.
        sigma, sigma_next: before and after.
        scale: s, from `noise_scales`.

    Returns:
        mean [N, ...], std.
    """
    dt = sigma_next - sigma
    half = scale**2 / (2 * sigma)
    mean = x * (1 + half * dt) + velocity * ((1 + half * (1 - sigma)) * dt)
    return mean, scale * math.sqrt(-dt)


def log_density(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log-density of the step's Gaussian, averaged over the dimensions of a sample.

    Differs: from the density's logarithm by 1 / dimensions, as in Flow-GRPO, so that clip ranges do not depend on the
    size of the media.

    Args:
        x_next, mean: [N, ...]

    Returns:
        [N]
    """
    squares = ((x_next - mean) ** 2).flatten(1).mean(1)
    return -squares / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: float) -> Tensor:
    """KL of two Gaussians with the same variance, averaged over dimensions: (mean - ref_mean)^2 / (2 std^2).

    Reference: Flow-GRPO, arXiv 2505.05470, section 4.1 (KL loss in closed form).

    Args:
        mean, ref_mean: [N, ...]

    Returns:
        [N]
    """
    return ((mean - ref_mean) ** 2).flatten(1).mean(1) / (2 * std**2)


def group_advantages(
    groups: Sequence[Sequence[float | None]], std: Literal["group", "batch"], bound: float
) -> list[list[float]]:
    """A = (R - mean of its group) / (std + 1e-4), clipped at +-bound.

    Reference: Flow-GRPO, arXiv 2505.05470, Eq. 4; the batch's std: section 5.1 and its code.

    Args:
        groups: rewards of each group of the batch; None (could not be scored) counts nowhere and gets 0, as do the
            members of a group with fewer than two rewards.
        std: unbiased, of the group's rewards or of all of the batch.
        bound: largest advantage.

    Returns:
        As groups.
    """
    known = [[reward for reward in group if reward is not None] for group in groups]
    whole = _std([reward for group in known for reward in group])
    advantages = []
    for group, rewards in zip(groups, known, strict=True):
        centred = iter(dr_grpo(rewards) if len(rewards) > 1 else [0.0] * len(rewards))
        scale = (whole if std == "batch" else _std(rewards)) + _STD_EPS
        values = [0.0 if reward is None else next(centred) / scale for reward in group]
        advantages.append([max(-bound, min(bound, value)) for value in values])
    return advantages


def nft_loss(
    velocity: Tensor, old_velocity: Tensor, x_sigma: Tensor, x0: Tensor, sigma: Tensor, advantages: Tensor,
    beta: float, bound: float,
) -> Tensor:  # fmt: skip
    """DiffusionNFT: the current model is pulled to good samples as it is, to bad ones as its mirror image.

    r = 1/2 + A / (2 bound), clipped to [0, 1]; v+ = (1 - beta) v_old + beta v; v- = (1 + beta) v_old - beta v;
    loss = bound / beta * (r d(v+) + (1 - r) d(v-)), where d is the squared error of x0 = x - sigma v, averaged over
    dimensions and divided by its mean absolute error, which is not differentiated.

    Reference: DiffusionNFT, arXiv 2509.16117, Eq. 5 and section 3.3 (adaptive weighting).

    Args:
        velocity: [N, ...], with gradients, at x_sigma.
        old_velocity: of the model that sampled x0.
        x_sigma: (1 - sigma) x0 + sigma * noise.
        x0: samples.
        sigma: [N]
        advantages: [N], within +-bound.

    Returns:
        [N]
    """
    wide = sigma.view(-1, *[1] * (x0.ndim - 1))

    def distance(v: Tensor) -> Tensor:
        error = (x_sigma - wide * v - x0).flatten(1)
        weight = error.detach().abs().mean(1).clamp(min=_MIN_WEIGHT)
        return (error**2).mean(1) / weight

    r = (0.5 + advantages / (2 * bound)).clamp(0, 1)
    positive = distance((1 - beta) * old_velocity + beta * velocity)
    negative = distance((1 + beta) * old_velocity - beta * velocity)
    return bound / beta * (r * positive + (1 - r) * negative)


def _std(values: Sequence[float]) -> float:
    """Unbiased; of fewer than two 0."""
    if len(values) < 2:
        return 0.0
    centred = dr_grpo(values)
    return math.sqrt(math.fsum(x * x for x in centred) / (len(values) - 1))
