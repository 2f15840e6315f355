"""A client of rollout servers, and a server that does what it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from longrl.config import RlConfig
from longrl.rewards.remote import start
from longrl.rollout.client import Server, ServerLostError
from longrl.rollout.server import serve
from longrl.rollout.wire import TOKEN_ENV
from longrl.rollout_config import ServerConfig
from tests.unit.test_wire import asked

ROLLOUT = {"token_ids": [5], "logprobs": [-0.1], "text": "x", "finish_reason": "stop", "policy_version": 3}
ANSWER = {"rollouts": [[ROLLOUT, ROLLOUT]], "began_s": 1.0, "ended_s": 2.0}


Reply = tuple[int, bytes]


@contextmanager
def serving(behave: Callable[[int], Reply], port: int = 0) -> Iterator[str]:
    """behave: number of the request, from 0 -> status and body."""
    count = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = behave(next(count))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    class Http(ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None:
            """A client that is gone is no news: its line would come out in another test."""

    with Http(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(url: str, **config: float) -> Any:
    client = Server(url, ServerConfig(urls=(url,), **config))
    return start(client.draw(asked())).result()


def test_a_server_that_fails_for_a_while_is_asked_again():
    replies = [(503, b"starting"), (500, b"out of memory"), (200, json.dumps(ANSWER).encode())]
    with serving(lambda number: replies[number]) as url:
        answer = ask(url, retry_s=30)
    assert answer.rollouts[0][1].token_ids == (5,)


def test_a_server_that_fails_after_work_is_asked_again_for_as_long_as_one_that_fails_for_the_first_time(monkeypatch):
    monkeypatch.setattr("longrl.rollout.client.WORKED_S", 0.2)

    def late(number: int) -> Reply:
        time.sleep(0.4)
        return (200, json.dumps(ANSWER).encode()) if number == 2 else (500, b"lost its GPU")

    with serving(late) as url:
        assert len(ask(url, retry_s=0.8).rollouts) == 1


def test_a_server_that_is_away_is_given_up(monkeypatch):
    monkeypatch.setattr("longrl.rollout.client.WORKED_S", 0.0)  # however long it takes to find that nobody is there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ServerLostError, match=r"is away \(ConnectError.*rollout.server.retry_s, 1 s\): start it"):
            ask(url, retry_s=1)
        assert time.monotonic() - began < 10
    monkeypatch.undo()
    with (
        serving(lambda _: (500, b"OutOfMemoryError:\n CUDA")) as url,
        pytest.raises(ServerLostError, match="Error: CUDA"),
    ):
        ask(url, retry_s=0.5)


def test_a_server_that_comes_back_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Server(f"http://127.0.0.1:{port}", ServerConfig(urls=(f"http://127.0.0.1:{port}",)))
    future = start(client.draw(asked()))
    time.sleep(0.5)
    with serving(lambda _: (200, json.dumps(ANSWER).encode()), port):
        assert len(future.result(30).rollouts) == 1


def test_a_server_that_is_slow_is_given_up():
    def slow(number: int) -> Reply:
        time.sleep(3)
        return 200, b"{}"

    with (
        serving(slow) as url,
        pytest.raises(ServerLostError, match=r"no answer within rollout.server.timeout_s \(0.5 s\)"),
    ):
        ask(url, timeout_s=0.5, retry_s=60)


def test_a_server_that_fails_late_and_then_hangs_is_given_up_before_other_ranks_give_up():
    """They wait longer than timeout_s and retry_s together, as the configuration is made to say."""

    def late(number: int) -> Reply:
        time.sleep(40 if number else 7.6)
        return 500, b"lost its GPU"

    with serving(late) as url:
        began = time.monotonic()
        with pytest.raises(ServerLostError, match="no answer within"):
            ask(url, timeout_s=8, retry_s=0.5)
        assert time.monotonic() - began < 14  # 7.6 + 8 where each has a time of its own


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((409, b"the request is for\n another model"), "the request is for another model"),
        ((401, b""), "HTTP 401"),
        ((200, b"<html>"), "malformed answer: Invalid JSON"),
        ((200, b"{}"), "malformed answer: rollouts: Field required"),
        ((200, json.dumps(ANSWER | {"rollouts": [[ROLLOUT]]}).encode()), "not 2 rollouts for each of 1 prompts"),
        ((200, json.dumps(ANSWER | {"rollouts": []}).encode()), "not 2 rollouts for each of 1 prompts"),
        (
            (200, json.dumps(ANSWER | {"rollouts": [[ROLLOUT, ROLLOUT | {"policy_version": 2}]]}).encode()),
            "rollouts of weights version 2, asked for was version 3",
        ),
        (
            (200, json.dumps(ANSWER | {"rollouts": [[ROLLOUT, ROLLOUT | {"logprobs": [None]}]]}).encode()),
            r"malformed answer: rollouts\.0\.1\.logprobs\.0",
        ),
        (
            (200, json.dumps(ANSWER | {"rollouts": [[ROLLOUT, ROLLOUT | {"token_ids": [1, 2]}]]}).encode()),
            "2 tokens with 1 log-probs",
        ),
    ],
)
def test_what_is_no_answer_is_an_error_at_once(reply, message):
    with (
        serving(lambda _: reply) as url,
        pytest.raises(ValueError, match=f"rollout server {url}: .*{message}") as raised,
    ):
        ask(url)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [404, 405])
def test_what_is_no_rollout_server_is_said(status):
    with (
        serving(lambda _: (status, b"<html>nothing here</html>")) as url,
        pytest.raises(ValueError, match=rf"^{url} is no rollout server \(POST /rollouts: HTTP {status}\); give in "),
    ):
        ask(url)


# the configuration


def rl(**changes: Any) -> RlConfig:
    return RlConfig.model_validate({"run_dir": "run", "model": {"path": "tiny:qwen2_5_vl"}, "steps": 2, **changes})


SERVER = {"urls": ["http://node1:8100"]}
AHEAD = {"server": SERVER, "max_staleness": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"max_staleness": 1}}, "rollout.server is not set"),
        ({"rollout": {"max_staleness": 2, "server": SERVER}}, "less than or equal to 1"),
        ({"rollout": AHEAD}, "algo.correction is off"),
        ({"rollout": AHEAD, "algo": {"correction": "mask", "max_refills": 2}}, "algo.max_refills"),
        ({"rollout": AHEAD, "algo": {"correction": "mask", "shuffled_rollouts": 2}}, "algo.shuffled_rollouts"),
        (
            {
                "rollout": AHEAD,
                "algo": {"correction": "mask"},
                "model": {"path": "tiny:qwen2_5_vl", "train": ["language", "projector"]},
            },
            "the embeddings of the next step would be the old encoder's",
        ),
        ({"rollout": {"server": {"urls": []}}}, "at least 1"),
        ({"rollout": {"server": {"urls": ["node1:8100"]}}}, "'node1:8100', expected http://HOST:PORT"),
        ({"rollout": {"server": {"urls": ["http://node1:port"]}}}, "expected http://HOST:PORT"),
        ({"rollout": {"server": {**SERVER, "timeout_s": 1700}}}, r"less together than parallel.timeout_s \(1800\)"),
    ],
)
def test_what_cannot_be_is_refused_in_the_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        rl(**changes)


def test_what_can_be_is_not():
    assert rl(rollout=AHEAD, algo={"correction": "truncate"}).rollout.max_staleness == 1
    assert rl(rollout={"server": SERVER}, algorithm="t_grpo", algo={"max_refills": 1}, rewards={"answer": 1.0}).rollout


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::"])
def test_a_server_that_others_can_reach_needs_a_token(host, monkeypatch):
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    with pytest.raises(
        ValueError, match=f"--host {host} can be reached from other machines, but {TOKEN_ENV} is not set"
    ):
        serve(rl(), host, 0)


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="Address already in use"):
        serve(rl(model={"path": "/nowhere"}), "127.0.0.1", taken.getsockname()[1])
