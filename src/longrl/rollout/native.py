"""The built-in engine: one prefill per prefix, and all streams decoded side by side over its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from longrl.config import RolloutConfig
from longrl.models.own_kv import OwnKV
from longrl.models.streams import cohorts
from longrl.parallel.attend import widen
from longrl.policy import Policy
from longrl.types import Example, Group, Prefix, Prompt, Rollout

COMPACT_BELOW = 0.75
"""Finished streams leave the buffers when no more than this share is still going: a copy costs about a step."""


MIN_ROWS = 16
"""Finished streams fill up the buffers to so many: with fewer than a dozen rows the CPU's matrix products take another
path and round otherwise than the trainer's, which shows where attention is sharp (log-probs 1.4e-5 apart)."""


def _untimed(part: str) -> AbstractContextManager[None]:
    return nullcontext()


class NativeEngine:
    """Samples groups of rollouts from the policy itself: the weights that train are the weights that generate."""

    def __init__(
        self, policy: Policy, config: RolloutConfig, time: Callable[[str], AbstractContextManager[None]] = _untimed
    ) -> None:
        """time: called with the name of a part ("prefill", "decode"), gives the context it is run in."""
        self.policy, self.config, self.time = policy, config, time

    def rollout(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Iterator[tuple[tuple[Group, ...], Prefix]]:
        """Yields the groups of each cohort (prompts about the same media), with the prefix they share, as it finishes.

        The prefix carries its graph when gradients are enabled: it is the update's prefix forward too.

        Args:
            seeds: one per example; rollout g of example i draws from the stream of noise (seeds[i], g).
        """
        for members in cohorts(prompts):
            shared = [prompts[i] for i in members]
            with self.time("prefill"):
                prefix = self.policy.prefix(shared)
            with self.time("decode"), self.policy.gathered():
                rollouts = self._decode_in_turns(prefix, shared, [seeds[i] for i in members])
            groups = tuple(
                Group(id=examples[i].id, example=examples[i], prompt=prompts[i], rollouts=tuple(group))
                for i, group in zip(members, rollouts, strict=True)
            )
            yield groups, prefix

    @torch.no_grad()
    def _decode_in_turns(self, prefix: Prefix, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[list[Rollout]]:
        """As many questions at a time as max_streams allows, but at least one."""
        size = max(1, self.config.max_streams // self.config.group_size)
        keys, values = ([widen(x) for x in xs] for xs in (prefix.keys, prefix.values))
        prefix = Prefix(keys, values, prefix.length, prefix.policy_version)
        turns = [slice(start, start + size) for start in range(0, len(prompts), size)]
        return [group for turn in turns for group in self._decode(prefix, prompts[turn], seeds[turn])]

    @torch.no_grad()
    def _decode(self, prefix: Prefix, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[list[Rollout]]:
        size, limit = self.config.group_size, self.config.max_new_tokens
        trunk, sp, device = self.policy.trunk, self.policy.trunk.sp, self.policy.trunk.device
        stop = torch.tensor(sorted(self.policy.family.stop_ids), device=device)
        noise = torch.stack([_uniform(seed, g, limit) for seed in seeds for g in range(size)]).to(device)
        streams = [prompt for prompt in prompts for _ in range(size)]
        own, hidden = self._prefill(prefix, streams, limit)
        next_position = torch.tensor([prompt.next_position for prompt in streams], device=device)
        axes = len(prompts[0].position_ids)
        tokens = torch.zeros(len(streams), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(streams), limit, dtype=torch.float64, device=device)
        lengths = torch.full((len(streams),), limit, device=device)
        rows = torch.arange(len(streams), device=device)  # which stream each row of the buffers is
        for t in range(limit):
            logp = torch.log_softmax(trunk("logits", hidden, self.config.temperature or 1.0), -1)
            drawn = _draw(logp, noise[rows, t]) if self.config.temperature else logp.argmax(-1)
            if sp is not None:
                drawn = sp.broadcast(drawn)  # equal kernels are no promise of equal draws; stops follow from them
            going = lengths[rows] == limit
            tokens[rows, t] = drawn
            logprobs[rows, t] = logp.gather(-1, drawn[:, None])[:, 0].double()
            lengths[rows[going & torch.isin(drawn, stop)]] = t + 1
            going = lengths[rows] == limit
            if t + 1 == limit or not going.any():
                break
            kept = _at_least(MIN_ROWS, going)
            if kept.sum() <= COMPACT_BELOW * len(rows):
                own.keep(kept)
                rows, drawn = rows[kept], drawn[kept]
            position_ids = (next_position[rows] + t).expand(axes, -1)[..., None]
            hidden = trunk("decode", prefix, own, drawn[:, None], position_ids)
        if sp is not None:
            logprobs = sp.broadcast(logprobs)  # nor of equal log-probs, and a run that stops must stop on all ranks
        done = [
            self._make_rollout(ids[:r], logps[:r])
            for ids, logps, r in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        ]
        return [done[i : i + size] for i in range(0, len(done), size)]

    def _prefill(self, prefix: Prefix, prompts: Sequence[Prompt], limit: int) -> tuple[OwnKV, Tensor]:
        """Feeds what each prompt has after the prefix; returns the buffers and the last hidden state [N, D]."""
        rests = torch.tensor([len(prompt) - prefix.length for prompt in prompts])
        own = OwnKV(prefix, rests, limit)
        longest = int(rests.max())
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        position_ids = torch.zeros(len(prompts[0].position_ids), len(prompts), longest, dtype=torch.int64)
        for n, (prompt, rest) in enumerate(zip(prompts, rests.tolist(), strict=True)):
            token_ids[n, longest - rest :] = prompt.token_ids[prefix.length :]
            position_ids[:, n, longest - rest :] = prompt.position_ids[:, prefix.length :]
        device = self.policy.trunk.device
        return own, self.policy.trunk("decode", prefix, own, token_ids.to(device), position_ids.to(device))

    def _make_rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        stopped = ids[-1] in self.policy.family.stop_ids
        text = str(self.policy.family.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False))
        return Rollout(
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=text,
            finish_reason="stop" if stopped else "length",
            policy_version=self.policy.version,
        )


def _at_least(count: int, going: Tensor) -> Tensor:
    """bool [n]: the rows that go on, and as many finished ones as make `count`, if there are."""
    kept = going.clone()
    kept[(~going).nonzero()[: max(0, count - int(going.sum())), 0]] = True
    return kept


def _uniform(seed: int, index: int, count: int) -> Tensor:
    """float64 [count] in [0, 1): the noise of one rollout, the same whatever it is batched with."""
    generator = torch.Generator().manual_seed((seed + index * 0x9E3779B97F4A7C15) % (1 << 63))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _draw(logp: Tensor, noise: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the noise. [n, V], [n] -> [n]"""
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(logp.shape[-1] - 1)
