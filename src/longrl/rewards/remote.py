"""Calls to a remote service: few enough, tried again, paid once, and over at some point.

    remote = Remote("scorer", limits, Store(folder))
    future = start(remote.ask(key, call, most))     # a concurrent.futures.Future; meanwhile the caller goes on

`call` makes one request and raises CallError where that brings nothing. All calls of a process run on one event loop in
a thread of its own.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from longrl.judge_config import LimitsConfig
from longrl.rewards.limits import Breaker, CallError, Window
from longrl.rewards.store import Store
from longrl.totals import Totals

T = TypeVar("T")

LONGEST_BACKOFF_S = 30.0
SLICES = 8
_SUMS = ("requests", "tokens", "usd", "from_cache", "unanswered")


@dataclass(slots=True)
class Use:
    """What a call takes."""

    requests: int = 0
    tokens: int = 0
    usd: float = 0.0


Call = Callable[[Use], Coroutine[Any, Any, Any]]
"""Sends one request; returns what JSON can hold, not None. Its Use says the most that it may take; it corrects that as
soon as the reply tells. Raises CallError."""


class Remote:
    """One service."""

    def __init__(self, name: str, limits: LimitsConfig, store: Store, minute_s: float = 60.0) -> None:
        """
        Args:
            name: for messages.
            limits: of this process.
            store: where answers are kept, under keys that say all that they depend on, the service included.
            minute_s: what the limits are for; less in tests.
        """
        self.name, self.limits, self.store = name, limits, store
        self._totals = _zeros()
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._requests = Window("requests_per_minute", limits.requests_per_minute or sys.maxsize, minute_s)
        self._tokens = Window("tokens_per_minute", limits.tokens_per_minute or sys.maxsize, minute_s)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_s)
        self._random = random.Random()

    def take(self) -> Totals:
        """What happened since this was last called."""
        taken, self._totals = self._totals, _zeros()
        return taken

    async def ask(self, key: str, call: Call, most: Use) -> Any:
        """The answer to a question: as it was kept, or as someone else is just getting it, or by a call.

        Args:
            key: of the question.
            call: may be made several times.
            most: that one call may take, in tokens and money.

        Raises:
            CallError: there is none, after all attempts or `give_up_s`; nothing is kept.
        """
        answer = self.store.get(key)
        if answer is not None:
            self._totals.sums["from_cache"] += 1
            return answer
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self.ask_anew(call, most, key))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        else:
            self._totals.sums["from_cache"] += 1
        return await asyncio.shield(task)

    async def ask_anew(self, call: Call, most: Use, key: str | None = None) -> Any:
        """Asks, whatever is kept.

        Args:
            key: to keep the answer under; None: not at all.
        """
        limit = self.limits.give_up_s
        try:
            async with asyncio.timeout(limit):
                answer = await self._attempts(call, most, time.monotonic() + limit)
        except TimeoutError:
            raise self._unanswered(f"no answer within limits.give_up_s ({limit:g} s)", again=True) from None
        except CallError as error:
            raise self._unanswered(str(error), again=error.again) from None
        if key is not None:
            self.store.put(key, answer)
        return answer

    def _unanswered(self, why: str, *, again: bool) -> CallError:
        self._totals.sums["unanswered"] += 1
        return CallError(f"{self.name}: {why}", again=again)

    async def _attempts(self, call: Call, most: Use, until: float) -> Any:
        for attempt in itertools.count(1):
            try:
                return await self._attempt(call, most)
            except CallError as error:
                longest = min(LONGEST_BACKOFF_S, self.limits.backoff_s * 2 ** (attempt - 1))
                # a random part of it, lest all that failed together come back together
                wait_s = max(error.after_s, self._random.uniform(0.0, longest))
                if not error.again:
                    raise
                if attempt == self.limits.attempts or time.monotonic() + wait_s > until:
                    raise CallError(f"{error} (attempt {attempt})", again=True) from None
            await asyncio.sleep(wait_s)

    async def _attempt(self, call: Call, most: Use) -> Any:
        while True:
            probe, used, answered = await self._breaker.enter(), Use(), None
            try:
                async with (
                    self._slots,
                    self._requests.room(1, lambda used=used: used.requests),
                    self._tokens.room(most.tokens, lambda used=used: used.tokens),
                ):
                    if self._breaker.is_open and not probe:
                        continue
                    with self.store.money(most.usd, lambda used=used: used.usd):
                        used.requests, used.tokens, used.usd = 1, most.tokens, most.usd
                        answered, began = False, time.monotonic()
                        answer = await self._in_time(call(used))
                        answered = True
                        self._totals.means["latency_s"].add(time.monotonic() - began)
                        return answer
            except CallError as error:
                answered = None if answered is None else not error.again
                raise
            finally:
                self._breaker.leave(probe, answered)
                for name in ("requests", "tokens", "usd"):
                    self._totals.sums[name] += getattr(used, name)

    async def _in_time(self, reply: Coroutine[Any, Any, T]) -> T:
        """In slices of time: while other work keeps this thread, replies lie there unread, and that is to cost one
        slice and not a call which has been paid."""
        limit, task = self.limits.timeout_s, asyncio.create_task(reply)
        try:
            for _ in range(SLICES):
                await asyncio.wait({task}, timeout=limit / SLICES)
                if task.done():
                    return task.result()
        finally:
            task.cancel()
        raise CallError(f"no reply within limits.timeout_s ({limit:g} s)", again=True)


def _zeros() -> Totals:
    return Totals(sums=dict.fromkeys(_SUMS, 0))


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Begins it on the loop that all calls of this process share."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="remote calls", daemon=True).start()
    return loop


def http_error(status: int, headers: Mapping[str, str], message: str) -> CallError:
    """What a reply that is not a success means.

    Args:
        headers: whose names are found in lower case.
        message: without secrets.
    """
    again = status in (408, 409, 425, 429) or status >= 500
    return CallError(f"HTTP {status}: {message}", again=again, after_s=_retry_after_s(headers) if again else 0.0)


def hide(text: str, secret: str | None) -> str:
    """Servers quote keys."""
    return text.replace(secret, "[key]") if secret else text


def in_a_line(text: str, secret: str | None) -> str:
    """What somebody else has said, for a message, without the key."""
    return hide(" ".join(text.split()), secret)[:300]


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds, milliseconds (OpenAI's own header) or a date; 0 where there is none that can be read."""
    try:
        if "retry-after-ms" in headers:
            wait_s = float(headers["retry-after-ms"]) / 1000
        else:
            wait_s = float(headers.get("retry-after", 0))
    except ValueError:
        try:
            date = parsedate_to_datetime(headers["retry-after"])
        except (ValueError, KeyError):
            return 0.0
        wait_s = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return wait_s if math.isfinite(wait_s) and wait_s > 0 else 0.0
