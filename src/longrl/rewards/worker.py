"""The program of a worker process: it is told which reward to load and call, and says what came out.

Started by pool.py as `python -m longrl.rewards.worker REQUESTS REPLIES MEMORY_BYTES CALL_S`, the first two being file
descriptors. Requests are pickles; replies are JSON, a line each, as nothing this process writes may be trusted.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrl.rewards.compose import REWARDS, bound, number_or_none
from longrl.rewards.pool import MAX_PRINTED_BYTES, message_of

OURS = str(Path(__file__).parents[1])


def main() -> None:
    requests, replies, memory_bytes, call_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    # Also the file that catches what is printed: writing more fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_PRINTED_BYTES, MAX_PRINTED_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rewards: dict[str, Callable[..., Any]] = {}
    process = os.getpid()
    with os.fdopen(requests, "rb") as stream:
        while True:
            try:
                name, options, *args = pickle.load(stream)
            except EOFError:  # the parent is done, or gone
                return
            # Should the parent be gone, nobody else would end a call that hangs.
            signal.alarm(int(call_s) + 60 if args else 300)
            reply = _reply(rewards, name, options, args)
            signal.alarm(0)
            if os.getpid() != process:  # forked by a reward: its reply would be taken for that to the next request
                os._exit(0)
            os.write(replies, json.dumps(reply).encode() + b"\n")
            if not reply["fit"]:
                return


def _reply(
    rewards: dict[str, Callable[..., Any]], name: str, options: dict[str, Any], args: list[Any]
) -> dict[str, Any]:
    """`value` or `error`, and `fit`: whether this process may have another request."""
    try:
        if name not in rewards:
            rewards[name] = bound(name, options, REWARDS)
        reply: dict[str, Any] = {"value": number_or_none(rewards[name](*args)) if args else None, "fit": True}
    except BaseException as error:  # noqa: BLE001 - user code; sys.exit() must not end it without a word either
        message = message_of(error, 500)
        told = f"{type(error).__name__}: {message}"
        if args:
            told += _place(error)
        else:
            told = message if isinstance(error, ValueError) else f"reward {name!r} cannot be loaded: {told}"
        reply = {"error": told, "fit": True}
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        printed = os.fstat(1).st_size
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
    except OSError:
        printed = MAX_PRINTED_BYTES
    if printed >= MAX_PRINTED_BYTES:
        return {"error": f"it printed {MAX_PRINTED_BYTES} bytes or more", "fit": False}
    return reply


def _place(error: BaseException) -> str:
    """` (file:line)` of the reward, where it called what raised, or raised."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = (frame for frame in frames if not frame.filename.startswith(OURS))
    return next((f" ({frame.filename}:{frame.lineno})" for frame in theirs), "")


if __name__ == "__main__":
    main()
