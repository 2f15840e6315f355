"""Rollouts drawn by servers: in turn with the updates, or a step ahead of them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path

from longrl.config import RlConfig, RolloutConfig
from longrl.models.streams import cohorts, num_tokens
from longrl.parallel.layout import balanced
from longrl.parallel.ranks import Ranks
from longrl.policy import Policy
from longrl.rewards.remote import start
from longrl.rollout.client import Server, ServerLostError, ServerRefusedError
from longrl.rollout.weights import Outbox, fingerprint
from longrl.rollout.wire import About, Answer, Asked, AskedMedia, AskedPrompt, Sampling, Weights
from longrl.types import Example, Group, Prompt, Rollout

Drawn = dict[int, tuple[Rollout, ...]]
"""By the seed of the example: all its rollouts, the greedy one last."""


class RemoteEngine:
    """The first of the ranks that share prompts asks, and tells the others. Where one fails to, all ranks raise."""

    def __init__(
        self,
        config: RlConfig,
        policy: Policy,
        time: Callable[[str], AbstractContextManager[None]],
        ranks: Ranks,
        *,
        greedy: bool = False,
    ) -> None:
        """As build_engine.

        Raises:
            ServerLostError: a server is not there.
            ServerRefusedError: it has another model.
            ImportError: the extra is not installed.
        """
        assert config.rollout.server is not None
        self.policy, self.time, self.ranks = policy, time, ranks
        self.config, self.greedy, self.steps = config.rollout, greedy, config.steps
        self.outbox = Outbox(Path(config.run_dir) / "weights", policy, ranks)
        self.model = fingerprint(policy, config.model)
        urls = config.rollout.server.urls
        mine = urls[ranks.dp_rank :: ranks.dp_size] or (urls[ranks.dp_rank % len(urls)],)
        self.servers = [Server(url, config.rollout.server) for url in mine]
        self._begun: dict[int, tuple[Future[Answer], int]] = {}
        """By seed, on the rank that asked: the answer, and where in it."""
        self.drawn: Drawn = {}
        abouts, error = self._ask()
        self._agree(error)
        told = [about for some in ranks.gather_all(abouts) for about in some]
        self._room = min((about.room for about in told if about.room is not None), default=None)
        self.longest_clip = min((about.longest_clip for about in told if about.longest_clip is not None), default=None)

    def rollout(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Iterator[tuple[tuple[Group, ...], None]]:
        """As Engine.rollout. A step ahead, these are there already: see ahead.py."""
        if not self.config.max_staleness:
            self.begin(examples, prompts, seeds, self.outbox.current())
            with self.time("rollout"):
                self.collect(seeds)
        for members in cohorts(prompts):
            yield tuple(self._group(examples[i], prompts[i], self.drawn.pop(seeds[i])) for i in members), None

    def begin(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int], weights: Weights
    ) -> None:
        """Asks for rollouts that are not there, in the background. All ranks that share the prompts call it."""
        sp = self.policy.trunk.sp
        if sp is not None and sp.rank > 0:
            return
        missing = [i for i, seed in enumerate(seeds) if seed not in self.drawn]
        together = [[missing[k] for k in members] for members in cohorts([prompts[i] for i in missing])]
        dealt = balanced([num_tokens([prompts[i] for i in members]) for members in together], len(self.servers))
        for server, mine in zip(self.servers, dealt, strict=True):
            indices = [i for k in mine for i in together[k]]
            if not indices:
                continue
            asked = Asked(
                model=self.model,
                weights=weights,
                sampling=sampling_of(self.config, self.greedy),
                prompts=tuple(_asked(examples[i], prompts[i], seeds[i]) for i in indices),
            )
            future = start(server.draw(asked))
            self._begun |= {seeds[i]: (future, k) for k, i in enumerate(indices)}

    def collect(self, seeds: Sequence[int], within_s: float = threading.TIMEOUT_MAX) -> None:
        """Waits until the rollouts of these seeds are in `drawn`, of which some may be there. All ranks call it.

        Raises:
            ServerLostError: some rank got no answer.
            ServerRefusedError: a server refused.
            TimeoutError: some rank waits for longer than asked.
        """
        missing = [seed for seed in seeds if seed not in self.drawn]
        drawn, error = Ranks(sp=self.policy.trunk.sp).once(self._wait, missing, within_s)
        self._agree(error)
        self.drawn |= drawn

    def resampled(self, config: RolloutConfig, *, greedy: bool = False) -> RemoteEngine:
        """As Engine.resampled: of the same servers."""
        other = copy.copy(self)
        other.config, other.greedy, other.drawn, other._begun = config, greedy, {}, {}
        return other

    @property
    def longest_prompt(self) -> int | None:
        """Of the server that has least room."""
        return None if self._room is None else self._room - self.config.max_new_tokens

    def update_weights(self) -> None:
        """They are written when rollouts are asked for."""

    def close(self) -> None:
        """Leaves the servers as they are; removes weights, unless a run that goes on may want what they give."""
        if not self.config.max_staleness or self.policy.version == self.steps:
            self.outbox.clear()

    def _ask(self) -> tuple[list[About], Exception | None]:
        """What every server is, on the first of the ranks that share prompts."""
        told: list[About] = []
        if self.ranks.sp_rank > 0:
            return told, None
        try:
            for server in self.servers:
                told.append(about := start(server.about()).result())
                if about.model != self.model:
                    raise ServerRefusedError(
                        f"rollout server {server.url} has another model (fingerprint {about.model[:12]}, the run's is "
                        f"{self.model[:12]}): start it with the run's own configuration"
                    )
        except (ServerLostError, ServerRefusedError) as error:
            return [], error
        return told, None

    def _wait(self, seeds: Sequence[int], within_s: float) -> tuple[Drawn, Exception | None]:
        drawn: Drawn = {}
        until = time.monotonic() + within_s
        for seed in seeds:
            future, index = self._begun.pop(seed)
            try:
                drawn[seed] = future.result(max(0.0, until - time.monotonic())).rollouts[index]
            except (ServerLostError, ServerRefusedError, TimeoutError) as error:
                return {}, error
        return drawn, None

    def _agree(self, error: Exception | None) -> None:
        for one in self.ranks.gather_all(error):
            if one is not None:
                raise one

    def _group(self, example: Example, prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
        count = self.config.group_size
        greedy = rollouts[count] if self.greedy else None
        return Group(id=example.id, example=example, prompt=prompt, rollouts=tuple(rollouts[:count]), greedy=greedy)


def sampling_of(config: RolloutConfig, greedy: bool) -> Sampling:
    return Sampling(
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        greedy=greedy,
    )


def _asked(example: Example, prompt: Prompt, seed: int) -> AskedPrompt:
    return AskedPrompt(
        id=example.id,
        token_ids=tuple(prompt.token_ids.tolist()),
        position_ids=tuple(map(tuple, prompt.position_ids.tolist())),
        media=tuple(
            AskedMedia(key=media.key, clip=media.clip, slots=slots)
            for media, slots in zip(prompt.media, prompt.media_slots, strict=True)
        ),
        seed=seed,
    )
