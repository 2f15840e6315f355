"""What the engine says it sampled is what the trainer and stock transformers score."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import ClassVar

import pytest
import torch

from longrl.config import RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, Prefix
from tests.parity.test_shared_prefix import make_prompts, plain

QUESTIONS = ["what comes first?", "where is the red circle?", "who?"]


def roll(dtype, questions, *, temperature=1.0, group_size=4, limit=12, **settings):
    policy = Policy(Qwen25VL.tiny(0, dtype))
    prompts = make_prompts(policy.family, 60, questions)
    examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(len(prompts))]
    config = RolloutConfig(group_size=group_size, max_new_tokens=limit, temperature=temperature, **settings)
    with torch.no_grad():
        cohorts = list(NativeEngine(policy, config).rollout(examples, prompts, list(range(len(prompts)))))
    return policy, cohorts


# fp32: two different orders of summation
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_logprobs_equal_the_trainers(dtype, bound, temperature):
    policy, [(groups, prefix)] = roll(dtype, QUESTIONS, temperature=temperature)
    rows = [(group.prompt, one) for group in groups for one in group.rollouts]
    streams = make_streams([prompt for prompt, _ in rows], [one.token_ids for _, one in rows], prefix.length)
    logprobs, entropy = policy.logprobs(prefix, streams, temperature)
    engine = torch.tensor([x for _, one in rows for x in one.logprobs], dtype=torch.float64)
    assert (logprobs[streams.mask] - engine).abs().max() < bound
    assert (entropy[streams.mask] > 0).all()


def test_engine_logprobs_equal_stock_transformers():
    policy, [(groups, _)] = roll(torch.float32, QUESTIONS)
    for group in groups:
        responses = [list(one.token_ids) for one in group.rollouts]
        theirs = plain(policy.family, [group.prompt] * len(responses), responses, torch.ones(len(responses)))
        for one, logp in zip(group.rollouts, theirs, strict=True):
            assert (torch.tensor(one.logprobs) - logp).abs().max() < 1e-5


def test_a_rollout_does_not_depend_on_its_batch():
    """In fp64, where rounding cannot tip a draw: alone, or beside other questions."""
    _, [(together, _)] = roll(torch.float64, QUESTIONS)
    _, [(alone, _)] = roll(torch.float64, QUESTIONS[:1])
    assert [one.token_ids for one in together[0].rollouts] == [one.token_ids for one in alone[0].rollouts]


@pytest.mark.parametrize("most", [1, 8])
def test_questions_that_take_turns_draw_what_they_draw_together(most):
    """Groups of 4, one or two at a time, over one prefill; fp64 as above."""
    _, [(together, _)] = roll(torch.float64, QUESTIONS)
    _, [(in_turns, _)] = roll(torch.float64, QUESTIONS, max_streams=most)
    assert [[one.token_ids for one in group.rollouts] for group in in_turns] == [
        [one.token_ids for one in group.rollouts] for group in together
    ]


VIDEOS = {30: QUESTIONS, 25: ["why?"], 41: ["what is last?", "is it red?"]}


@cache
def roll_videos(in_flight: int, max_streams: int = 128):
    """Three videos of other lengths; every fifth token ends a response, so that streams leave the buffers."""
    alive: list[int] = []

    class Watched(Policy):
        made: ClassVar[list[Prefix]] = []

        def prefix(self, prompts):
            self.made.append(super().prefix(prompts))
            alive.append(sum(bool(prefix.keys) for prefix in self.made))
            return self.made[-1]

    family = Qwen25VL.tiny(0, torch.float64)
    family.model.generation_config.eos_token_id = list(range(0, len(family.tokenizer), 5))
    policy = Watched(family)
    prompts = [p for frames, texts in VIDEOS.items() for p in make_prompts(family, frames, texts, seed=frames)]
    examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(len(prompts))]
    config = RolloutConfig(group_size=8, max_new_tokens=12, prompts_in_flight=in_flight, max_streams=max_streams)
    rollouts = []
    for groups, prefix in NativeEngine(policy, config).rollout(examples, prompts, range(len(prompts))):
        rollouts += [one for group in groups for one in group.rollouts]
        prefix.release()
    return rollouts, max(alive)


@pytest.mark.parametrize(("in_flight", "most"), [(2, 128), (3, 128), (9, 128), (3, 16)])
def test_videos_side_by_side_draw_what_they_draw_one_by_one(in_flight, most):
    """In fp64 as above; no more prefixes are alive than are in flight."""
    alone, one = roll_videos(1)
    together, alive = roll_videos(in_flight, most)
    assert one == 1
    assert alive == min(in_flight, len(VIDEOS))
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
    assert len({len(r.token_ids) for r in alone}) > 6
    # norms in fp32, whatever the dtype, may round another way with other rows beside them
    apart = [
        abs(a - b) for x, y in zip(together, alone, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)
    ]
    assert max(apart) < 1e-7


def brute_force(logits: list[float], top_k: int | None, top_p: float) -> dict[int, float]:
    """Token -> probability, one token after the other."""
    weights = {token: math.exp(x) for token, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[:top_k]
    whole, kept = sum(weights[token] for token in ranked), []
    for token in ranked:
        kept.append(token)
        if sum(weights[t] for t in kept) / whole >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (None, 0.4), (20, 0.7), (1, 1.0), (None, 1e-9), (4000, 0.999)])
def test_top_k_and_top_p_draw_from_the_likeliest_tokens(top_k, top_p):
    """First tokens of 500 rollouts: all of those kept and no others, with the probabilities of the twin."""
    policy, [(groups, prefix)] = roll(
        torch.float64, QUESTIONS[:1], group_size=500, limit=1, temperature=0.3, top_k=top_k, top_p=top_p
    )
    [group] = groups
    every, _ = policy.logprobs(  # of all tokens, as if each had been drawn
        prefix, make_streams([group.prompt] * 512, [[token] for token in range(512)], prefix.length), 0.3
    )
    expected = brute_force(every[:, -1].tolist(), top_k, top_p)
    seen = Counter(one.token_ids[0] for one in group.rollouts)
    assert seen.keys() <= expected.keys()
    for one in group.rollouts:
        assert abs(one.logprobs[0] - math.log(expected[one.token_ids[0]])) < 1e-7
    for token, p in expected.items():
        assert abs(seen[token] / 500 - p) < 4.5 * (p * (1 - p) / 500) ** 0.5 + 1 / 500


def test_rollouts_of_a_group_differ_and_repeat():
    _, [(first, _)] = roll(torch.float32, QUESTIONS)
    _, [(again, _)] = roll(torch.float32, QUESTIONS)
    assert first[0].rollouts == again[0].rollouts
    assert len({one.token_ids for one in first[0].rollouts}) == 4


def test_draws_follow_the_distribution():
    """First tokens of many rollouts against their probabilities: total variation within 4 standard errors."""
    _, [(groups, _)] = roll(torch.float32, QUESTIONS[:1], group_size=4000, limit=1, temperature=0.05)
    firsts = torch.tensor([one.token_ids[0] for one in groups[0].rollouts])
    seen = {int(t): groups[0].rollouts[i].logprobs[0] for i, t in enumerate(firsts)}
    for token, logprob in seen.items():
        p = torch.tensor(logprob).exp().item()
        share = (firsts == token).double().mean().item()
        assert abs(share - p) < 4.5 * (p * (1 - p) / 4000) ** 0.5 + 1 / 4000
    assert sum(torch.tensor(list(seen.values())).exp()) > 0.9
