"""What a flow run learns from samples, against plain formulas; adapters, copies, export."""

from __future__ import annotations

import math

import pytest
import torch

from longrl.config import LoraConfig
from longrl.flow_config import FlowAlgoConfig
from longrl.flow_update import Samples, count, nft_gradient, policy_gradient
from longrl.models.denoiser import Denoiser, Shadow
from longrl.models.sd3 import SD3
from longrl.models.tiny_diffusion import tiny_sd3, tiny_wan
from longrl.models.wan import Wan
from longrl.rollout.flow import Guided, make_sampler
from longrl.rollout.flow_window import stochastic_steps, trained_steps
from longrl.totals import Totals

STEPS, TOKENS, GROUP = 4, 24, 3
TEXTS = ["a red picture", "something blue"]


def make(name, lora=True, guidance=3.0, checkpointing=False, shared_start=False):
    pipe = tiny_sd3(0) if name == "sd3" else tiny_wan(0)
    pipe.set_progress_bar_config(disable=True)
    family = SD3(pipe, TOKENS) if name == "sd3" else Wan(pipe, TOKENS)
    denoiser = Denoiser(family, LoraConfig(rank=2, alpha=4) if lora else None, 0, checkpointing, referred_to=True)
    size = (16, 16, 5) if family.is_video else (16, 16, 1)
    model = Guided(family, guidance, family.encode([""]))
    options = {"shared_start": shared_start, "max_rows": 4}
    return family, denoiser, make_sampler(model, size=size, steps=STEPS, noise_level=0.7, **options)


def perturb(denoiser, scale=0.05, seed=1):
    """Away from the start, where adapters are silent, ratios 1 and divergences 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in denoiser.weights.values():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


def draw(family, sampler, trained, window=range(STEPS)):
    embeds = family.encode(TEXTS)
    drawn = sampler(embeds, [5, 6], GROUP, window)
    return Samples(
        drawn=drawn,
        embeds=embeds.repeat(GROUP),
        advantages=torch.tensor([1.0, -0.5, -0.5, 2.0, 0.0, -2.0]),
        scored=torch.tensor([True] * 4 + [False, True]),
        trained=trained,
        seeds=list(range(6)),
    )


def gradients(denoiser):
    found = {name: x.grad.clone() for name, x in denoiser.weights.items() if x.grad is not None}
    for x in denoiser.weights.values():
        x.grad = None
    return found


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(x.abs().max() for x in theirs.values())
    return max((ours[name] - theirs[name]).abs().max() / scale for name in theirs).item()


@pytest.mark.parametrize("shared_start", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_policy_gradient_equals_the_plain_formula(name, lora, shared_start):
    """One sample, one step at a time, textbook Gaussians; weights that have moved, so that ratios are clipped; with
    checkpointing against without; the step that begins in one place for a group, computed once, against each sample's
    own."""
    family, denoiser, sampler = make(name, lora, checkpointing=True, shared_start=shared_start)
    perturb(denoiser)
    samples = draw(family, sampler, [0, 2])
    assert samples.drawn.together == (GROUP if shared_start else 1)
    algo = FlowAlgoConfig(kl_coef=0.5, clip=1e-4)
    assert count(samples) == 5 * 2
    totals = Totals()
    policy_gradient(sampler, denoiser, samples, algo, totals, first=True)
    assert totals.logprob_diff is not None
    assert totals.logprob_diff < 1e-5
    gradients(denoiser)
    perturb(denoiser, 0.01, seed=2)
    totals = Totals()
    policy_gradient(sampler, denoiser, samples, algo, totals, first=False)
    ours, metrics = gradients(denoiser), totals.metrics()
    assert 0 < metrics["clip/low"] + metrics["clip/high"] < 1
    family.transformer.disable_gradient_checkpointing()
    normal, sigmas, kls, losses = torch.distributions.Normal, sampler.schedule.sigmas.tolist(), 0.0, 0.0
    for i in range(6):
        if not samples.scored[i]:
            continue
        for step in samples.trained:
            sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
            s = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
            x, after = samples.drawn.states[i : i + 1, step], samples.drawn.states[i : i + 1, step + 1]
            embeds, time = samples.embeds[i : i + 1], torch.tensor([1000 * sigma])

            def mean(x=x, embeds=embeds, time=time, s=s, sigma=sigma, dt=dt):
                away = family.velocity(x, time, family.encode([""]))
                v = away + 3.0 * (family.velocity(x, time, embeds) - away)
                return x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt

            std = s * math.sqrt(-dt)
            with torch.no_grad(), denoiser.reference():
                reference = normal(mean(), std)
            policy = normal(mean(), std)
            ratio = (policy.log_prob(after).mean() - samples.drawn.logprobs[i, step]).exp()
            advantage = samples.advantages[i]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - algo.clip, 1 + algo.clip) * advantage)
            kl = torch.distributions.kl_divergence(policy, reference).mean()
            loss = -surrogate + 0.5 * kl
            loss.backward()
            kls, losses = kls + kl.item(), losses + loss.item()
    assert metrics["kl"] == pytest.approx(kls / 10, rel=1e-3)
    assert totals.loss_sum == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert largest_difference(ours, gradients(denoiser)) < 1e-4


def test_a_group_without_signal_is_not_run_unless_there_is_a_divergence():
    family, denoiser, sampler = make("sd3")
    perturb(denoiser)
    samples = draw(family, sampler, [0, 2])
    samples.advantages.zero_()
    policy_gradient(sampler, denoiser, samples, FlowAlgoConfig(), Totals(), first=True)
    assert gradients(denoiser) == {}
    policy_gradient(sampler, denoiser, samples, FlowAlgoConfig(kl_coef=0.1), Totals(), first=True)
    assert max(x.abs().max() for x in gradients(denoiser).values()) > 0


def test_sampling_that_disagrees_stops_the_run():
    family, denoiser, sampler = make("sd3")
    samples = draw(family, sampler, [0, 2])
    perturb(denoiser, 1.0)
    for algo, bound in ((FlowAlgoConfig(max_logprob_diff=2e-5), "2e-05"), (FlowAlgoConfig(clip=1e-5), "1e-05")):
        with pytest.raises(RuntimeError, match=rf"differ by .* in a log-prob, more than flow.max_.* \({bound}, unless"):
            policy_gradient(sampler, denoiser, samples, algo, Totals(), first=True)


def test_nft_gradient_equals_the_plain_formula():
    from longrl.algo.flow import nft_loss
    from longrl.runtime import seed_for

    family, denoiser, sampler = make("wan", guidance=1.0)
    perturb(denoiser)
    old = Shadow(denoiser)
    samples = draw(family, sampler, [1, 3], window=range(STEPS, STEPS))
    perturb(denoiser, 0.05, seed=2)
    algo = FlowAlgoConfig(method="nft", kl_coef=0.3, nft_beta=0.5)
    before = denoiser.packed()
    nft_gradient(sampler, denoiser, samples, algo, Totals(), old)
    ours = gradients(denoiser)
    assert all(torch.equal(before[name], x) for name, x in denoiser.packed().items())
    for i in range(6):
        if not samples.scored[i]:
            continue
        for step in samples.trained:
            sigma = sampler.schedule.sigmas[step]
            generator = torch.Generator().manual_seed(seed_for(i, "forward", step))
            x0 = samples.drawn.latents[i : i + 1]
            x = (1 - sigma) * x0 + sigma * torch.randn(x0.shape[1:], generator=generator)
            embeds, time = samples.embeds[i : i + 1], 1000 * sigma.view(1)
            with torch.no_grad():
                with old.swapped_in():
                    v_old = family.velocity(x, time, embeds)
                with denoiser.reference():
                    reference = family.velocity(x, time, embeds)
            v = family.velocity(x, time, embeds)
            loss = nft_loss(v, v_old, x, x0, sigma.view(1), samples.advantages[i : i + 1], 0.5, 5.0).sum()
            (loss + 0.3 * ((v - reference) ** 2).mean()).backward()
    assert largest_difference(ours, gradients(denoiser)) < 1e-4


def test_a_window_makes_less_than_half_the_passes_of_full_sampling():
    """Ten sampling steps, windows at the beginning and at the end; a backward counted as two passes. Measured:
    benchmarks/flow.py."""
    family, denoiser, _ = make("sd3")
    model, counted, sums = Guided(family), [], {}
    family.transformer.register_forward_hook(
        lambda *seen: counted.append(len(seen[-1][0]) * (3 if seen[-1][0].requires_grad else 1))
    )
    for preset, iteration in (("flow_grpo", 1), ("mix_grpo", 1), ("mix_grpo", 200), ("flow_grpo_fast", 1)):
        algo = FlowAlgoConfig.model_validate({"preset": preset, "kl_coef": 0.0})
        shared = algo.shared_start
        sampler = make_sampler(model, size=(16, 16, 1), steps=10, noise_level=0.7, shared_start=shared)
        window = stochastic_steps(algo, 10, iteration, 0)
        trained = trained_steps(algo, 10, window, iteration, 0)
        counted.clear()
        policy_gradient(sampler, denoiser, draw(family, sampler, trained, window), algo, Totals(), first=True)
        sums[preset, iteration] = sum(counted)
        if shared:
            together = window.start + 1  # steps that begin in one place for the group
            assert sums[preset, iteration] == 2 * together + 6 * (10 - together) + 3 * (2 + 6)
    assert sums["flow_grpo", 1] == 6 * (10 + 3 * 9)
    assert max(list(sums.values())[1:]) < sums["flow_grpo", 1] / 2
    assert sums["mix_grpo", 200] < sums["flow_grpo", 1] / 3


def test_adapters_beside_bfloat16_weights():
    """Sampling and training still agree, as they make the same batches."""
    pipe = tiny_sd3(0).to(torch.bfloat16)
    family = SD3(pipe, TOKENS)
    denoiser = Denoiser(family, LoraConfig(rank=2), 0)
    perturb(denoiser)
    assert {x.dtype for x in denoiser.weights.values()} == {torch.float32}
    model = Guided(family, 3.0, family.encode([""]))
    sampler = make_sampler(model, size=(16, 16, 1), steps=STEPS, noise_level=0.7, max_rows=4)
    samples = draw(family, sampler, [0, 2])
    assert samples.drawn.latents.dtype == torch.float32
    totals = Totals()
    policy_gradient(sampler, denoiser, samples, FlowAlgoConfig(), totals, first=True)
    assert totals.logprob_diff is not None
    assert totals.logprob_diff < 1e-5
    assert all(torch.isfinite(x).all() for x in gradients(denoiser).values())


def test_shadow_follows_and_steps_aside():
    _, denoiser, _ = make("sd3")
    shadow, start = Shadow(denoiser), denoiser.packed()
    perturb(denoiser)
    moved = denoiser.packed()
    shadow.follow(0.75)
    with shadow.swapped_in():
        inside = denoiser.packed()
    assert all(torch.allclose(inside[name], 0.75 * start[name] + 0.25 * moved[name], atol=1e-7) for name in start)
    assert all(torch.equal(x, moved[name]) for name, x in denoiser.packed().items())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_stock_pipeline_loads_what_is_saved(name, lora, tmp_path):
    family, denoiser, sampler = make(name, lora)
    perturb(denoiser)
    denoiser.save(tmp_path / "model", denoiser.packed())
    fresh = tiny_sd3(0) if name == "sd3" else tiny_wan(0)
    if lora:
        fresh.load_lora_weights(tmp_path / "model")
    else:
        fresh.transformer = type(fresh.transformer).from_pretrained(tmp_path / "model")
    other = type(family)(fresh, TOKENS)
    x, time = torch.randn(2, *sampler.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 500.0])
    with torch.no_grad():
        ours = family.velocity(x, time, family.encode(TEXTS))
        with denoiser.reference():
            start = family.velocity(x, time, family.encode(TEXTS))
        assert torch.allclose(other.velocity(x, time, other.encode(TEXTS)), ours, atol=1e-5)
    assert (ours - start).abs().max() > 1e-3


def test_unknown_lora_target():
    pipe = tiny_sd3(0)
    with pytest.raises(
        ValueError, match=r"model.lora.targets: to_x: no such linear layer in the denoiser's blocks, which"
    ):
        Denoiser(SD3(pipe), LoraConfig(targets=("to_q", "to_x")), 0)


def test_sizes_that_cannot_be_made():
    sd3, wan = SD3(tiny_sd3(0)), Wan(tiny_wan(0))
    sd3.require_size(16, 32, 1)
    wan.require_size(32, 16, 5)
    for family, size, words in (
        (sd3, (18, 16, 1), "media.height is 18, expected a multiple of 4 up to 128, .*; use 16"),
        (sd3, (16, 4096, 1), "media.width is 4096, expected a multiple of 4 up to 128, .*; use 128"),
        (sd3, (16, 16, 5), "media.frames is 5, but the model makes images; set it to 1"),
        (wan, (16, 24, 5), "media.width is 24, expected a multiple of 16, .*; use 32"),
        (wan, (16, 16, 4), "media.frames is 4, expected 1 \\+ a multiple of 2, .*; use 5"),
    ):
        with pytest.raises(ValueError, match=words):
            family.require_size(*size)
