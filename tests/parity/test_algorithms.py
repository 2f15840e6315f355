"""What algorithms ask of a step beyond the clipped loss, against stock transformers and plain arithmetic, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from longrl.config import RlConfig, RolloutConfig
from longrl.evals.controls import shuffled
from longrl.first_update import FirstUpdate, Part
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.training import Batch, Share
from longrl.types import Example, Prompt
from longrl.update import Cohort, update_again
from tests import in_process
from tests.parity.test_shared_prefix import (
    gradients,
    largest_difference,
    make_prompts,
    responses_of,
    sequence_logits,
    sequence_logprobs,
)

EVEN = "tests.e2e.rewards:first_token_even"
SEEN: list[Prompt] = []


def config(algorithm: str, **changes: Any) -> RlConfig:
    settings = {"run_dir": "run", "model": {"path": "m"}, "steps": 1, "prompts_per_step": 3, "rewards": {EVEN: 1.0}}
    changes = {"rollout": {"group_size": 4, "max_new_tokens": 4}, **changes}
    changes["algo"] = {"accuracy": EVEN, **changes.get("algo", {})}
    settings |= {"algorithm": algorithm, **changes}
    return RlConfig.model_validate({**settings, "scoring": in_process(settings["rewards"])})


def questions(family: Qwen25VL, videos: Sequence[int]) -> list[tuple[Example, Prompt]]:
    """One about each video of 24 tokens."""
    return [
        (Example(id=f"q{v}", messages=(), answer=None, kind="open"), make_prompts(family, 24, ["what?"], v)[0])
        for v in videos
    ]


def batch(asked: Sequence[tuple[Example, Prompt]]) -> Batch:
    examples, prompts = map(list, zip(*asked, strict=True))
    share = Share(ranks=ALONE, epochs=[0] * len(asked), examples=examples, prompts=prompts)  # pyright: ignore
    return Batch(shares=[share], ids=[example.id for example in examples])  # pyright: ignore


class Side(NativeEngine):
    """Notes the prompts that it is asked."""

    def rollout(self, examples, prompts, seeds):
        SEEN.extend(prompts)
        return super().rollout(examples, prompts, seeds)


def learn(cfg: RlConfig, family: Qwen25VL, refill=lambda start, count: None, reference=None) -> list[Part]:
    policy = Policy(family)
    engine = NativeEngine(policy, cfg.rollout, greedy=cfg.algo.advantage == "remax")
    side = Side(policy, cfg.rollout.model_copy(update={"group_size": 2})) if cfg.algo.shuffled_rollouts else None
    learner = FirstUpdate(engine, side, reference and Policy(reference), build_rewards(cfg.rewards, cfg.scoring), cfg)
    return learner(1, batch(questions(family, [0, 1, 2])), refill)


def rows(parts: Sequence[Part]) -> list[tuple[Cohort, Any, Any]]:
    return [(cohort, group, one) for part in parts for cohort in part.cohorts for group, one in cohort.rows]


def test_the_entropy_has_the_gradient_of_stock_transformers():
    family = Qwen25VL.tiny(0, torch.float64)
    prompts, responses = make_prompts(family, 30, ["what comes first?"]), responses_of(family, [5, 2, 7])
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    policy = Policy(family)
    prefix = policy.prefix(prompts)
    streams = make_streams(prompts * 3, responses, prefix.length)
    seen = []

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(entropy.detach())
        return (weights[part, None] * entropy).sum() + 0.1 * logprobs.sum()

    policy.backward(prefix, streams, loss, 0.8, entropy_learns=True)
    ours, values = gradients(family), torch.cat(seen)[streams.mask]
    expected = []
    for weight, response in zip(weights, responses, strict=True):
        logp = torch.log_softmax(sequence_logits(family, prompts[0], response, 0.8), -1)
        entropy = -(logp.exp() * logp).sum(-1)
        (weight * entropy.sum() + 0.1 * logp.gather(-1, torch.tensor(response)[:, None]).sum()).backward()
        expected.append(entropy.detach())
    # as the gradients of log-probs: transformers computes norms and rotary angles in fp32
    torch.testing.assert_close(values, torch.cat(expected), rtol=0, atol=1e-6)
    assert largest_difference(ours, gradients(family)) < 1e-7


def test_the_greedy_response_is_that_of_temperature_0_and_moves_no_other():
    family = Qwen25VL.tiny(0, torch.float64)
    policy, asked = Policy(family), questions(family, [0, 1])
    examples, prompts = map(list, zip(*asked, strict=True))

    def roll(temperature: float, greedy: bool) -> list[Any]:
        sampling = RolloutConfig(group_size=3, max_new_tokens=6, temperature=temperature)
        with torch.no_grad():
            engine = NativeEngine(policy, sampling, greedy=greedy)
            return [group for groups, _ in engine.rollout(examples, prompts, [5, 6]) for group in groups]  # pyright: ignore

    for one, plain, coldest in zip(roll(1.0, True), roll(1.0, False), roll(0.0, False), strict=True):
        assert [x.token_ids for x in one.rollouts] == [x.token_ids for x in plain.rollouts]
        assert one.greedy.token_ids == coldest.rollouts[0].token_ids
        assert plain.greedy is None


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_the_penalty_in_the_reward_is_the_divergence_of_the_response(kl):
    """By stock transformers; the advantages that follow are those of the penalised rewards."""
    family, reference = Qwen25VL.tiny(0, torch.float64), Qwen25VL.tiny(1, torch.float64)
    twins = Qwen25VL.tiny(0, torch.float64), Qwen25VL.tiny(1, torch.float64)
    found = rows(learn(config("rloo", algo={"kl": kl, "kl_coef": 0.1}), family, reference=reference))
    by_group: dict[str, list[Any]] = {}
    for _, group, one in found:
        with torch.no_grad():
            lp, ref = (sequence_logprobs(twin, group.prompt, one.rollout.token_ids) for twin in twins)
        d = ref - lp
        estimate = (-d if kl == "k1" else d.exp() - d - 1).sum().item()
        assert one.rewards["kl"] == pytest.approx(-0.1 * estimate, abs=1e-6)
        assert one.reward == pytest.approx(one.rewards[EVEN] + one.rewards["kl"], rel=1e-12)
        by_group.setdefault(group.id, []).append(one)
    assert len(by_group) == 3
    for ones in by_group.values():
        total = sum(one.reward for one in ones)
        for one in ones:
            assert one.advantage == pytest.approx(one.reward - (total - one.reward) / 3, rel=1e-9)


@pytest.mark.parametrize("name", ["reinforce_pp", "remax", "dr_grpo"])
def test_gradients_equal_separate_sequences(name):
    """Advantages from the rewards of the whole step, of a greedy response, of the group; then -A log p by stock
    transformers, one sequence after the other."""
    family, twin = Qwen25VL.tiny(0, torch.float64), Qwen25VL.tiny(0, torch.float64)
    parts = learn(config(name, algo={"kl": "off"}), family)
    found = rows(parts)
    rewards = np.array([one.reward for _, _, one in found])
    if name == "reinforce_pp":
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    elif name == "remax":
        advantages = rewards - [group.greedy.token_ids[0] % 2 == 0 for _, group, _ in found]
    else:
        ids = [group.id for _, group, _ in found]
        advantages = rewards - [rewards[[other == i for other in ids]].mean() for i in ids]
    assert len(set(rewards)) == 2
    for (_, group, one), advantage in zip(found, advantages, strict=True):
        assert one.advantage == pytest.approx(advantage, rel=1e-9, abs=1e-12)
        (-advantage * sequence_logprobs(twin, group.prompt, one.rollout.token_ids)).sum().backward()
    assert largest_difference(gradients(family), gradients(twin)) < 1e-7
    tokens = sum(len(one.rollout.token_ids) for _, _, one in found)
    whole = {"reinforce_pp": tokens}.get(name, 12 * 4)  # constant: 12 rollouts of at most 4 tokens
    assert parts[0].totals.denominator == whole


def test_refills_take_the_place_of_groups_that_are_dropped_and_end():
    family, asked, drawn = Qwen25VL.tiny(0, torch.float64), [], []
    more = questions(family, range(3, 30))

    def refill(start: int, count: int) -> Batch:
        asked.append((start, count))
        drawn.extend(example.id for example, _ in more[start : start + count])
        return batch(more[start : start + count])

    cfg = config("dapo", rollout={"group_size": 2, "max_new_tokens": 2}, algo={"max_refills": 20})
    parts = learn(cfg, family, refill)
    assert sum(part.totals.kept for part in parts) == 3
    assert len(asked) > 1  # of two rollouts half the groups are alike
    assert [start for start, _ in asked] == [sum(count for _, count in asked[:i]) for i in range(len(asked))]
    trained = {group.id for _, group, _ in rows(parts)}
    assert len(trained) == 3
    for part in parts:
        here = [one for _, _, one in rows([part])]
        assert part.totals.denominator == sum(len(one.rollout.token_ids) for one in here)
        assert {one.rewards[EVEN] for one in here} in ({0.0, 1.0}, set())
    sampled = sum(part.totals.means["groups/kept"].count for part in parts)
    assert sampled == 3 + len(drawn)

    asked.clear()
    drawn.clear()
    never = {"rewards": {"tests.parity.test_algorithms:never": 1.0}}
    parts = learn(config("dapo", algo={"max_refills": 2}, **never), Qwen25VL.tiny(0, torch.float64), refill)
    assert asked == [(0, 3), (3, 3)]
    assert (sum(part.totals.kept for part in parts), rows(parts)) == (0, [])
    assert sum(part.totals.denominator for part in parts) == 0


def never(example, rollout) -> float:
    return 0.0


def even_of_the_first(example, rollout) -> float:
    return float(example.id == "q0" and rollout.token_ids[0] % 2 == 0)


def test_a_group_that_is_dropped_stays_part_of_what_its_cohort_shares():
    """Another pass over the batch, with the weights as they are, has the gradient of the first; and the dropped group
    counts nowhere: the same rollouts without it have that gradient too."""
    changes = {"rewards": {"tests.parity.test_algorithms:even_of_the_first": 1.0}, "prompts_per_step": 2}
    cfg = config("dapo", algo={"kl": "k3", "max_refills": 1}, **changes)
    found = []
    for texts in (["what comes first?", "who?"], ["what comes first?"]):
        family = Qwen25VL.tiny(0, torch.float64)
        policy = Policy(family)
        asked = [
            (Example(id=f"q{i}", messages=(), answer=None, kind="open"), prompt)
            for i, prompt in enumerate(make_prompts(family, 24, texts))
        ]
        reference = Policy(Qwen25VL.tiny(1, torch.float64))
        rewards = build_rewards(cfg.rewards, cfg.scoring)
        learner = FirstUpdate(NativeEngine(policy, cfg.rollout), None, reference, rewards, cfg)
        [part] = learner(1, batch(asked), lambda start, count: None)
        found.append(gradients(family))
        for cohort in part.cohorts:
            update_again(policy, cohort, cfg, part.totals)
        found.append(gradients(family))
        assert {group.id for _, group, _ in rows([part])} == {"q0"}
        assert part.totals.denominator == sum(len(one.rollout.token_ids) for _, _, one in rows([part]))
    for other in found[1:]:
        assert largest_difference(other, found[0]) < 1e-7


def test_shuffled_rollouts_see_the_frames_in_another_order_and_train_nothing():
    SEEN.clear()
    family, twin = Qwen25VL.tiny(0, torch.float64), Qwen25VL.tiny(0, torch.float64)
    parts = learn(config("t_grpo", algo={"kl": "off"}, runtime={"seed": 1}), family)
    assert len(SEEN) == 3
    for prompt, (_, plain) in zip(SEEN, questions(family, [0, 1, 2]), strict=True):
        [ours], [theirs] = prompt.media, plain.media
        assert torch.equal(prompt.token_ids, plain.token_ids)
        assert not torch.equal(ours.embeds, theirs.embeds)
        assert sorted(ours.embeds[:, 0].tolist()) == sorted(theirs.embeds[:, 0].tolist())
    ones = learn(config("grpo", algo={"kl": "off"}, runtime={"seed": 1}), twin)
    bonus = {one.rollout.token_ids: one.rewards["temporal"] for _, _, one in rows(parts)}
    assert set(bonus.values()) == {0.0, 0.3}
    assert bonus.keys() == {one.rollout.token_ids for _, _, one in rows(ones)}  # the same rollouts


def test_each_step_shuffles_anew():
    [prompt] = make_prompts(Qwen25VL.tiny(0, torch.float64), 24, ["what?"])
    one, again, other = (shuffled(prompt.media[0], 0, step) for step in (1, 1, 2))
    assert torch.equal(one.embeds, again.embeds)
    assert not torch.equal(one.embeds, other.embeds)
    assert one.key == again.key != other.key


def test_the_correction_weighs_what_the_engine_drew():
    """An engine that says less of every token: with a token's weight cut at 1.2, gradients are 1.2 times as large."""
    found = []
    for settings in ({}, {"correction": "truncate", "correction_high": 1.2, "max_logprob_diff": 9.0}):
        family = Qwen25VL.tiny(0, torch.float64)
        cfg = config("dr_grpo", algo=settings)
        policy = Policy(family)

        class Low(NativeEngine):
            drift = 0.5 if settings else 0.0

            def _make_rollout(self, ids, logprobs):
                return super()._make_rollout(ids, [x - self.drift for x in logprobs])

        learner = FirstUpdate(Low(policy, cfg.rollout), None, None, build_rewards(cfg.rewards, cfg.scoring), cfg)
        parts = learner(1, batch(questions(family, [0, 1, 2])), lambda start, count: None)
        found.append((gradients(family), parts[0].totals.metrics()))
    (plain, _), (weighed, metrics) = found
    # norms are in fp32 whatever the dtype, and 1.2 x is no power of two
    assert largest_difference({n: g / 1.2 for n, g in weighed.items()}, plain) < 1e-6
    assert (metrics["correction"], metrics["correction/bounded"]) == (pytest.approx(1.2), 1.0)
