"""The stochastic sampler of flow models against the stock pipelines, the textbook Gaussian and exact recursions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from longrl.algo.flow import gaussian_kl, log_density, noise_scales, transition
from longrl.models.sd3 import SD3
from longrl.models.tiny_diffusion import tiny_sd3, tiny_wan
from longrl.models.wan import Wan
from longrl.rollout.flow import Guided, make_sampler
from longrl.rollout.text_cache import TextCache
from longrl.runtime import seed_for

STEPS, TOKENS = 7, 24
TEXTS = ["a red picture", "something blue"]


@pytest.fixture(scope="module", params=["sd3", "wan"])
def family(request):
    pipe = tiny_sd3(0) if request.param == "sd3" else tiny_wan(0)
    pipe.set_progress_bar_config(disable=True)
    return SD3(pipe, TOKENS) if request.param == "sd3" else Wan(pipe, TOKENS)


def size(family):
    return (16, 32, 5) if family.is_video else (16, 32, 1)


def make(family, level=0.7, guidance=4.5, steps=STEPS, **options):
    model = Guided(family, guidance, family.encode(["ugly"]))
    return make_sampler(model, size=size(family), steps=steps, noise_level=level, **options)


def stock(family, start, guidance=4.5, steps=STEPS, **options):
    """The pipeline's own latents from this noise."""
    height, width, frames = size(family)
    options |= {"num_frames": frames} if family.is_video else {}
    pipe = family.pipe
    negative = ["ugly"] * len(TEXTS)
    return pipe(
        TEXTS, negative_prompt=negative, height=height, width=width, num_inference_steps=steps, latents=start,
        guidance_scale=guidance, output_type="latent", max_sequence_length=TOKENS, return_dict=False, **options,
    )[0]  # fmt: skip


def start_noise(sampler, seeds):
    seeds = [seed_for(seed, "start", 0) for seed in seeds]
    return torch.stack([torch.randn(sampler.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, STEPS), (4.5, STEPS), (4.5, 1), (4.5, 28)])
def test_deterministic_sampling_equals_the_stock_pipeline(family, guidance, steps):
    sampler = make(family, guidance=guidance, steps=steps)
    ours = sampler(family.encode(TEXTS), [3, 4], 1, range(steps, steps))
    theirs = stock(family, start_noise(sampler, [3, 4]), guidance, steps)
    assert (ours.latents - theirs).abs().max() < 1e-5
    assert ours.logprobs.shape == (2, 0)
    assert theirs.std() > 0.5  # or nothing has been compared


def test_vanishing_noise_equals_the_stock_pipeline(family):
    sampler = make(family, level=1e-7)
    ours = sampler(family.encode(TEXTS), [3, 4], 1, range(STEPS))
    assert (ours.latents - stock(family, start_noise(sampler, [3, 4]))).abs().max() < 1e-5
    loud = make(family, level=0.7)(family.encode(TEXTS), [3, 4], 1, range(STEPS))
    assert (loud.latents - ours.latents).abs().max() > 0.1


def test_pixels_are_the_stock_pipelines(family):
    latents = torch.randn(2, *make(family).shape, generator=torch.Generator().manual_seed(1))
    ours = family.decode(latents)
    if family.is_video:
        theirs = family.pipe.video_processor.postprocess_video(family.pipe.vae.decode(latents, return_dict=False)[0])
    else:
        theirs = family.pipe.image_processor.postprocess(family.pipe.vae.decode(latents)[0], output_type="np")[:, None]
    assert ours.shape == theirs.shape
    assert (ours == (theirs * 255).round()).all()


def test_shift_is_the_pipelines_own_dynamic_or_given(family):
    plain = FlowMatchEulerDiscreteScheduler(shift=5.0)
    plain.set_timesteps(STEPS)
    assert torch.equal(make(family, shift=5.0).schedule.sigmas, plain.sigmas)
    if not family.is_video:  # the pipeline of Wan knows no dynamic shift
        before = family.pipe.scheduler
        family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        sampler = make(family)
        ours = sampler(family.encode(TEXTS), [3, 4], 1, range(STEPS, STEPS))
        assert (ours.latents - stock(family, start_noise(sampler, [3, 4]))).abs().max() < 1e-5
        family.pipe.scheduler = before


def test_a_solver_of_higher_order_lends_its_sigmas(family):
    """Wan comes with UniPC; of first order it is Euler's method, but for its corrector."""
    from diffusers import UniPCMultistepScheduler

    before = family.pipe.scheduler
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
    family.pipe.scheduler = UniPCMultistepScheduler(flow_shift=3.0, disable_corrector=list(range(STEPS)), **flow)
    sampler = make(family)
    if family.is_video:  # the pipeline of SD3 has timesteps of Euler's kind alone
        ours = sampler(family.encode(TEXTS), [3, 4], 1, range(STEPS, STEPS))
        assert (ours.latents - stock(family, start_noise(sampler, [3, 4]))).abs().max() < 1e-5
    family.pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(sampler.schedule.sigmas, family.pipe.scheduler.sigmas)
    family.pipe.scheduler = UniPCMultistepScheduler(final_sigmas_type="sigma_min", **flow)
    with pytest.raises(ValueError, match="has final_sigmas_type 'sigma_min', expected 'zero'"):
        family.schedule(4, (1, 1, 1))
    family.pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler without flow sigmas, expected one of a flow model"):
        make(family)
    family.pipe.scheduler = before


@pytest.mark.parametrize("steps", [4, 10, 20, 50])
def test_noise_is_bounded_whatever_the_shift(steps):
    """Schedulers round the first sigma, which is 1, to either side: 0.7 / sqrt(1 - sigma) must not see it."""
    for hundredths in range(101, 1200):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=hundredths / 100)
        scheduler.set_timesteps(steps)
        scales = noise_scales(scheduler.sigmas, 0.7, "flow")
        assert scales.isfinite().all()
        assert scales[:-1].diff().max() < 1e-6  # it falls with sigma
        assert scales[0] <= 0.7 / (1 - scheduler.sigmas[1]).sqrt() * 1.0001


@pytest.mark.parametrize("detach", [False, True])
def test_recomputed_logprobs_equal_those_of_sampling(family, detach):
    """Other batches than in sampling, with gradients; the ratio is 1 within 1e-5."""
    model = Guided(family, 4.5, family.encode(["ugly"]), detach)
    sampler = make_sampler(model, size=size(family), steps=STEPS, noise_level=0.7, max_rows=3)
    embeds, window = family.encode(TEXTS), range(1, 5)
    drawn = sampler(embeds, [3, 4], 4, window)
    family.transformer.requires_grad_(True)
    rows = embeds.repeat(4)
    for k, step in enumerate(window):
        mean, std = sampler.gaussian(drawn.states[:, k], rows, step)
        again = log_density(drawn.states[:, k + 1], mean, std)
        assert again.requires_grad
        assert ((again - drawn.logprobs[:, k]).exp() - 1).abs().max() < 1e-5
        exact = torch.distributions.Normal(mean.double(), std).log_prob(drawn.states[:, k + 1].double())
        assert (drawn.logprobs[:, k] - exact.flatten(1).mean(1)).abs().max() < 1e-5
    family.transformer.requires_grad_(False)


def test_detached_guidance_keeps_the_value_and_drops_a_gradient(family):
    """The approximation: v is as it was, and its gradient is that of guidance * v_prompt alone."""
    negative, embeds = family.encode(["ugly"]), family.encode(TEXTS)
    x = torch.randn(2, *make(family).shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor(500.0)
    weight = next(iter(family.blocks[0].parameters()))
    weight.requires_grad_(True)

    def gradient(velocity):
        return torch.autograd.grad((velocity**2).sum(), weight)[0]

    whole, part = (Guided(family, 4.5, negative, detach)(x, time, embeds) for detach in (False, True))
    towards = family.velocity(x, time.expand(2), embeds)
    alone = torch.autograd.grad((2 * part.detach() * 4.5 * towards).sum(), weight)[0]
    assert torch.allclose(whole, part, atol=1e-5)
    assert torch.allclose(gradient(part), alone, rtol=1e-3, atol=1e-4 * alone.abs().max())
    assert not torch.allclose(gradient(whole), alone, rtol=1e-2, atol=1e-2 * alone.abs().max())
    weight.requires_grad_(False)


def test_a_shared_start_computes_the_prefix_once_and_gives_the_same(family):
    """The slow twin: every sample is a group of its own, from the same noise."""
    sampler, window = make(family, shared_start=True), range(3, 5)
    embeds, calls = family.encode(TEXTS), []
    hook = family.transformer.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(len(out[0])), with_kwargs=True
    )
    drawn = sampler(embeds, [3, 4], 6, window)
    hook.remove()
    assert sum(calls) == 2 * (4 * 2 + (STEPS - 4) * 12)  # 2: guidance; 4: the window's first step begins in one place
    assert drawn.together == 6
    x = start_noise(sampler, [3, 4]).repeat_interleave(6, 0)
    rows = embeds.repeat(6)
    x = sampler.deterministic(x, rows, range(3))
    assert torch.allclose(drawn.states[:, 0], x, atol=1e-5)
    seeds = [seed_for(seed, "noise", i) for seed in (3, 4) for i in range(6)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for k, step in enumerate(window):
        with torch.no_grad():
            mean, std = sampler.gaussian(x, rows, step)
        x = mean + std * torch.stack([torch.randn(sampler.shape, generator=one) for one in generators])
        assert torch.allclose(drawn.states[:, k + 1], x, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(drawn.latents, sampler.deterministic(x, rows, range(5, STEPS)), atol=1e-5)
    assert (drawn.latents[0] - drawn.latents[1]).abs().max() > 0.01


def test_noise_depends_on_names_alone(family):
    """Not on what else is sampled, nor on the size of batches."""
    embeds = family.encode(TEXTS)
    together = make(family)(embeds, [3, 4], 5, range(STEPS))
    alone = make(family, max_rows=2)(embeds[1:], [4], 5, range(STEPS))
    assert torch.allclose(together.latents[5:], alone.latents, atol=1e-5)


def test_sampling_uses_the_weights_as_they_are(family):
    sampler, embeds = make(family), family.encode(TEXTS)
    before = sampler(embeds, [3, 4], 1, range(STEPS)).latents
    weight = family.transformer.proj_out.weight
    with torch.no_grad():
        weight.mul_(1.5)
        after = sampler(embeds, [3, 4], 1, range(STEPS)).latents
        weight.div_(1.5)
    assert (after - before).abs().max() > 0.01
    assert torch.allclose(sampler(embeds, [3, 4], 1, range(STEPS)).latents, before, atol=1e-5)


@pytest.mark.parametrize("schedule", ["flow", "constant"])
def test_marginals_on_a_gaussian(schedule):
    """Data N(0, 0.5^2): x_sigma is N(0, (1 - sigma)^2 0.25 + sigma^2), and v is linear in x, so that each step
    multiplies the variance by a known factor and adds std^2."""
    steps, count, tau = 1000, 100_000, 0.5
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scales = noise_scales(sigmas, 0.7, schedule)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    exact, worst = 1.0, 0.0
    for step in range(steps):
        sigma, sigma_next, scale = sigmas[step].item(), sigmas[step + 1].item(), scales[step].item()
        theory = (1 - sigma) ** 2 * tau**2 + sigma**2
        slope = (sigma - (1 - sigma) * tau**2) / theory
        factor, std = transition(torch.ones(1, dtype=torch.float64), torch.tensor([slope]), sigma, sigma_next, scale)
        exact = factor.item() ** 2 * exact + std**2
        mean, std = transition(x, slope * x, sigma, sigma_next, scale)
        x = mean + std * torch.randn(count, generator=generator)
        if step % 100 == 99 or step > steps - 3:
            theory = (1 - sigma_next) ** 2 * tau**2 + sigma_next**2
            seen = x.double().var().item()
            assert abs(seen - exact) < 3 * exact * math.sqrt(2 / (count - 1))
            worst = max(worst, abs(seen / theory - 1))
    assert worst < 0.02


def test_kl_is_that_of_two_gaussians():
    mean, other = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, 0.3), normal(other, 0.3)).flatten(1).mean(1)
    assert torch.allclose(gaussian_kl(mean, other, 0.3), exact, rtol=1e-12)


def test_texts_are_encoded_once(family, tmp_path):
    counted = []
    hook = family.pipe.text_encoder.register_forward_hook(lambda *seen: counted.append(len(seen[-1][0])))
    cache, plain = TextCache(family, tmp_path / "text"), family.encode(TEXTS)
    counted.clear()
    first, second = cache(TEXTS), cache([TEXTS[1], TEXTS[1], TEXTS[0]])
    again = TextCache(family, tmp_path / "text")(TEXTS)  # of a run that is taken up again
    hook.remove()
    assert sum(counted) == 2
    assert torch.allclose(first.tokens, plain.tokens, atol=1e-6)
    assert torch.equal(second.tokens, first.tokens[[1, 1, 0]])
    assert torch.equal(again.tokens, first.tokens)
    if first.pooled is not None and second.pooled is not None:
        assert torch.equal(second.pooled, first.pooled[[1, 1, 0]])
