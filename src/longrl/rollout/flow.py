"""Sampling images and videos as a policy does it: some steps of the denoiser draw from a Gaussian and know its density,
the others are deterministic.

    steps before the window   deterministic: once for a group that starts from one noise, whatever its size
    steps of the window       stochastic, recorded; the first begins where the group still is in one place, and so its
                              Gaussian is computed once for the group, here and in training
    steps after it            deterministic
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algo.flow import NoiseSchedule, log_density, noise_scales, transition
from longrl.flow_types import Schedule, TextEmbeds, Trajectory
from longrl.models.diffusion import MediaFamily
from longrl.runtime import seed_for


class Guided:
    """The denoiser with classifier-free guidance: v = v_negative + guidance (v_prompt - v_negative). Sampling and
    training call this same function."""

    def __init__(
        self, family: MediaFamily, guidance: float = 1.0, negative: TextEmbeds | None = None, detach: bool = False
    ) -> None:
        """
        Args:
            guidance: 1 or less: none, as in the pipelines.
            negative: of one prompt; needed for guidance.
            detach: an approximation: v_negative gets no gradient.
        """
        assert guidance <= 1 or negative is not None, "guidance without a negative prompt"
        self.family, self.guidance, self.negative, self.detach = family, guidance, negative, detach

    def __call__(self, x: Tensor, timestep: Tensor, embeds: TextEmbeds) -> Tensor:
        """
        Args:
            x: [N, ...]
            timestep: one number, or [N].
            embeds: of N prompts.
        """
        times = timestep.to(x.device).expand(len(x))
        if self.guidance <= 1:
            return self.family.velocity(x, times, embeds)
        assert self.negative is not None
        negative = self.negative.repeat(len(x))
        if self.detach:
            with torch.no_grad():
                away = self.family.velocity(x, times, negative)
            towards = self.family.velocity(x, times, embeds)
        else:
            both = negative.before(embeds)
            away, towards = self.family.velocity(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        return away + self.guidance * (towards - away)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How a schedule's steps are taken."""

    model: Guided
    schedule: Schedule
    scales: Tensor
    """[T]: s of each step, where it is stochastic."""
    shape: tuple[int, ...]
    """Of a latent."""
    shared_start: bool
    """The samples of a group begin with the same noise."""
    max_rows: int
    """Samples that go through the denoiser at a time, here and in training."""

    @torch.no_grad()
    def __call__(self, embeds: TextEmbeds, seeds: Sequence[int], group_size: int, window: range) -> Trajectory:
        """
        Args:
            embeds: of M prompts.
            seeds: [M], which the noise depends on, with the place in the group, and on nothing else.
            group_size: samples of each prompt, G.
            window: the stochastic steps.

        Returns:
            N = M x G samples, those of a prompt together.
        """
        each = 1 if self.shared_start else group_size
        starts = [self._noise(generator) for generator in self._generators(seeds, each, "start")]
        before, after, together = range(window.start), range(window.stop, len(self.schedule)), group_size // each
        x, apart = self._each(torch.stack(starts), embeds.repeat(each), before), embeds.repeat(group_size)
        mean, std = self._first(x, embeds.repeat(each), window)
        x, mean = (one.repeat_interleave(together, 0) for one in (x, mean))
        generators = self._generators(seeds, group_size, "noise")
        parts = [
            self._window(x[rows], (mean[rows], std), apart[rows], generators[rows], window)
            for rows in micro_batches(len(x), self.max_rows)
        ]
        states, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
        latents = self._each(states[:, -1], apart, after)
        return Trajectory(steps=window, together=together, states=states, logprobs=logprobs, latents=latents)

    def gaussian(self, x: Tensor, embeds: TextEmbeds, step: int) -> tuple[Tensor, float]:
        """Mean and standard deviation of what follows x: [N, ...]."""
        return self._step(x, embeds, step, self.scales[step].item())

    def deterministic(self, x: Tensor, embeds: TextEmbeds, steps: range) -> Tensor:
        """Euler's steps of the ordinary differential equation."""
        for step in steps:
            x, _ = self._step(x, embeds, step, 0.0)
        return x

    def _step(self, x: Tensor, embeds: TextEmbeds, step: int, scale: float) -> tuple[Tensor, float]:
        sigma, sigma_next = self.schedule.sigmas[step].item(), self.schedule.sigmas[step + 1].item()
        return transition(x, self.model(x, self.schedule.timesteps[step], embeds), sigma, sigma_next, scale)

    def _each(self, x: Tensor, embeds: TextEmbeds, steps: range) -> Tensor:
        batches = micro_batches(len(x), self.max_rows)
        return torch.cat([self.deterministic(x[rows], embeds[rows], steps) for rows in batches])

    def _first(self, x: Tensor, embeds: TextEmbeds, window: range) -> tuple[Tensor, float]:
        """The Gaussian of the window's first step; without a window x, which nobody looks at."""
        if not window:
            return x, 0.0
        parts = [self.gaussian(x[rows], embeds[rows], window.start) for rows in micro_batches(len(x), self.max_rows)]
        return torch.cat([mean for mean, _ in parts]), parts[0][1]

    def _window(
        self, x: Tensor, first: tuple[Tensor, float], embeds: TextEmbeds, generators: Sequence[torch.Generator],
        window: range,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """first: the Gaussian of the first step. Returns states [N, K + 1, ...], logprobs [N, K]."""
        states, logprobs = [x], []
        for step in window:
            mean, std = first if step == window.start else self.gaussian(x, embeds, step)
            x = mean + std * torch.stack([self._noise(generator) for generator in generators])
            logprobs.append(log_density(x, mean, std))
            states.append(x)
        return torch.stack(states, 1), torch.stack(logprobs, 1) if logprobs else x.new_zeros(len(x), 0)

    def _generators(self, seeds: Sequence[int], each: int, what: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed_for(seed, what, i)) for seed in seeds for i in range(each)]

    def _noise(self, generator: torch.Generator) -> Tensor:
        """Drawn on the CPU, so that every device gets the same."""
        return torch.randn(self.shape, generator=generator).to(self.model.family.device)


def make_sampler(
    model: Guided,
    *,
    size: tuple[int, int, int],
    steps: int,
    noise_level: float,
    noise_schedule: NoiseSchedule = "flow",
    shift: float | None = None,
    shared_start: bool = False,
    max_rows: int = 16,
) -> Sampler:
    """
    Args:
        size: height, width, frames.
        noise_level, noise_schedule: of stochastic steps, as in `noise_scales`.
        shift: of the sigmas; None: the pipeline's.
    """
    shape = model.family.latent_shape(*size)
    schedule = model.family.schedule(steps, shape, shift)
    scales = noise_scales(schedule.sigmas, noise_level, noise_schedule)
    return Sampler(
        model=model, schedule=schedule, scales=scales, shape=shape, shared_start=shared_start, max_rows=max_rows
    )


def micro_batches(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
