"""vLLM behind the seam: the rollouts of all prompts at once, and no prefix, which the update then computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from longrl.config import RlConfig, RolloutConfig
from longrl.models.streams import cohorts
from longrl.parallel.ranks import Ranks
from longrl.policy import Policy
from longrl.rollout.vllm_core import Drawn, Vllm
from longrl.rollout.vllm_rules import require_media_room, require_room
from longrl.runtime import seed_for
from longrl.types import Example, Group, Prompt, Rollout


class VllmEngine:
    """See engine.py for the contract."""

    def __init__(
        self,
        policy: Policy,
        config: RolloutConfig,
        time: Callable[[str], AbstractContextManager[None]],
        ranks: Ranks,
        vllm: Vllm,
        *,
        greedy: bool = False,
    ) -> None:
        """
        Args:
            vllm: several of these may sample from it.
            greedy: as of build_engine.
        """
        self.policy, self.config, self.time, self.ranks, self.vllm = policy, config, time, ranks, vllm
        self.greedy = greedy

    def rollout(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Iterator[tuple[tuple[Group, ...], None]]:
        for example, prompt in zip(examples, prompts, strict=True):
            require_room(example.id, len(prompt), self.config.max_new_tokens, self.vllm.room)
            require_media_room(example.id, [len(media.embeds) for media in prompt.media], self.vllm.media_room)
        streams: list[list[int | None]] = [[seed_for(seed, g) for g in range(self.config.group_size)] for seed in seeds]
        if self.greedy:
            streams = [[*some, None] for some in streams]
        with self.time("decode"):
            drawn = self.vllm.draw(prompts, streams, self.config)
            # equal kernels are no promise of equal draws
            drawn = self.ranks.once(lambda: drawn)
        for members in cohorts(prompts):
            yield tuple(self._make_group(examples[i], prompts[i], drawn[i]) for i in members), None

    def resampled(self, config: RolloutConfig, *, greedy: bool = False) -> VllmEngine:
        return VllmEngine(self.policy, config, self.time, self.ranks, self.vllm, greedy=greedy)

    @property
    def longest_prompt(self) -> int:
        return self.vllm.room - self.config.max_new_tokens

    @property
    def longest_clip(self) -> int | None:
        return self.vllm.media_room or None

    def update_weights(self) -> None:
        with self.time("weights"):
            self.vllm.load(self.policy)

    def close(self) -> None:
        self.vllm.close()

    def _make_group(self, example: Example, prompt: Prompt, drawn: Sequence[Drawn]) -> Group:
        rollouts = [self._make_rollout(example, one) for one in drawn]
        count = self.config.group_size
        greedy = rollouts[count] if self.greedy else None
        return Group(id=example.id, example=example, prompt=prompt, rollouts=tuple(rollouts[:count]), greedy=greedy)

    def _make_rollout(self, example: Example, drawn: Drawn) -> Rollout:
        if drawn.version != self.policy.version:
            raise RuntimeError(
                f"example {example.id}: vLLM drew with weights of version {drawn.version}, the policy is at "
                f"{self.policy.version}; the weights were not handed over after its update"
            )
        family, ids = self.policy.family, list(drawn.token_ids)
        stopped = bool(ids) and ids[-1] in family.stop_ids
        text = family.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
        return Rollout(
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            text=str(text),
            finish_reason="stop" if stopped else "length",
            policy_version=drawn.version,
        )


def start_vllm(
    config: RlConfig,
    policy: Policy,
    time: Callable[[str], AbstractContextManager[None]],
    ranks: Ranks,
    *,
    greedy: bool,
) -> VllmEngine:
    """With the policy's weights.

    Raises:
        RuntimeError: as of Vllm.
    """
    vllm = Vllm(policy, config, ranks)
    vllm.load(policy)
    return VllmEngine(policy, config.rollout, time, ranks, vllm, greedy=greedy)
