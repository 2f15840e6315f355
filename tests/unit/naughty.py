"""Rewards that misbehave, named in the tests as `tests.unit.naughty:NAME`; light to import, as workers do it often."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

from longrl.types import Example, Rollout

MIB = 2**20


class MuteError(Exception):
    def __init__(self) -> None:
        super().__init__(lambda: None)  # cannot be pickled

    def __str__(self) -> str:
        raise RuntimeError("no words")


def naughty(example: Example, rollout: Rollout, *, good: float = 1.0) -> float | None:
    """Does what the response says."""
    said = rollout.text
    if said == "hang":
        while True:
            time.sleep(1)
    if said == "spin":
        while True:
            pass
    if said == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if said == "exit":
        sys.exit(3)
    if said == "leave":
        os._exit(0)
    if said == "raise":
        raise KeyError("no such\nthing")
    if said == "grow":
        return float(len(bytearray(1024 * MIB)))
    if said == "print":
        print("x" * 5 * MIB)  # noqa: T201 - the point of it
    if said == "print bit by bit":
        for _ in range(5 * 1024):
            os.write(1, b"x" * 1024)
    if said == "print a little":
        print("x" * 1000)  # noqa: T201
    if said == "bequeath":  # a child that would hold on to what the worker has open
        subprocess.Popen(["sleep", "600"])
        os._exit(1)
    if said == "fork":  # and the child comes back later
        time.sleep(0.0 if os.fork() else 0.3)
        return 0.25
    if said == "text":
        return "high"  # pyright: ignore[reportReturnType]
    if said == "mute":
        raise MuteError
    if said == "nan":
        return float("nan")
    return None if said == "none" else good


def sees(example: Example, rollout: Rollout) -> float:
    """Whether there is the variable that the response names."""
    return float(rollout.text in os.environ)


def process(example: Example, rollout: Rollout) -> float:
    return float(os.getpid())


def not_a_number(example: Example, rollout: Rollout) -> float:
    return float("nan")


def late(example: Example, rollout: Rollout) -> Future[float]:
    future: Future[float] = Future()
    future.set_result(1.0)
    return future


def by_token(example: Example, rollout: Rollout) -> float | None:
    """Hangs, crashes, prints or gives NaN for half of all first tokens."""
    first = rollout.token_ids[0]
    told = {0: "hang", 1: "crash", 2: "print", 3: "nan"}.get(first % 8, "")
    return naughty(example, dataclasses.replace(rollout, text=told), good=float(first % 2))


def none_by_token(example: Example, rollout: Rollout) -> float | None:
    """The twin: None where the other breaks."""
    first = rollout.token_ids[0]
    return None if first % 8 < 4 else float(first % 2)
