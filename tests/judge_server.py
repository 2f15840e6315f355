"""An OpenAI-compatible server on this machine that notes all it is asked, and can misbehave.

Its model does what the prompt tells it: it finds the texts by the mark that the system message names.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from types import TracebackType
from typing import Any

FAULTS = ("429", "500", "timeout", "reset", "malformed", "empty")
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class Asked:
    """A request."""

    at: float
    """On time.monotonic."""
    key: str
    """As the client sent it."""
    model: str
    texts: dict[str, str]
    tokens: int
    """Of the prompt: words, of which each has more bytes than one."""
    messages: list[dict[str, str]]
    what: str = "answered"
    """What became of it: answered, or the fault."""


@dataclass(slots=True)
class Reply:
    content: str | None = None
    """What the model says; None: there is only a body."""
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay_s: float = 0.0
    hang: bool = False
    """Until the client goes away."""
    reset: bool = False
    what: str = "answered"


Behaviour = Callable[[Asked], Reply]


def verdict(score: Any, reason: str = "it is so") -> str:
    return json.dumps({"reason": reason, "score": score})


def numbered(asked: Asked) -> Reply:
    """Scores by the number in a question, none of them 0: `score_of`."""
    numbers = re.findall(r"\d+", asked.texts["QUESTION"])
    return Reply(verdict(score_of(int(numbers[-1]) if numbers else 9)))


def score_of(number: int) -> int:
    return 1 + number % 10


def compares(asked: Asked) -> Reply:
    """Right is what is the same."""
    return Reply(verdict(10 * (asked.texts["ANSWER"] == asked.texts["REFERENCE"])))


def storm(seed: int, share: float = 0.3) -> Behaviour:
    """As `numbered`, but such a share of the replies are faults, of all kinds alike."""
    drawn, faults, malformed = random.Random(seed), cycle(FAULTS), cycle(MALFORMED)

    def behave(asked: Asked) -> Reply:
        if drawn.random() >= share:
            return numbered(asked)
        fault = next(faults)
        if fault == "malformed":
            reply = next(malformed)
        else:
            reply = {
                "429": Reply(status=429, body=b'{"error": "slow down"}', headers={"Retry-After": f"{RETRY_AFTER_S:g}"}),
                "500": Reply(status=500, body=b"<html>oops</html>"),
                "timeout": Reply(hang=True),
                "reset": Reply(reset=True),
                "empty": Reply(),
            }[fault]
        reply.what = fault
        return reply

    return behave


MALFORMED = [
    Reply("I would give it a 7."),
    Reply('```json\n{"reason": "fenced", "score": 0}\n```'),
    Reply(verdict("7")),
    Reply(verdict(70)),
    Reply(verdict(-1)),
    Reply(verdict(7.5)),
    Reply(verdict(True)),
    Reply(verdict(None)),
    Reply('{"score": 0}'),
    Reply('{"reason": "no score"}'),
    Reply('{"reason": "more", "score": 0, "confidence": 1}'),
    Reply('{"reason": "twice", "score": 0, "score": 10}'),
    Reply('{"reason": "cut off", "sco', finish="length"),
    Reply(verdict(0), finish="content_filter"),
    Reply('{"reason": "deep", "score": ' + "[" * 20_000),
    Reply(""),
    Reply("[]"),
    Reply("0"),
    Reply(body=b'{"choices": [{"message": '),
    Reply(body=b'{"choices": []}'),
    Reply(body=b'{"choices": null}'),
    Reply(body=b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}]}'),
    Reply(body=b"[]"),
    Reply(body=b"0"),
    Reply(body=b"null"),
    Reply(body=b'"score: 0"'),
    Reply(body=b"\xff\xfe\x00"),
    Reply(body=b'{"choices": ' + b"[" * 20_000),
    Reply(body=b"<html>a login page</html>", headers={"Content-Type": "text/html"}),
]
"""Status 200, and nothing that is a verdict."""


class JudgeServer:
    """Serves while it is entered, in a thread of its own. `behave` may be replaced meanwhile.

    Answers only when it is asked `together` questions at once, and then all of them.
    """

    def __init__(self, behave: Behaviour = numbered, delay_s: float = 0.0, together: int = 1) -> None:
        self.behave, self.delay_s = behave, delay_s
        self._together = asyncio.Barrier(together)
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=256)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def of(self, what: str) -> list[Asked]:
        return [one for one in self.asked if one.what == what]

    def most_in(self, window_s: float, amount: Callable[[Asked], int] = lambda _: 1) -> int:
        """The most that arrived in any half-open window."""
        most, start, held = 0, 0, 0
        for one in self.asked:
            held += amount(one)
            while one.at - self.asked[start].at >= window_s:
                held -= amount(self.asked[start])
                start += 1
            most = max(most, held)
        return most

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                headers = {name.lower(): value for name, value in re.findall(r"^([\w-]+): (.*)\r$", head, re.MULTILINE)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = read(headers, json.loads(body))
                self.asked.append(asked)
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    reply = self.behave(asked)
                    asked.what = reply.what
                    await self._together.wait()
                    await asyncio.sleep(reply.delay_s or self.delay_s)
                    if reply.hang:
                        await reader.read()
                        return
                finally:
                    self._at_once -= 1
                if reply.reset:
                    writer.transport.abort()
                    return
                writer.write(packed(reply, asked))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


def read(headers: dict[str, str], body: dict[str, Any]) -> Asked:
    system, user = (message["content"] for message in body["messages"])
    mark = system.split()[-1]
    found = re.findall(rf"^\[(\w+) {mark}\]\n(.*?)\n\[/\1 {mark}\]$", user, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in found] == ["QUESTION", "REFERENCE", "ANSWER"], user
    return Asked(
        at=time.monotonic(),
        key=headers["authorization"].removeprefix("Bearer "),
        model=body["model"],
        texts=dict(found),
        tokens=len(re.findall(r"\w+|\S", system + user)),
        messages=body["messages"],
    )


def packed(reply: Reply, asked: Asked) -> bytes:
    body = reply.body
    if reply.content is not None:
        choice = {"index": 0, "finish_reason": reply.finish, "message": {"role": "assistant", "content": reply.content}}
        counts = {"prompt_tokens": asked.tokens, "completion_tokens": 12, "total_tokens": asked.tokens + 12}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": asked.model}
        body = json.dumps({**whole, "choices": [choice], "usage": counts}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
