"""One rollout server, as a run sees it: asked again while it is away, given up in time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from typing import Any, TypeVar

from pydantic import ValidationError

from longrl.rollout.wire import TOKEN_ENV, About, Answer, Asked, Part, explain
from longrl.rollout_config import ServerConfig

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 10.0
CONNECT_S = 10.0
WORKED_S = 10.0
"""A server that fails after so long was at work until then: what is away is away since."""
T = TypeVar("T", bound=Part)


class ServerLostError(RuntimeError):
    """A server is away, or too slow: nothing is wrong with the run, which can go on from where it is."""


class ServerRefusedError(ValueError):
    """A server does not do what it is asked, and would not if it were asked again."""


class Server:
    """What one raises is a line with its url. ServerLostError: it was not there in time; ServerRefusedError."""

    def __init__(self, url: str, config: ServerConfig) -> None:
        self.url, self.config, self._http = url.rstrip("/"), config, _http()
        token = os.environ.get(TOKEN_ENV, "").strip()
        self._client = self._http.AsyncClient(headers={"Authorization": f"Bearer {token}"} if token else {})

    async def about(self) -> About:
        return self._read(About, await self._call("GET", "/about"))

    async def draw(self, asked: Asked) -> Answer:
        answer = self._read(Answer, await self._call("POST", "/rollouts", asked.model_dump_json().encode()))
        count = asked.sampling.group_size + asked.sampling.greedy
        if [len(group) for group in answer.rollouts] != [count] * len(asked.prompts):
            raise ServerRefusedError(
                f"rollout server {self.url}: not {count} rollouts for each of {len(asked.prompts)} prompts"
            )
        for version in {one.policy_version for group in answer.rollouts for one in group}:
            if version != asked.weights.version:
                raise ServerRefusedError(
                    f"rollout server {self.url}: rollouts of weights version {version}, asked for was version "
                    f"{asked.weights.version}"
                )
        return answer

    async def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        # together no longer than the configuration lets other ranks wait, wherever a server is lost
        until = time.monotonic() + self.config.timeout_s + self.config.retry_s
        failing_since = None
        for attempt in itertools.count():
            began, there = time.monotonic(), True
            left_s = min(self.config.timeout_s, until - began)
            try:
                reply = await self._client.request(
                    method,
                    self.url + path,
                    content=body,
                    headers={"Content-Type": "application/json"},
                    timeout=self._http.Timeout(left_s, connect=min(CONNECT_S, left_s)),
                )
            except self._http.ReadTimeout:
                raise ServerLostError(
                    f"rollout server {self.url}: no answer within rollout.server.timeout_s "
                    f"({self.config.timeout_s:g} s); raise it, add servers, or ask for less"
                ) from None
            except self._http.HTTPError as error:
                why = f"{type(error).__name__} {error}".strip()
                there = not isinstance(error, self._http.ConnectError | self._http.ConnectTimeout)
            else:
                if reply.is_success:
                    return reply.content
                why = " ".join(reply.text.split())[:500] or f"HTTP {reply.status_code}"
                if reply.status_code in (404, 405):
                    raise ServerRefusedError(
                        f"{self.url} is no rollout server ({method} {path}: HTTP {reply.status_code}); give in "
                        "rollout.server.urls what `longrl rollout-server` says"
                    )
                if reply.status_code < 500 and reply.status_code != 429:
                    raise ServerRefusedError(f"rollout server {self.url}: {why}")
            if failing_since is None or (there and time.monotonic() - began > WORKED_S):
                failing_since = time.monotonic()
            wait_s = min(LONGEST_BACKOFF_S, 0.25 * 2**attempt)
            if time.monotonic() + wait_s >= min(failing_since + self.config.retry_s, until):
                raise ServerLostError(
                    f"rollout server {self.url} is away ({why}; tried for rollout.server.retry_s, "
                    f"{self.config.retry_s:g} s): start it with `longrl rollout-server`, then this again"
                )
            log.warning("rollout server %s: %s; asked again in %g s", self.url, why, wait_s)
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    def _read(self, kind: type[T], body: bytes) -> T:
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise ServerRefusedError(f"rollout server {self.url}: malformed answer: {explain(error)}") from None


def _http() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError(f"rollout.server needs the package httpx2 ({error}): pip install 'longrl[server]'") from None
    # one line for every request
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return httpx2
