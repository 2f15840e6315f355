"""A real vLLM beside the built-in engine: the same greedy tokens, the trainer's log-probs, the policy's newest weights.

fp32 on both sides: other kernels round differently, by 1e-5 or so in a log-prob; 1e-3 is the project's bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from longrl.config import RlConfig
from longrl.models import load_family
from longrl.models.streams import make_streams, split_length
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.rollout.vllm_engine import VllmEngine, start_vllm
from longrl.types import Example, Group, Prompt
from tests.families.conftest import files as files
from tests.families.matrix import FPS, SECONDS, SIDE, ask, contents

pytestmark = pytest.mark.vllm

BOUND = 1e-3
LORA = {"rank": 4, "alpha": 64.0}
CASES = [
    ("qwen2", "text", None),
    ("qwen3", "text", None),
    ("vila", "interleaved", None),
    ("qwen2_5_vl", "interleaved", None),
    ("qwen3_vl", "interleaved", None),
    ("qwen2_5_vl", "interleaved", LORA),
    ("vila", "interleaved", LORA),
]


@dataclass
class Both:
    """The two engines, of one policy, and what they are asked."""

    policy: Policy
    config: RlConfig
    vllm: VllmEngine
    native: NativeEngine
    examples: list[Example]
    prompts: list[Prompt]

    def ask(self, engine: VllmEngine | NativeEngine, seed: int = 0) -> list[Group]:
        seeds = [seed + i for i in range(len(self.prompts))]
        with torch.no_grad():
            return [group for groups, _ in engine.rollout(self.examples, self.prompts, seeds) for group in groups]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{' adapters' if case[2] else ''}")
def both(request, files: Path) -> Iterator[Both]:
    name, content, lora = request.param
    config = RlConfig.model_validate(
        {
            "run_dir": "run",
            "model": {"path": f"tiny:{name}", "lora": lora},
            "steps": 1,
            "rollout": {"engine": "vllm", "group_size": 4, "max_new_tokens": 12, "temperature": 0.7},
        }
    )
    policy = Policy(load_family(config.model))
    limits = getattr(getattr(policy.family, "vision", None), "limits", {})
    if "video" in limits:  # room for four tokens in a pair of frames
        limits["video"] = (784, int(SECONDS * FPS + 1) * SIDE**2 if name == "qwen3_vl" else SIDE**2)
    vllm = start_vllm(config, policy, lambda _: nullcontext(), ALONE, greedy=True)
    native = NativeEngine(policy, config.rollout, greedy=True)
    asked = (*contents(files)[content], "Think of a clip. " * 16)  # of several blocks of the prefix cache
    yield Both(policy, config, vllm, native, *ask(policy.family, asked))
    vllm.close()


def trainer_logprobs(both: Both, group: Group) -> list[torch.Tensor]:
    """Of each rollout, under the policy as it is."""
    length = split_length([group.prompt])
    rows = [one.token_ids for one in group.rollouts]
    streams = make_streams([group.prompt] * len(rows), rows, length)
    found = both.policy.logprobs_of([group.prompt], length, streams, both.config.rollout.temperature)
    return [row[mask] for row, mask in zip(found, streams.mask, strict=True)]


def farthest(both: Both, groups: list[Group]) -> float:
    pairs = [
        (torch.tensor(one.logprobs), ours)
        for group in groups
        for one, ours in zip(group.rollouts, trainer_logprobs(both, group), strict=True)
    ]
    return max(float((theirs - ours).abs().max()) for theirs, ours in pairs)


def test_engine_and_trainer_agree_before_and_after_an_update(both):
    """One test a family, as starting vLLM is what takes the time."""
    first, again, other = both.ask(both.vllm), both.ask(both.vllm), both.ask(both.vllm, seed=100)
    asked, there = both.vllm.vllm.prefix_hits()
    drawn = lambda groups: [one.token_ids for group in groups for one in group.rollouts]  # noqa: E731
    assert drawn(first) == drawn(again) != drawn(other)
    assert len({one.token_ids for one in first[0].rollouts}) > 1
    assert farthest(both, first) < BOUND
    check_greedy(both, first)
    for one in first[0].rollouts:
        assert (one.finish_reason == "stop") == (one.token_ids[-1] in both.policy.family.stop_ids)
        assert one.finish_reason == "stop" or len(one.token_ids) == 12
        assert one.policy_version == 0
    # of each prompt at least one of the group's five prefills was computed, and with whole blocks of 32 the last part
    # of each; all else was there
    lengths = [len(prompt) for prompt in both.prompts]
    assert asked == 3 * 5 * sum(lengths)
    assert there >= 14 * sum(length // 32 * 32 - 32 for length in lengths) > 0

    with torch.no_grad():
        for parameter in both.policy.trunk.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    both.policy.version = 1
    with pytest.raises(RuntimeError, match="vLLM drew with weights of version 0, the policy is at 1"):
        both.ask(both.vllm)
    moved = farthest(both, first)
    assert moved > 100 * BOUND  # it matters that the weights are new
    both.vllm.update_weights()
    second = both.ask(both.vllm)
    assert farthest(both, second) < BOUND
    check_greedy(both, second)
    assert drawn(second) != drawn(first)


def check_greedy(both: Both, groups: list[Group]) -> None:
    for ours, theirs in zip(groups, both.ask(both.native), strict=True):
        assert ours.greedy is not None
        assert theirs.greedy is not None
        assert ours.greedy.token_ids == theirs.greedy.token_ids
        assert ours.greedy.text == theirs.greedy.text


def test_prompts_that_are_more_than_a_batch_are_not_cut(both):
    """vLLM prefills 4,096 tokens at a time, and cannot cut a seeded request there on a CPU."""
    rest = torch.randint(8, 256, (3000,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [prompt.followed_by(rest[i:]) for i, prompt in enumerate(both.prompts)]
    longer = replace(both, prompts=prompts)
    assert farthest(longer, longer.ask(longer.vllm)) < BOUND


def test_an_engine_of_the_same_weights_samples_otherwise(both):
    few = both.vllm.resampled(both.config.rollout.model_copy(update={"group_size": 2, "max_new_tokens": 3}))
    for group in both.ask(few):
        assert [len(one.token_ids) <= 3 for one in group.rollouts] == [True, True]
        assert group.greedy is None


def test_a_prompt_that_does_not_fit_is_refused_with_arithmetic(both):
    new = both.vllm.vllm.room - len(both.prompts[0]) + 1
    long = both.vllm.resampled(both.config.rollout.model_copy(update={"max_new_tokens": new}))
    with pytest.raises(ValueError, match=rf"example q0: {len(both.prompts[0])} prompt tokens \+ {new} new ones"):
        both.ask(long)


def test_the_thinker_of_omni_takes_no_embeddings_of_sound():
    """Why it is refused: of sound it takes features, which its own tower would encode again for each rollout."""
    from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerMultiModalDataParser

    parser = Qwen2_5OmniThinkerMultiModalDataParser(spatial_merge_size=2, target_sr=16000, expected_hidden_size=8)
    with pytest.raises(ValueError, match=r"should contain the fields: .*'input_audio_features'.*'audio_embeds'"):
        parser.parse_mm_data({"audio": {"audio_embeds": torch.zeros(4, 8)}})
