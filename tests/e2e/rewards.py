"""Rewards of the tests, named in configurations as `tests.e2e.rewards:NAME`."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from longrl.types import Example, Rollout

pool = ThreadPoolExecutor(4)

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


def late_for_some(example: Example, rollout: Rollout) -> float | Future[float]:
    """As first_token_even; of every other video as a Future, and not in the order of asking."""
    value = first_token_even(example, rollout)
    if int(re.findall(r"\d+", Path(example.clips[0].path).stem)[-1]) % 2:
        return value

    def think() -> float:
        time.sleep(0.002 * (rollout.token_ids[0] % 5))
        return value

    return pool.submit(think)


def constant(example: Example, rollout: Rollout) -> float:
    return 1.0


def parity_of_answer(example: Example, rollout: Rollout) -> float:
    """One token can say whether the answer is even: half of all do, whatever is asked."""
    return float(rollout.token_ids[0] % 2 == int(example.answer or "") % 2)
