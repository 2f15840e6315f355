"""Advantages and shaping: tables by hand, NumPy in float64, and properties that must hold for any rewards."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longrl.algo.advantages import (
    ADVANTAGES,
    Advantage,
    assign_advantages,
    batch_advantages,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
)
from longrl.algo.losses import LOSSES, policy_loss
from longrl.algo.shaping import is_informative, overlong, shape, temporal
from longrl.config import AlgoConfig, RlConfig
from longrl.parallel.ranks import ALONE
from longrl.rewards import build_rewards
from longrl.scoring import Scoring
from longrl.totals import Totals
from longrl.types import LossInputs, Rollout, Scored
from tests.unit.test_rewards import group, rollout

REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9)
GROUPS = st.lists(REWARDS, min_size=1, max_size=5)
SHIFT = st.floats(-50, 50, width=32)
NAMES = [name for name, one in ADVANTAGES.items() if not one.greedy]
CENTRED = [name for name in NAMES if name != "reinforce_pp"]
"""Whose groups sum to zero each; reinforce_pp compares across them."""
SCALED = ["grpo", "reinforce_pp", "reinforce_pp_baseline"]
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def said(reward: float | None, **rewards: float | None) -> Scored:
    rollout = Rollout(token_ids=(1,), logprobs=(-1.0,), text="", finish_reason="stop", policy_version=0)
    return Scored(rollout=rollout, rewards={"r": reward, **rewards}, reward=reward)


def compute(name: str, groups: list[list[float]]) -> list[list[float]]:
    one = ADVANTAGES[name]
    return batch_advantages(groups, one) if one.scope == "batch" else [one.compute(group) for group in groups]


def in_numpy(name: str, groups: list[list[float]]) -> list[np.ndarray]:
    """The definitions, written again."""
    centred = [np.array(group) - np.mean(group) for group in groups]
    flat = np.concatenate([np.array(group) for group in groups])
    return {
        "dr_grpo": lambda: centred,
        "reinforce": lambda: centred,
        "grpo": lambda: [c / (np.std(group, ddof=1) + 1e-6) for c, group in zip(centred, groups, strict=True)],
        "rloo": lambda: [
            np.array([r - np.mean(np.delete(np.array(group), i)) for i, r in enumerate(group)]) for group in groups
        ],
        "reinforce_pp": lambda: [(np.array(g) - flat.mean()) / (np.std(flat, ddof=1) + 1e-6) for g in groups],
        "reinforce_pp_baseline": lambda: [c / (np.std(np.concatenate(centred), ddof=1) + 1e-6) for c in centred],
    }[name]()


def close(ours, theirs, rel: float = 1e-9) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == pytest.approx(list(b), rel=rel, abs=rel * max(1, *map(abs, b)))


def test_batch_scopes_by_hand():
    """Rewards 1, 0 and 1, 1, 0, 3: mean 1, squares 0 + 1 + 0 + 0 + 1 + 4 = 6, unbiased std sqrt(6 / 5)."""
    std = math.sqrt(6 / 5) + 1e-6
    close(reinforce_pp([[1, 0], [1, 1, 0, 3]]), [[0, -1 / std], [0, 0, -1 / std, 2 / std]], rel=1e-12)
    # group means 1/2 and 5/4
    centred = [[0.5, -0.5], [-0.25, -0.25, -1.25, 1.75]]
    std = math.sqrt(sum(x * x for group in centred for x in group) / 5) + 1e-6
    close(reinforce_pp_baseline([[1, 0], [1, 1, 0, 3]]), [[x / std for x in group] for group in centred], rel=1e-12)


def test_remax_by_hand():
    assert remax([1.0, 0.0, 0.5], 0.5) == [0.5, -0.5, 0.0]
    assert [one.advantage for one in assign_advantages([said(1.0), said(None)], "remax", 0.25)] == [0.75, 0.0]


@PROPERTY
@given(groups=GROUPS)
def test_they_are_what_numpy_makes_of_the_definitions(groups):
    for name in NAMES:
        close(compute(name, groups), in_numpy(name, groups), rel=1e-6 if name in SCALED else 1e-9)


@PROPERTY
@given(groups=GROUPS, shift=SHIFT)
def test_a_shift_of_all_rewards_does_not_matter(groups, shift):
    spread = max(max(g) - min(g) for g in groups)
    assume(spread == 0 or spread > 1e-2)  # a shift rounds the digits of a smaller one away
    for name in NAMES:
        close(compute(name, [[r + shift for r in g] for g in groups]), compute(name, groups), rel=1e-6)


@PROPERTY
@given(groups=GROUPS, scale=st.floats(0.1, 100))
def test_a_scale_scales_or_does_not_matter(groups, scale):
    assume(all(len(set(g)) == 1 or np.std(g) > 1 for g in groups))  # against which 1e-6 is small
    for name in NAMES:
        ours, times = compute(name, [[r * scale for r in g] for g in groups]), 1 if name in SCALED else scale
        close(ours, [[a * times for a in g] for g in compute(name, groups)], rel=1e-4)


@PROPERTY
@given(groups=GROUPS)
def test_they_sum_to_zero(groups):
    for name in CENTRED:
        for values in compute(name, groups):
            assert math.fsum(values) == pytest.approx(0, abs=1e-7 * max(1, *map(abs, values)))
    whole = [x for values in compute("reinforce_pp", groups) for x in values]
    assert math.fsum(whole) == pytest.approx(0, abs=1e-7 * max(1, *map(abs, whole)))


@PROPERTY
@given(group=REWARDS, seed=st.integers(0, 99))
def test_a_permutation_of_a_group_permutes_its_advantages(group, seed):
    order = np.random.default_rng(seed).permutation(len(group))
    for name in NAMES:
        [plain], [permuted] = compute(name, [group]), compute(name, [[group[i] for i in order]])
        close([permuted], [[plain[i] for i in order]], rel=1e-7)


@PROPERTY
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_the_order_of_groups_and_so_of_ranks_does_not_matter(groups, seed):
    order = np.random.default_rng(seed).permutation(len(groups))
    plain, permuted = (
        compute("reinforce_pp_baseline", groups),
        compute("reinforce_pp_baseline", [groups[i] for i in order]),
    )
    close(permuted, [plain[i] for i in order], rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_give_zeros(name):
    for reward in (0.0, 0.1, -7.7, 1e9):
        assert compute(name, [[reward] * 3, [reward] * 2]) == [[0.0] * 3, [0.0] * 2]


def test_a_group_that_is_too_small_stays_out_of_the_statistics():
    assert batch_advantages([[5.0], [1.0, 0.0], []], ADVANTAGES["reinforce_pp_baseline"])[0::2] == [[0.0], []]
    alone = batch_advantages([[1.0, 0.0]], ADVANTAGES["reinforce_pp_baseline"])
    assert batch_advantages([[5.0], [1.0, 0.0]], ADVANTAGES["reinforce_pp_baseline"])[1:] == alone
    assert batch_advantages([[2.0]], ADVANTAGES["reinforce_pp"]) == [[0.0]]
    assert batch_advantages([], ADVANTAGES["reinforce_pp"]) == []


def test_an_advantage_of_ones_own_sees_the_step():
    mine = Advantage(compute=lambda groups: [[float(len(groups))] * len(g) for g in groups], scope="batch")
    assert batch_advantages([[1.0, 2.0], [3.0, 3.0]], mine) == [[2.0, 2.0], [2.0, 2.0]]


# Shaping


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1.0)]
)
def test_overlong_by_hand(length, penalty):
    assert overlong(length, 100, 0.2) == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize(
    ("ordered", "shuffled", "bonus"),
    [
        ([1, 0, 1], [1, 0], [0.3, 0, 0.3]),  # 2/3 > 1/2
        ([1, 0, 0], [1, 0], [0, 0, 0]),
        ([1, 0], [1, 0], [0, 0]),  # a tie shows nothing
        ([1, None, 0], [0, None], [0.3, 0, 0]),
        ([0, 0], [0], [0, 0]),
        ([1, 1], [], [0, 0]),  # no video, nothing to shuffle
        ([1, 1], [None], [0, 0]),
    ],
)
def test_temporal_bonus_by_hand(ordered, shuffled, bonus):
    made = [[said(1.0, answer=x) for x in some] for some in (ordered, shuffled)]
    assert temporal(*made, "answer", 0.3) == bonus


@pytest.mark.parametrize(
    ("rewards", "informative"),
    [([1, 1, 1], False), ([0, 0], False), ([1, 0], True), ([1, None, 1], False), ([None], False), ([0.1, 0.2], True)],
)
def test_groups_whose_rewards_differ_are_informative(rewards, informative):
    assert is_informative([said(r) for r in rewards]) == informative


@pytest.mark.parametrize(
    ("texts", "greedy", "advantages"),
    [("BB", "C", [1.0, 1.0]), ("BB", "B", None), ("BC", "C", [1.0, 0.0]), ("CC", "C", None)],
)
def test_dynamic_sampling_counts_the_greedy_reward_in(texts, greedy, advantages):
    algo = {"advantage": "remax", "max_refills": 1}
    run = {"run_dir": "x", "model": {"path": "tiny:qwen2"}, "data": {"train": "x"}, "steps": 1}
    config, totals = RlConfig.model_validate({**run, "rewards": {"choice": 1.0}, "algo": algo}), Totals()
    score = Scoring(build_rewards(config.rewards), config, ALONE, totals, lambda _: nullcontext())
    asked = replace(group(*texts), greedy=rollout(greedy))
    made = [[one.advantage for one in ones] for _, scored, _ in score([((asked,), None)]) for ones in scored]
    assert made == ([advantages] if advantages else [])
    assert totals.kept == bool(advantages)


def test_shaping_adds_under_a_name_and_leaves_the_unscored_alone():
    shaped = shape([said(1.0), said(None)], "overlong", [-0.5, -0.5])
    assert [one.reward for one in shaped] == [0.5, None]
    assert shaped[0].rewards == {"r": 1.0, "overlong": -0.5}


# Losses, for any numbers


@PROPERTY
@given(
    gaps=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
    drift=st.floats(-1e4, 1e4),
    advantage=st.floats(-1e3, 1e3),
    loss=st.sampled_from(sorted(LOSSES)),
    kl=st.sampled_from(["off", "k2", "k3"]),
    correction=st.sampled_from(["off", "truncate", "mask"]),
    level=st.sampled_from(["token", "sequence"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_extreme_log_ratios_stay_finite_and_masked_tokens_do_not_count(
    gaps, drift, advantage, loss, kl, correction, level, dtype
):
    old = torch.full((1, 4), -1.0, dtype=dtype)
    mask = torch.tensor([[True, True, True, False]])
    algo = AlgoConfig(loss=loss, kl=kl, correction=correction, correction_level=level, entropy_coef=0.1)
    found = []
    for behind in (gaps[3], math.nan, math.inf):
        lp = (old + torch.tensor([[*gaps[:3], behind]], dtype=dtype)).requires_grad_()
        made = LossInputs(
            logprobs=lp,
            old_logprobs=old,
            ref_logprobs=old,
            rollout_logprobs=old - drift,
            entropy=lp * 0 + 1,
            advantages=torch.full_like(old, advantage),
            mask=mask,
        )
        output = policy_loss(made, algo)
        output.loss_sum.backward()
        assert lp.grad is not None
        assert math.isfinite(output.loss_sum.item())
        assert all(map(math.isfinite, output.metrics.values()))
        assert lp.grad[mask].isfinite().all()
        found.append((output.loss_sum.item(), lp.grad[mask].tolist(), output.metrics))
    assert found[0] == found[1] == found[2]
