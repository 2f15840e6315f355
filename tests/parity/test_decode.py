"""What the engine says it sampled is what the trainer and stock transformers score."""

from __future__ import annotations

import pytest
import torch

from longrl.config import RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example
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


# fp32: two different orders of summation in the layers' products; attention to the prefix is in fp64 on both sides
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 2e-6)])
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
