"""How good a response was, compared with the other responses to the same prompt: `[G] -> [G]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from longrl.registry import resolve
from longrl.types import Scored


def grpo(rewards: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-6), std unbiased (divided by G - 1).

    Reference: GRPO, arXiv 2402.03300, section 4.1.2 (outcome supervision); used in Eq. 3.
    Differs: the 1e-6, which keeps nearly equal rewards from blowing up.

    Args:
        rewards: [G], G >= 2.

    Returns:
        [G]
    """
    centred = dr_grpo(rewards)
    std = math.sqrt(math.fsum(x * x for x in centred) / (len(centred) - 1))
    return [x / (std + 1e-6) for x in centred]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """A_i = R_i - mean(R).

    Without the division, easy and hard prompts (small std) are not weighted up.
    Reference: Dr. GRPO, arXiv 2503.20783, section 3.2.

    Args:
        rewards: [G], G >= 2.

    Returns:
        [G]
    """
    # Shifted by the first reward before summing: equal rewards then give exactly 0, whatever their rounding.
    shifted = [reward - rewards[0] for reward in rewards]
    mean = math.fsum(shifted) / len(shifted)
    return [x - mean for x in shifted]


def rloo(rewards: Sequence[float]) -> list[float]:
    """A_i = R_i - mean of the other rewards = G / (G - 1) * (R_i - mean(R)).

    Reference: REINFORCE leave-one-out, arXiv 2402.14740, section 2.2 (RLOO estimator); first in Kool et al., 2019.

    Args:
        rewards: [G], G >= 2.

    Returns:
        [G]
    """
    scale = len(rewards) / (len(rewards) - 1)
    return [scale * x for x in dr_grpo(rewards)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """An advantage and what it has to see before it can be computed."""

    compute: Callable[[Sequence[float]], list[float]]
    scope: Literal["group"]
    """group: the rewards of one group, so that the group can be trained as soon as it is scored."""


ADVANTAGES: dict[str, Advantage] = {
    "dr_grpo": Advantage(compute=dr_grpo, scope="group"),
    "grpo": Advantage(compute=grpo, scope="group"),
    "rloo": Advantage(compute=rloo, scope="group"),
}


def assign_advantages(scored: list[Scored], name: str) -> list[Scored]:
    """One group's rollouts with their advantages filled in.

    Rollouts that could not be scored (reward None) are left out of the statistics and get advantage 0; the caller keeps
    them out of the loss mask. With fewer than two scored rollouts there is nothing to compare: all get 0.

    Args:
        scored: [G], one whole group.
        name: Of `ADVANTAGES`, or `package.module:attr` of an `Advantage`.

    Returns:
        [G], in the same order.

    Raises:
        ValueError: Unknown name.
    """
    advantage: Advantage = resolve(name, ADVANTAGES, "advantage")
    rewards = [one.reward for one in scored if one.reward is not None]
    values = iter(advantage.compute(rewards) if len(rewards) >= 2 else [0.0] * len(rewards))
    return [dataclasses.replace(one, advantage=0.0 if one.reward is None else next(values)) for one in scored]
