"""longrl rollout-server: an engine in a process of its own, for runs that name it in `rollout.server`.

The main thread answers the requests, those that wait together at once: what a rollout is does not depend on what it is
drawn beside. A request names its weights; where the server has others, it reads those first. HTTP is another thread's.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from pydantic import ValidationError

from longrl.config import ParallelConfig, RlConfig
from longrl.evals.controls import shuffled_by_key
from longrl.parallel.ranks import ALONE
from longrl.policy import load_policy
from longrl.rollout.engine import Engine, build_engine, settle_engine
from longrl.rollout.weights import fingerprint, read_weights
from longrl.rollout.wire import TOKEN_ENV, About, Answer, Asked, AskedMedia, AskedPrompt, Sampling, Weights, explain
from longrl.types import Clip, Example, MediaEmbeds, Prompt, Rollout
from longrl.video.cache import EmbedCache

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")


class RefusedError(ValueError):
    """The server and the run do not go together."""


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    asked: Asked
    answer: Future[Answer]
    prompts: list[Prompt]


class RolloutServer:
    """A model, and the engine that the configuration names."""

    def __init__(self, config: RlConfig) -> None:
        """
        Raises:
            ValueError, RuntimeError, ImportError: as load_policy and build_engine.
        """
        here = config.rollout.model_copy(update={"server": None, "max_staleness": 0})
        self.config = config.model_copy(update={"parallel": ParallelConfig(), "rollout": here})
        self.config = settle_engine(self.config, ALONE)
        self.policy = load_policy(config.model, self.config, ALONE)
        self.engine = build_engine(self.config, self.policy, lambda part: nullcontext())
        longest = self.engine.longest_prompt
        self.about = About(
            model=fingerprint(self.policy, config.model),
            engine=type(self.engine).__name__,
            room=None if longest is None else longest + config.rollout.max_new_tokens,
            longest_clip=self.engine.longest_clip,
        )
        self.cache = EmbedCache(config.cache.dir)
        self.num_tokens = self.policy.family.model.config.get_text_config().vocab_size
        self._engines: dict[Sampling, Engine] = {}
        self._weights: Weights | None = None
        self._queue: queue.SimpleQueue[Waiting] = queue.SimpleQueue()

    def ask(self, asked: Asked) -> Future[Answer]:
        """Of any thread.

        Raises:
            RefusedError: another model, or media that are not in this server's cache.
            ValueError: tokens that the model does not have.
        """
        if asked.model != self.about.model:
            raise RefusedError(
                f"the request is for another model (fingerprint {asked.model[:12]}, the server's is "
                f"{self.about.model[:12]}): start the server with the run's own configuration"
            )
        waiting = Waiting(asked=asked, answer=Future(), prompts=[self._prompt(one) for one in asked.prompts])
        self._queue.put(waiting)
        return waiting.answer

    def _prompt(self, asked: AskedPrompt) -> Prompt:
        if (largest := max(asked.token_ids)) >= self.num_tokens:
            raise ValueError(f"token {largest} is none of the {self.num_tokens} of the model")
        return Prompt(
            token_ids=torch.tensor(asked.token_ids),
            position_ids=torch.tensor(asked.position_ids),
            media=tuple(self._media(media) for media in asked.media),
            media_slots=tuple(media.slots for media in asked.media),
        )

    def _media(self, asked: AskedMedia) -> MediaEmbeds:
        media = shuffled_by_key(asked.key, lambda key: self._read(key, asked.clip))
        if media is None:
            raise RefusedError(
                f"the embedding cache {self.cache.dir.absolute()} has no entry {asked.key}; cache.dir must be a folder "
                "that the run and its rollout server share, and cache.max_gib have room for what is in use"
            )
        rows = sum(end - start for start, end in asked.slots)
        if rows != len(media.embeds):
            raise ValueError(f"media {asked.key}: {len(media.embeds)} embeddings for {rows} tokens")
        return media

    def _read(self, key: str, clip: Clip | None) -> MediaEmbeds | None:
        media = self.cache.read(key)
        return media and replace(media, clip=clip)

    def work(self) -> NoReturn:
        """Answers, until it is interrupted."""
        waiting: list[Waiting] = []
        while True:
            if not waiting:
                waiting.append(self._queue.get())
            while not self._queue.empty():
                waiting.append(self._queue.get())
            kind = (waiting[0].asked.weights, waiting[0].asked.sampling)
            alike = [one for one in waiting if (one.asked.weights, one.asked.sampling) == kind]
            waiting = [one for one in waiting if one not in alike]
            # from here on nobody can cancel it, as one does whose connection ends
            alike = [one for one in alike if one.answer.set_running_or_notify_cancel()]
            if not alike:
                continue
            try:
                self._answer(alike, *kind)
            except Exception as error:  # whoever asked hears of it
                log.exception("a request for rollouts failed")
                for one in alike:
                    if not one.answer.done():
                        one.answer.set_exception(error)

    @torch.no_grad()
    def _answer(self, waiting: Sequence[Waiting], weights: Weights, sampling: Sampling) -> None:
        began_s = time.time()
        if weights != self._weights:
            self._weights = None  # until all of them are there
            read_weights(self.policy, weights)
            self.engine.update_weights()
            self._weights = weights
        if sampling not in self._engines:
            config = self.config.rollout.model_copy(update=sampling.model_dump(exclude={"greedy"}))
            self._engines[sampling] = self.engine.resampled(config, greedy=sampling.greedy)
        prompts = [prompt for one in waiting for prompt in one.prompts]
        seeds = [prompt.seed for one in waiting for prompt in one.asked.prompts]
        ids = [prompt.id for one in waiting for prompt in one.asked.prompts]
        examples = [Example(id=name, messages=(), answer=None, kind="open") for name in ids]
        drawn: dict[int, tuple[Rollout, ...]] = {}
        """By the identity of the example: several runs may ask for the same."""
        for groups, prefix in self._engines[sampling].rollout(examples, prompts, seeds):
            if prefix is not None:
                prefix.release()
            drawn |= {
                id(group.example): (*group.rollouts, *([group.greedy] if group.greedy else [])) for group in groups
            }
        ended_s, found = time.time(), iter(drawn[id(example)] for example in examples)
        about = (len(prompts), sampling.group_size, weights.version, ended_s - began_s)
        log.info("%d x %d rollouts of version %d in %.1f s", *about)
        for one in waiting:
            rollouts = tuple(next(found) for _ in one.prompts)
            one.answer.set_result(Answer(rollouts=rollouts, began_s=began_s, ended_s=ended_s))


def make_app(server: RolloutServer) -> Any:
    """
    Raises:
        ImportError: the extra is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.base import BaseHTTPMiddleware
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(f"longrl rollout-server needs starlette ({error}): pip install 'longrl[server]'") from None

    token = os.environ.get(TOKEN_ENV, "").strip()

    async def guard(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return Response(f"not authorised: set {TOKEN_ENV} to what it is where the server runs", 401)
        return await call_next(request)

    async def about(request: Request) -> Response:
        return Response(server.about.model_dump_json(), media_type="application/json")

    async def rollouts(request: Request) -> Response:
        body = await request.body()
        try:
            asked = await asyncio.to_thread(Asked.model_validate_json, body)
            waiting = await asyncio.to_thread(server.ask, asked)
            answer = await asyncio.wrap_future(waiting)
        except ValidationError as error:
            return Response(f"malformed request: {explain(error)}", 422)
        except RefusedError as error:
            return Response(str(error), 409)
        except ValueError as error:
            return Response(str(error), 422)
        except Exception as error:  # noqa: BLE001 - the run hears of it, and asks again
            return Response(f"{type(error).__name__}: {error}", 500)
        return Response(answer.model_dump_json(), media_type="application/json")

    routes = [Route("/about", about), Route("/rollouts", rollouts, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def serve(config: RlConfig, host: str, port: int) -> None:
    """Answers requests until it is interrupted.

    Args:
        port: 0: any that is free; the log says which.

    Raises:
        ValueError: others could reach it, and no token keeps them out.
        OSError: the port is taken.
        RuntimeError: HTTP does not start.
        ValueError, RuntimeError, ImportError: as RolloutServer and make_app.
    """
    if host not in LOCAL and not os.environ.get(TOKEN_ENV, "").strip():
        raise ValueError(
            f"--host {host} can be reached from other machines, but {TOKEN_ENV} is not set: set it here and where the "
            f"run is started to the same secret, or leave --host at {LOCAL[0]}"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))  # a port that is taken is known before the model is loaded
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        server = RolloutServer(config)
        app = make_app(server)
        import uvicorn

        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        http = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while thread.is_alive() and not http.started:
            time.sleep(0.05)
        if not http.started:
            raise RuntimeError("the HTTP server does not start; see its messages above")
        where = f"[{host}]" if ":" in host else host
        log.info("rollout server of %s: http://%s:%d", config.model.path, where, bound.getsockname()[1])
        with closing(server.engine):
            server.work()
