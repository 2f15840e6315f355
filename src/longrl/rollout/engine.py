"""The seam between training and what draws its rollouts: which engine, and what the loop asks of any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from longrl.config import RlConfig, RolloutConfig
from longrl.parallel.ranks import ALONE, Ranks
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.rollout.vllm_engine import start_vllm
from longrl.rollout.vllm_rules import choose_engine, with_engine
from longrl.types import Example, Group, Prefix, Prompt

log = logging.getLogger(__name__)

Timer = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a part ("prefill", "decode"), gives the context it is run in."""


class Engine(Protocol):
    """Draws groups of rollouts. Ranks that share prompts make the same calls and get the same rollouts."""

    policy: Policy
    time: Timer

    @property
    def longest_prompt(self) -> int | None:
        """Tokens for which it has room beside a response; None: not bounded, or not known here."""
        ...

    @property
    def longest_clip(self) -> int | None:
        """Embeddings of one clip for which it has room; None: as of longest_prompt."""
        ...

    def rollout(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Iterator[tuple[tuple[Group, ...], Prefix | None]]:
        """Yields the groups of each cohort (prompts about the same media) as it finishes.

        With the prefix that the cohort shares, where the engine has one that the update can use, and the caller
        releases; None: the update computes its own.

        Args:
            seeds: one per example; what is drawn depends on it, and on the place in the group.

        Raises:
            RuntimeError: the engine's weights are not the policy's.
        """
        ...

    def resampled(self, config: RolloutConfig, *, greedy: bool = False) -> Engine:
        """An engine of the same weights that samples otherwise; closed with this one."""
        ...

    def update_weights(self) -> None:
        """Called after the updates of each step: from now on rollouts are drawn from the policy as it is."""
        ...

    def close(self) -> None:
        """Called once, after the last step or an error."""
        ...


def settle_engine(config: RlConfig, ranks: Ranks) -> RlConfig:
    """With the engine that `rollout.engine: auto` stands for, which nodes might see differently: the main rank says.

    Raises:
        ValueError, RuntimeError: as choose_engine; before anything is made or loaded.
    """
    if config.rollout.server:
        return config
    name, why = ranks.from_main(choose_engine, config, ranks.size)
    if config.rollout.engine == name:
        return config
    if ranks.is_main:
        log.info("rollouts by the engine %s: %s", name, why)
    return with_engine(config, name)


def build_engine(
    config: RlConfig, policy: Policy, time: Timer, ranks: Ranks = ALONE, *, greedy: bool = False
) -> Engine:
    """
    Args:
        ranks: the policy's.
        greedy: beside the rollouts of each prompt decode one of the likeliest tokens (`Group.greedy`).

    Raises:
        ValueError: the engine asked for cannot do what the configuration needs.
        RuntimeError: it is not installed, or does not start.
    """
    if config.rollout.server:
        from longrl.rollout.remote import RemoteEngine

        return RemoteEngine(config, policy, time, ranks, greedy=greedy)
    config = settle_engine(config, ranks)
    name, _ = choose_engine(config, ranks.size)  # which looks what this node has
    if name == "vllm":
        return start_vllm(config, policy, time, ranks, greedy=greedy)
    return NativeEngine(policy, config.rollout, time, greedy=greedy)
