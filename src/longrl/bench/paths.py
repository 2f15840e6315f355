"""The paths themselves (see work.PATHS). Each is one whole step: rollout with decoding, old log-probs, update.

Every path decodes all that it must, and then trains on the same recorded responses: ranks that split a prompt round
otherwise than one that does not, and a draw that tips would make the gradients incomparable.

All is fp32, but for the attention of streams to their own tokens, which is summed in fp64 on the CPU where they follow
a prefix (parallel/attend.py): the separate sequences have the cheaper kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longrl.bench.body import Body, Tower
from longrl.bench.work import DEALT, ENCODED_EACH_TIME, SEPARATE, VOCABULARY, Work
from longrl.config import RolloutConfig
from longrl.models.streams import Streams, make_streams
from longrl.models.trunk import ATTENTION
from longrl.parallel.gradients import sum_gradients
from longrl.parallel.sequence import SequenceGroup
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, Prefix, Prompt


class Step:
    """The step on one rank. Each path leaves its gradients in the parameters, summed over the ranks."""

    def __init__(self, work: Work, sp: SequenceGroup | None = None) -> None:
        self.work, self.sp = work, sp
        ours: Any = Body(ATTENTION)
        self.ours, self.stock = ours, Body("sdpa")
        self.alone = Policy(ours)
        self.together = self.alone if sp is None else Policy(ours, sp=sp)
        self.tower = Tower(work.video_tokens) if work.video_tokens else None
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCABULARY, (work.prompt_tokens,), generator=generator)
        ids[: work.video_tokens] = VOCABULARY + torch.arange(work.video_tokens)
        self.prompt = Prompt(token_ids=ids, position_ids=torch.arange(len(ids))[None], media=(), media_slots=())
        self.example = Example(id="bench", messages=(), answer=None, kind="open")
        size = work.group_size, work.response_tokens
        self.responses = torch.randint(VOCABULARY, size, generator=generator).tolist()
        self.advantages = torch.randn(work.group_size, 1, generator=generator)

    def run(self, path: str, micro_batch: int | None, most: int | None = None) -> None:
        """
        Args:
            micro_batch: sequences a pass, where they are separate.
            most: passes of those; None: all. Two need as much memory as all: gradients are there, and added to.
        """
        if path in SEPARATE:
            assert micro_batch is not None
            self._separate(path, micro_batch, most)
        else:
            self.encode_together()
            (self._fused if path == "fused" else self._shared)()
        if self.sp is not None:
            sum_gradients(self._model(path).parameters(), self.sp.group)

    def passes(self, path: str, rows: slice) -> None:
        """The old log-probs of these separate sequences and their part of the update: what `run` repeats. Where the
        video is encoded once, it is there."""
        streams = self._streams(0, rows)
        with torch.no_grad():
            old = self._logprobs(path, streams)
        self._loss(old, rows)(self._logprobs(path, streams), old, slice(None)).backward()

    def encode_together(self) -> None:
        """The video once, its frames shared out to the ranks."""
        if self.tower is not None:
            self.ours.embed.video = self.tower.encode(1) if self.sp is None else self.tower.encode_together(self.sp)

    def gradients(self, path: str) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._model(path).parameters()]

    def forget(self) -> None:
        """Drops the gradients."""
        for body in (self.ours, self.stock):
            body.model.zero_grad()

    def _fused(self) -> None:
        prefix = self._rollout(self.together, self.work.group_size)
        self.together.backward(prefix, self._streams(prefix.length, slice(None)), self._loss(None, slice(None)))

    def _shared(self) -> None:
        with torch.no_grad():
            self._rollout(self.together, self.work.group_size).release()
            prefix = self.together.prefix([self.prompt])
        streams = self._streams(prefix.length, slice(None))
        old, _ = self.together.logprobs(prefix, streams)
        prefix.release()
        prefix = self.together.prefix([self.prompt])
        self.together.backward(prefix, streams, self._loss(old, slice(None)))

    def _separate(self, path: str, micro_batch: int, most: int | None) -> None:
        first, last = self._mine(path)
        if path in ENCODED_EACH_TIME:
            self._encode(1)
        else:
            self.encode_together()
        with torch.no_grad():
            self._rollout(self.alone if path in DEALT else self.together, last - first).release()
        batches = [slice(i, min(i + micro_batch, last)) for i in range(first, last, micro_batch)]
        for rows in batches[:most]:
            self.passes(path, rows)

    def _logprobs(self, path: str, streams: Streams) -> Tensor:
        """[n, R] of whole sequences."""
        if path in ENCODED_EACH_TIME:
            self._encode(len(streams.token_ids))
        if path == "stock":
            return self._stock_logprobs(streams)
        trunk = (self.alone if path in DEALT else self.together).trunk
        none: Any = [None] * len(trunk.blocks)
        return trunk("suffix", Prefix(none, none, 0, 0), streams)[0]

    def _stock_logprobs(self, streams: Streams) -> Tensor:
        embeds = self.stock.embed(streams.token_ids)
        hidden = self.stock.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        first = self.work.prompt_tokens - 1
        logits = self.stock.model.lm_head(hidden[:, first:])
        logprobs = logits.log_softmax(-1).gather(-1, streams.labels[:, first:, None])[..., 0]
        return torch.nn.functional.pad(logprobs, (first, 0))

    def _mine(self, path: str) -> tuple[int, int]:
        """First and last + 1 of the responses that this rank has to do with."""
        count = self.work.group_size
        if self.sp is None or path not in DEALT:
            return 0, count
        return count * self.sp.rank // self.sp.size, count * (self.sp.rank + 1) // self.sp.size

    def _encode(self, sequences: int) -> None:
        """The video, by this rank, for each sequence of a pass."""
        if self.tower is not None:
            self.ours.embed.video = self.stock.embed.video = self.tower.encode(sequences)

    def _rollout(self, policy: Policy, count: int) -> Prefix:
        config = RolloutConfig(group_size=count, max_new_tokens=self.work.response_tokens, max_streams=1 << 20)
        ((_, prefix),) = NativeEngine(policy, config).rollout([self.example], [self.prompt], [0])
        return prefix

    def _streams(self, prefix_length: int, rows: slice) -> Streams:
        responses = self.responses[rows]
        return make_streams([self.prompt] * len(responses), responses, prefix_length)

    def _loss(self, old: Tensor | None, rows: slice) -> Callable[[Tensor, Tensor, slice], Tensor]:
        advantages = self.advantages[rows]

        def loss(logprobs: Tensor, _: Tensor, part: slice) -> Tensor:
            before = logprobs.detach() if old is None else old[part]
            return -(advantages[part] * ((logprobs - before).exp() - 1)).sum()

        return loss

    def _model(self, path: str) -> torch.nn.Module:
        return (self.stock if path == "stock" else self.ours).model
