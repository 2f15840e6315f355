"""The built-in engine: one prefill per prefix, and streams of one or several decoded side by side over its keys and
values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import Tensor

from longrl.config import RolloutConfig
from longrl.models.own_kv import OwnKV
from longrl.models.streams import cohorts
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
        self,
        policy: Policy,
        config: RolloutConfig,
        time: Callable[[str], AbstractContextManager[None]] = _untimed,
        on_tokens: Callable[[int, int], None] | None = None,
        *,
        greedy: bool = False,
    ) -> None:
        """
        Args:
            time: called with the name of a part ("prefill", "decode"), gives the context it is run in.
            on_tokens: called with the number of a rollout and its next token, as it is drawn.
            greedy: beside the rollouts of each prompt decode one of the likeliest tokens (`Group.greedy`).
        """
        self.policy, self.config, self.time, self.on_tokens = policy, config, time, on_tokens
        self.greedy, self.streams_each = greedy, config.group_size + greedy

    def rollout(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Iterator[tuple[tuple[Group, ...], Prefix]]:
        """Yields the groups of each cohort (prompts about the same media), with the prefix they share, as it finishes.

        The prefix carries its graph when gradients are enabled: it is the update's prefix forward too. Prefixes of
        `prompts_in_flight` cohorts are alive at once; the weights are then read once for a token of all of them.

        Args:
            seeds: one per example; rollout g of example i draws from the stream of noise (seeds[i], g).
        """
        together, most = cohorts(prompts), self.config.prompts_in_flight
        for flight in (together[start : start + most] for start in range(0, len(together), most)):
            shared = [[prompts[i] for i in members] for members in flight]
            with self.time("prefill"):
                prefixes = [self.policy.prefix(some) for some in shared]
            with self.time("decode"), self.policy.gathered():
                rollouts = iter(self._decode_in_turns(prefixes, shared, [seeds[i] for c in flight for i in c]))
            for members, prefix in zip(flight, prefixes, strict=True):
                yield tuple(self._make_group(examples[i], prompts[i], next(rollouts)) for i in members), prefix

    def _make_group(self, example: Example, prompt: Prompt, rollouts: list[Rollout]) -> Group:
        count = self.config.group_size
        greedy = rollouts[count] if self.greedy else None
        return Group(id=example.id, example=example, prompt=prompt, rollouts=tuple(rollouts[:count]), greedy=greedy)

    def resampled(self, config: RolloutConfig, *, greedy: bool = False) -> NativeEngine:
        return type(self)(self.policy, config, self.time, greedy=greedy)

    @property
    def longest_prompt(self) -> None:
        """What the memory plan allows."""

    longest_clip = longest_prompt

    def update_weights(self) -> None:
        """They are the policy's own."""

    def close(self) -> None:
        """There is nothing to end."""

    def continue_prefix(self, prefix: Prefix, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[list[Rollout]]:
        """The rollouts of prompts that continue a prefix computed before, which stays."""
        with self.time("decode"), self.policy.gathered():
            return self._decode_in_turns([prefix], [prompts], seeds)

    @torch.inference_mode()
    def _decode_in_turns(
        self, prefixes: Sequence[Prefix], prompts: Sequence[Sequence[Prompt]], seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        """As many questions at a time as max_streams allows, but at least one.

        Args:
            prompts: of each prefix.
            seeds: of all prompts, one after the other.
        """
        size = max(1, self.config.max_streams // self.streams_each)
        asked = [(prefix, prompt) for prefix, some in zip(prefixes, prompts, strict=True) for prompt in some]
        turns = [slice(start, start + size) for start in range(0, len(asked), size)]
        return [group for turn in turns for group in self._decode(asked[turn], seeds[turn])]

    def _decode(self, asked: Sequence[tuple[Prefix, Prompt]], seeds: Sequence[int]) -> list[list[Rollout]]:
        """asked: the prompts, each with the prefix that it continues; those of one prefix stand together.

        Returns:
            Of each prompt its rollouts, the greedy one last.
        """
        size, limit = self.streams_each, self.config.max_new_tokens
        trunk, sp, device = self.policy.trunk, self.policy.trunk.sp, self.policy.trunk.device
        stop = torch.tensor(sorted(self.policy.family.stop_ids), device=device)
        noise = torch.stack([_uniform(seed, g, limit) for seed in seeds for g in range(size)]).to(device)
        streams = [one for one in asked for _ in range(size)]
        likeliest = torch.arange(len(streams), device=device) % size == self.config.group_size
        prefixes, own, hidden = self._prefill(streams, limit)
        next_position = torch.tensor([prompt.next_position for _, prompt in streams], device=device)
        axes = len(asked[0][1].position_ids)
        tokens = torch.zeros(len(streams), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(streams), limit, dtype=torch.float64, device=device)
        lengths = torch.full((len(streams),), limit, device=device)
        rows = torch.arange(len(streams), device=device)  # which stream each row of the buffers is
        for t in range(limit):
            logits = trunk("logits", hidden, self.config.temperature or 1.0)
            logp = torch.log_softmax(_truncated(logits, self.config.top_k, self.config.top_p), -1)
            drawn = _draw(logp, noise[rows, t]) if self.config.temperature else logp.argmax(-1)
            if self.greedy:
                drawn = torch.where(likeliest[rows], logp.argmax(-1), drawn)
            if sp is not None:
                drawn = sp.broadcast(drawn)  # equal kernels are no promise of equal draws; stops follow from them
            going = lengths[rows] == limit
            if self.on_tokens is not None:
                for row, token in zip(rows[going].tolist(), drawn[going].tolist(), strict=True):
                    self.on_tokens(row, token)
            tokens[rows, t] = drawn
            logprobs[rows, t] = logp.gather(-1, drawn[:, None])[:, 0].double()
            lengths[rows[going & torch.isin(drawn, stop)]] = t + 1
            going = lengths[rows] == limit
            if t + 1 == limit or not going.any():
                break
            if len(rows) > MIN_ROWS and (kept := _at_least(MIN_ROWS, going)).sum() <= COMPACT_BELOW * len(rows):
                own.keep(kept)
                rows, drawn = rows[kept], drawn[kept]
            position_ids = (next_position[rows] + t).expand(axes, -1)[..., None]
            hidden = trunk("decode", prefixes, own, drawn[:, None], position_ids)
        if sp is not None:
            logprobs = sp.broadcast(logprobs)  # nor of equal log-probs, and a run that stops must stop on all ranks
        done = [
            self._make_rollout(ids[:r], logps[:r])
            for ids, logps, r in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        ]
        return [done[i : i + size] for i in range(0, len(done), size)]

    def _prefill(self, streams: Sequence[tuple[Prefix, Prompt]], limit: int) -> tuple[list[Prefix], OwnKV, Tensor]:
        """Feeds what each stream's prompt has after its prefix; returns the prefixes, the buffers and the last hidden
        state [N, D]."""
        together = [list(some) for _, some in groupby(streams, key=lambda one: id(one[0]))]
        prefixes, sizes = [some[0][0] for some in together], [len(some) for some in together]
        rests = torch.tensor([len(prompt) - prefix.length for prefix, prompt in streams])
        sp = self.policy.trunk.sp
        place = (0, 1) if sp is None or sp.ring is None else (sp.ring.rank, sp.ring.size)
        own = OwnKV(prefixes, sizes, rests, limit, *place)
        longest = int(rests.max())
        token_ids = torch.zeros(len(streams), longest, dtype=torch.int64)
        position_ids = torch.zeros(len(streams[0][1].position_ids), len(streams), longest, dtype=torch.int64)
        for n, ((prefix, prompt), rest) in enumerate(zip(streams, rests.tolist(), strict=True)):
            token_ids[n, longest - rest :] = prompt.token_ids[prefix.length :]
            position_ids[:, n, longest - rest :] = prompt.position_ids[:, prefix.length :]
        device = self.policy.trunk.device
        hidden = self.policy.trunk("decode", prefixes, own, token_ids.to(device), position_ids.to(device))
        return prefixes, own, hidden

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


def _truncated(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[n, V] -> [n, V]: -inf for all but the top_k largest, and of those for all but the first that reach top_p.

    Reference: nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    if top_k is None and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered[:, len(ordered[0]) if top_k is None else top_k :] = -torch.inf
    probs = ordered.double().softmax(-1)
    ordered[probs.cumsum(-1) - probs >= top_p] = -torch.inf  # those before it suffice
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _draw(logp: Tensor, noise: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the noise. [n, V], [n] -> [n]"""
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(logp.shape[-1] - 1)
