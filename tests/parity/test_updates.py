"""What a step learns, when it takes several updates and when rewards come late, against plain twins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from weakref import WeakSet

import pytest
import torch

from longrl.config import RlConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.optim import Optimizer
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.scoring import Scoring
from longrl.totals import Totals
from longrl.types import Example, Group, Prefix, Rollout, Scored
from longrl.update import Cohort, update, update_again
from tests import in_process
from tests.e2e.rewards import first_token_even
from tests.parity.test_shared_prefix import gradients, largest_difference, make_prompts, sequence_logprobs

VIDEOS = [["what comes first?", "where is the red circle?"], ["who?"], ["why?", "what is last?"]]
LR = 1e-4
POOL = ThreadPoolExecutor(2)


def config(rewards: str = "first_token_even", **changes) -> RlConfig:
    settings = {
        "run_dir": "run",
        "model": {"path": "m"},
        "steps": 1,
        "rewards": {f"tests.parity.test_updates:{rewards}": 1.0},
        "scoring": in_process([f"tests.parity.test_updates:{rewards}"]),
    }
    return RlConfig.model_validate({**settings, "rollout": {"group_size": 4, "max_new_tokens": 8}, **changes})


def late(example: Example, rollout: Rollout) -> float | Future[float]:
    """As first_token_even; of the second video at once."""
    if example.category == "1":
        return first_token_even(example, rollout)
    return POOL.submit(first_token_even, example, rollout)


def late_and_broken(example: Example, rollout: Rollout) -> Future[float] | float:
    def judge() -> float:
        if example.category == "0" and rollout.token_ids[0] % 3 == 0:
            raise OSError("no answer")
        return first_token_even(example, rollout)

    return POOL.submit(judge)


def broken(example: Example, rollout: Rollout) -> float:
    return late_and_broken(example, rollout).result()  # pyright: ignore


def roll(policy: Policy, config: RlConfig) -> Iterator[tuple[tuple[Group, ...], Prefix]]:
    """Three videos of 40 tokens; examples say in `category` of which they are."""
    videos = [make_prompts(policy.family, 40, texts, seed) for seed, texts in enumerate(VIDEOS)]  # pyright: ignore
    prompts = [prompt for video in videos for prompt in video]
    examples = [
        Example(id=f"q{v}{i}", messages=(), answer=None, kind="open", category=str(v))
        for v, video in enumerate(videos)
        for i in range(len(video))
    ]
    return NativeEngine(policy, config.rollout).rollout(examples, prompts, range(len(prompts)))


def learn(policy: Policy, config: RlConfig, reference: Policy | None = None) -> tuple[list[Cohort], Totals]:
    """The first update, as train_rl makes it."""
    totals, cohorts = Totals(), []
    score = Scoring(build_rewards(config.rewards, config.scoring), config, ALONE, totals, lambda _: nullcontext())
    for groups, scored, prefix in score(roll(policy, config)):
        cohorts += update(policy, reference, groups, scored, prefix, config, totals)
    return cohorts, totals


def plain_update(
    family: Qwen25VL, rows: Sequence[tuple[Group, Scored]], old: list[torch.Tensor], reference: Qwen25VL, cfg: RlConfig
) -> int:
    """The slow twin: one sequence after the other. Accumulates gradients; returns how many tokens were clipped."""
    clipped, algo = 0, cfg.algo
    for (group, one), before in zip(rows, old, strict=True):
        ids, temperature = one.rollout.token_ids, cfg.rollout.temperature
        logp = sequence_logprobs(family, group.prompt, ids, temperature)
        with torch.no_grad():
            d = sequence_logprobs(reference, group.prompt, ids, temperature) - logp.detach()
        ratio = (logp - before).exp()
        bounded = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
        lesser = torch.minimum(ratio * one.advantage, bounded * one.advantage)
        clipped += int(((ratio * one.advantage) > (bounded * one.advantage)).sum())
        loss = -lesser.sum()
        if algo.kl == "k3":
            # d/dlogp of exp(d) - d - 1 is 1 - exp(d)
            loss = loss + algo.kl_coef * ((1 - d.exp()) * logp).sum()
        loss.backward()
    return clipped


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in weights.values()])


@pytest.mark.parametrize("kl", ["off", "k3"])
def test_two_updates_equal_separate_sequences(kl):
    """Old log-probs of its own, two steps of PyTorch's AdamW, stock transformers: in fp64."""
    cfg = config(algo={"kl": kl, "kl_coef": 0.05, "updates_per_batch": 2}, optim={"lr": LR})
    family = Qwen25VL.tiny(0, torch.float64)
    twin, reference = (Qwen25VL(copy.deepcopy(family.model), family.tokenizer, {}) for _ in range(2))
    before = {n: p.detach().clone() for n, p in twin.model.named_parameters()}
    policy = Policy(family)
    optimizer = Optimizer(policy.trunk.parameters(), cfg.optim, 1)
    cohorts, totals = learn(policy, cfg, Policy(Qwen25VL.tiny(0, torch.float64)) if kl == "k3" else None)
    rows = [row for cohort in cohorts for row in cohort.rows]
    count = totals.denominator
    optimizer.step(1, count, [])
    unclipped = Totals.sum([totals])
    for cohort in cohorts:
        update_again(policy, cohort, cfg, totals)
    optimizer.step(1, count, [])

    with torch.no_grad():
        old = [
            sequence_logprobs(twin, group.prompt, one.rollout.token_ids, cfg.rollout.temperature) for group, one in rows
        ]
    adamw = Optimizer(twin.model.parameters(), cfg.optim, 1).adamw  # which weights decay
    clipped = []
    for _ in range(2):
        clipped.append(plain_update(twin, rows, old, reference, cfg))
        for p in twin.model.parameters():
            p.grad = None if p.grad is None else p.grad / count
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), cfg.optim.max_grad_norm)
        adamw.step()
        adamw.zero_grad()

    assert clipped[0] == unclipped.token_sums["clip/low"] + unclipped.token_sums["clip/high"] == 0
    assert clipped[1] == totals.token_sums["clip/low"] + totals.token_sums["clip/high"] > 0
    ours, theirs = (flat(dict(one.model.named_parameters())) for one in (family, twin))
    assert (ours - theirs).norm() / theirs.norm() < 1e-7
    # of what they have moved; AdamW divides by the gradient's size, so rounding counts most where there is next to none
    assert (ours - theirs).norm() / (theirs - flat(before)).norm() < 5e-5


@pytest.mark.parametrize(("delayed", "at_once"), [("late", "first_token_even"), ("late_and_broken", "broken")])
@pytest.mark.parametrize("kl", ["off", "k3"])
def test_late_rewards_give_the_gradient_of_immediate_ones(delayed, at_once, kl):
    """Sums are taken in another order, nothing else."""
    found = []
    for name in (delayed, at_once):
        policy = Policy(Qwen25VL.tiny(0, torch.float64))
        reference = Policy(Qwen25VL.tiny(1, torch.float64)) if kl == "k3" else None
        cohorts, totals = learn(policy, config(name, algo={"kl": kl}), reference)
        found.append((gradients(policy.family), totals, [c.rows[0][0].id for c in cohorts]))  # pyright: ignore
    (ours, ours_totals, late_order), (theirs, their_totals, order) = found
    assert largest_difference(ours, theirs) < 1e-12
    assert ours_totals.denominator == their_totals.denominator
    mine, other = (
        {name.replace(which, "reward"): value for name, value in totals.metrics().items()}
        for which, totals in ((delayed, ours_totals), (at_once, their_totals))
    )
    assert mine == pytest.approx(other, rel=1e-12)
    assert (mine["reward/unscored"] > 0) == (delayed == "late_and_broken")
    assert late_order == (["q10", "q00", "q20"] if delayed == "late" else order)


def test_a_cohort_that_waits_holds_no_prefix():
    """Nothing that the prefix passes keep for their backward is left when the next cohort begins."""

    class Kept:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x.detach()  # not the graph again, whose cycle would stay
            kept.add(self)

    kept: WeakSet[Kept] = WeakSet()
    policy, cfg = Policy(Qwen25VL.tiny(0, torch.float32)), config("late_and_broken")
    score = Scoring(build_rewards(cfg.rewards, cfg.scoring), cfg, ALONE, Totals(), lambda _: nullcontext())
    seen = []

    def watched():
        for groups, prefix in roll(policy, cfg):
            seen.append(len(kept))
            yield groups, prefix
            del groups, prefix
            seen.append(len(kept))

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda one: one.x):
        given = list(score(watched()))
    assert all(prefix is None for _, _, prefix in given)
    assert len(seen) == 2 * len(VIDEOS)
    assert all(seen[::2])  # the graph of one prefix
    assert not any(seen[1::2])
