"""Rewards of the tests, named in configurations as `tests.e2e.rewards:NAME`."""

from __future__ import annotations

from longrl.types import Example, Rollout

calls = {"until_interrupt": -1}


def first_token_even(example: Example, rollout: Rollout) -> float:
    return float(rollout.token_ids[0] % 2 == 0)


def interrupted(example: Example, rollout: Rollout) -> float:
    """As first_token_even, but presses Ctrl-C at a set call."""
    calls["until_interrupt"] -= 1
    if calls["until_interrupt"] == 0:
        raise KeyboardInterrupt
    return first_token_even(example, rollout)


def sometimes_unknown(example: Example, rollout: Rollout) -> float | None:
    return None if rollout.token_ids[0] % 3 == 0 else first_token_even(example, rollout)
