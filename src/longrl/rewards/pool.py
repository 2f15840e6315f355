"""Rewards in processes of their own, with limits of time, memory and print; one that breaks is replaced.

This keeps code that hangs, crashes or grows from taking the run along. It is no defence against code that means harm:
a worker has the rights of its user.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from longrl.types import Example, Rollout

MAX_PRINTED_BYTES = 1 << 20
_MAX_REPLY_BYTES = 1 << 16
_LOAD_S = 120.0
"""For a process to start and a reward to be imported."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


class RewardError(RuntimeError):
    """A call in a worker process gave no reward: it raised, hung, crashed or printed too much."""


def message_of(error: BaseException, most: int = 300) -> str:
    """What user code raised, in a line that is not long."""
    try:
        message = str(error)
    except (Exception, SystemExit) as another:  # noqa: BLE001 - user code too
        message = f"(its message cannot be read: {type(another).__name__})"
    return " ".join(message.split())[:most]


class Pool:
    """Worker processes that call rewards; they are started when first needed."""

    def __init__(self, count: int, timeout_s: float, memory_bytes: int, hidden: Collection[str] = ()) -> None:
        """
        Args:
            count: processes.
            timeout_s: that one call may take.
            memory_bytes: that one process may have.
            hidden: variables of the environment that they are not given, besides those whose names tell.
        """
        self.timeout_s, self.memory_bytes, self.hidden = timeout_s, memory_bytes, frozenset(hidden)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reward")
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def require(self, name: str, options: dict[str, Any]) -> None:
        """Looks whether a worker can import a reward, and ends it again.

        Raises:
            ValueError: it cannot.
        """
        worker = _Worker(self.memory_bytes, self.timeout_s, self.hidden)
        try:
            worker.load(name, options)
        except RewardError as error:
            raise ValueError(str(error)) from error
        finally:
            worker.kill()

    def submit(self, name: str, options: dict[str, Any], example: Example, rollout: Rollout) -> Future[float | None]:
        """The reward, as soon as a worker has made it.

        The Future raises RewardError where there is none; the worker is then replaced, if it broke.
        """
        return self._threads.submit(self._call, name, options, example, rollout)

    def close(self) -> None:
        """Waits for calls that have begun, and ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.kill()

    def _call(self, name: str, options: dict[str, Any], example: Example, rollout: Rollout) -> float | None:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self.memory_bytes, self.timeout_s, self.hidden)
            if name not in worker.loaded:  # importing is not the call's time
                worker.load(name, options)
            return worker.ask((name, options, example, rollout), self.timeout_s)
        finally:
            self._idle.put(worker if worker is not None and worker.is_fit else None)


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, memory_bytes: int, timeout_s: float, hidden: frozenset[str]) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        hidden |= {name for name in os.environ if _SECRET.search(name)}
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # the limit of file sizes would leave halves
            "OMP_NUM_THREADS": "1",
        }
        limits = (str(memory_bytes), str(timeout_s))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "longrl.rewards.worker", str(requests), str(replies), *limits],
            pass_fds=(requests, replies),
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run; and children of the reward end with it
        )
        os.close(requests)
        os.close(replies)
        os.set_blocking(self._requests, False)
        self.loaded: set[str] = set()
        self.is_fit = True
        self.kill = weakref.finalize(self, _end, self._process, self._requests, self._replies, self._printed)

    def load(self, name: str, options: dict[str, Any]) -> None:
        """Has it import a reward.

        Raises:
            RewardError: it cannot be imported.
        """
        try:
            self.ask((name, options), _LOAD_S)
        except RewardError as error:
            if self.is_fit:  # it said why, and which
                raise
            late = isinstance(error.__cause__, TimeoutError)
            why = f"it is still being imported after {_LOAD_S:g} s" if late else f"while it was imported, {error}"
            mend = "let its module define rewards alone, and do what takes long, prints or exits in the reward"
            raise RewardError(f"reward {name!r} cannot be loaded: {why}; {mend}") from error
        self.loaded.add(name)

    def ask(self, request: tuple[Any, ...], limit_s: float) -> float | None:
        """Sends a request and waits for its reply.

        Raises:
            RewardError: the reply is an error, or there is none in time; in the latter case the process is ended.
        """
        deadline = time.monotonic() + limit_s
        try:
            self._send(pickle.dumps(request), deadline)
            reply = json.loads(self._receive(deadline))
        except (OSError, ValueError, RewardError) as error:
            self.is_fit = False
            raise RewardError(self._why(error, limit_s)) from error
        if not reply["fit"]:
            self.is_fit = False
            self.kill()
        if error := reply.get("error"):
            raise RewardError(error)
        return reply["value"]

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            _wait(self._requests, select.POLLOUT, deadline)
            data = data[os.write(self._requests, data[: 1 << 16]) :]

    def _receive(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            _wait(self._replies, select.POLLIN, deadline)
            more = os.read(self._replies, _MAX_REPLY_BYTES)
            line += more
            if not more or len(line) > _MAX_REPLY_BYTES:
                raise RewardError("no reply")
        return line

    def _why(self, error: Exception, limit_s: float) -> str:
        """Ends the process and says what became of it."""
        if isinstance(error, TimeoutError):
            self.kill()
            return (
                f"TimeoutError: no reward after {limit_s:g} s; the worker was ended (see scoring.timeout_s, in_process)"
            )
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        self._printed.seek(0)
        last = self._printed.read()[-2000:].decode(errors="replace").strip().splitlines()
        self.kill()
        how = (
            "wrote no reply"
            if status is None
            else f"ended with {signal.Signals(-status).name if status < 0 else status}"
        )
        return f"the worker {how}{f': {last[-1][:300]}' if last else ''}"


def _wait(file: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], requests: int, replies: int, printed: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(requests)
    os.close(replies)
    printed.close()
