"""Calls to a real server that misbehaves: nothing is lost, paid twice, hurried or turned into a zero."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import wait
from itertools import pairwise

import pytest

from longrl.rewards.judge import Judge
from longrl.rewards.limits import CallError
from longrl.rewards.remote import Remote, Use, http_error, start
from longrl.rewards.store import Store
from tests.judge_server import (
    FAULTS,
    RETRY_AFTER_S,
    Asked,
    JudgeServer,
    Reply,
    numbered,
    packed,
    score_of,
    storm,
    verdict,
)
from tests.judging import ask, make, priced

STORM_CALLS = int(os.environ.get("LONGRL_JUDGE_CALLS", "1000"))
"""`make storm` sets 10,000."""


@pytest.mark.timeout(1800)
def test_a_storm_loses_nothing_and_pays_nothing_twice(tmp_path):
    """30% of all replies are faults, of six kinds alike. A score is never 0: a 0 would be a failure in disguise."""
    rate, at_once = 300, 128
    limits = {
        "attempts": 12,
        "timeout_s": 20.0,  # far above what a slow machine takes for 128 at once: a late reply is paid and lost
        "concurrency": at_once,
        "requests_per_minute": rate,
        "give_up_s": 1700.0,
    }
    with JudgeServer(storm(0)) as server:
        judge = Judge(make(server, tmp_path, limits), minute_s=1.0)
        futures = [ask(judge, f"What is {i}?") for i in range(STORM_CALLS)]
        # each once more, while the first is under way
        again = [ask(judge, f"What is {i}?") for i in range(STORM_CALLS)]
        wait(futures + again)
        scores = [None if future.exception() else future.result() for future in futures]
        assert [None if future.exception() else future.result() for future in again] == scores
    wrong = [(i, score) for i, score in enumerate(scores) if score is not None and score != score_of(i) / 10]
    assert wrong == []
    what = Counter(one.what for one in server.asked)
    assert what["answered"] == STORM_CALLS - scores.count(None)
    assert scores.count(None) <= STORM_CALLS * 1e-3  # 0.3 ** 12 = 5e-7 of them are to be expected
    assert max(what[fault] for fault in FAULTS) - min(what[fault] for fault in FAULTS) <= 1
    assert 0.25 < 1 - what["answered"] / len(server.asked) < 0.35
    by_question: dict[str, list[Asked]] = {}
    for one in server.asked:
        by_question.setdefault(one.texts["QUESTION"], []).append(one)
    assert [name for name, asked in by_question.items() if "answered" in [one.what for one in asked[:-1]]] == []
    hurried = [
        name
        for name, asked in by_question.items()
        for before, after in pairwise(asked)
        if before.what == "429" and after.at - before.at < RETRY_AFTER_S
    ]
    assert hurried == []
    assert server.most_in(1.0) <= rate
    assert server.most_at_once <= at_once
    counted = judge.take().counts
    assert counted["judge/requests"] == len(server.asked)
    assert counted["judge/from_cache"] == STORM_CALLS


def test_sixty_four_are_asked_at_once(tmp_path):
    """Of whom none is answered before all are there: four rounds, where one at a time takes 256. In calls a second:
    benchmarks/judge.py."""
    with JudgeServer(together=64) as server:
        judge = Judge(make(server, tmp_path, {"timeout_s": 60.0}))
        futures = [ask(judge, f"What is {i}?") for i in range(256)]
        assert [future.result() for future in futures] == [score_of(i) / 10 for i in range(256)]
    assert len(server.asked) == 256
    assert server.most_at_once == 64


@pytest.mark.parametrize("limit", ["requests", "tokens"])
def test_no_window_holds_more_than_the_limit_and_the_limit_is_used(tmp_path, limit):
    window_s, most, used = {"requests": (1.0, 12, 0.8), "tokens": (1.0, 6_000, 0.5)}[limit]
    with JudgeServer() as server:
        server.behave = lambda asked: Reply(numbered(asked).content, delay_s=0.001 * (len(server.asked) % 20))
        limits = {f"{limit}_per_minute": most}
        models = priced(server, max_tokens=20)
        judge = Judge(make(server, tmp_path, limits, models=models), minute_s=window_s)
        for future in [ask(judge, f"What is {i}?") for i in range(40)]:
            future.result()
    found = server.most_in(window_s, (lambda one: one.tokens + 12) if limit == "tokens" else lambda one: 1)
    assert used * most < found <= most  # of the tokens, the most that one call may take is kept free


def test_a_call_that_can_never_fit_is_unscorable_at_once(tmp_path):
    with JudgeServer() as server:
        judge = Judge(make(server, tmp_path, {"tokens_per_minute": 500}))
        with pytest.raises(CallError, match=r"it may take \d+ of limits\.tokens_per_minute, which is 500"):
            ask(judge, "What is 1?").result()
    assert server.asked == []


def test_processes_divide_the_limits(tmp_path):
    limits = make("http://h", tmp_path, {"requests_per_minute": 100, "concurrency": 9}).limits
    assert (limits.divided(4, "x").requests_per_minute, limits.divided(4, "x").concurrency) == (25, 2)
    with pytest.raises(ValueError, match=r"judge\.limits\.concurrency is 9, but 10 processes divide it"):
        limits.divided(10, "judge.limits")


def test_answers_outlive_the_process_and_failures_do_not(tmp_path):
    with JudgeServer(lambda asked: Reply(status=500)) as server:
        first = Judge(make(server, tmp_path, {"attempts": 2}))
        with pytest.raises(CallError, match=r"judge.models.one: HTTP 500: .* \(attempt 2\)"):
            ask(first, "What is 3?").result()
        server.behave = numbered
        assert ask(first, "What is 3?").result() == 0.4
        before = len(server.asked)
        second = Judge(make(server, tmp_path))
        assert ask(second, "What is 3?").result() == 0.4
        assert len(server.asked) == before
        assert ask(second, "What is 3?", "a dog").result() == 0.4  # another question
        other = make(server, tmp_path, models=priced(server, temperature=0.5))
        assert ask(Judge(other), "What is 3?").result() == 0.4  # another judge
        assert len(server.asked) == before + 2
        for count, judge in ((1, second), (0, first)):
            assert judge.take().counts["judge/from_cache"] == count


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(tmp_path, status):
    with JudgeServer(lambda asked: Reply(status=status, body=b'{"error": "no"}')) as server:
        error = ask(Judge(make(server, tmp_path)), "What is 1?").exception()
        assert f"HTTP {status}" in str(error)
    assert len(server.asked) == 1


def test_a_reply_that_trickles_in_is_late_all_the_same(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        judge = Judge(
            make(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path, {"timeout_s": 0.5, "attempts": 1})
        )
        future = ask(judge, "What is 1?")
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            began = time.monotonic()
            while not future.done() and time.monotonic() - began < 5:
                connection.sendall(b" ")
                time.sleep(0.1)
        with pytest.raises(CallError, match=r"no reply within limits.timeout_s \(0.5 s\)"):
            future.result()


def test_a_question_is_given_up_in_time_and_a_long_retry_after_at_once(tmp_path):
    with JudgeServer(lambda asked: Reply(status=429, headers={"Retry-After": "3600"})) as server:
        judge = Judge(make(server, tmp_path))
        with pytest.raises(CallError, match=r"HTTP 429: .*\(attempt 1\)"):
            ask(judge, "What is 1?").result(timeout=5)
        server.behave, server.delay_s = numbered, 1.0
        slow = Judge(make(server, tmp_path, {"concurrency": 1, "give_up_s": 2.5}))
        futures = [ask(slow, f"What is {i}?") for i in range(5)]
        wait(futures, timeout=5)
        errors = [future.exception() for future in futures]
        assert [error is None for error in errors] == [True, True, False, False, False]
        assert "no answer within limits.give_up_s (2.5 s)" in str(errors[-1])
        assert slow.take().counts["judge/unanswered"] == 3


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
        ({"retry-after": "Thu, 31 Dec 2099 23:59:59 GMT"}, 1e9),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "-3"}, 0),
        ({}, 0),
    ],
)
def test_retry_after(headers, after_s):
    found = http_error(429, headers, "slow down").after_s
    assert found > 1e9 if after_s == 1e9 else found == after_s


def test_a_dead_judge_is_left_alone_and_an_outage_is_waited_for(tmp_path):
    limits = {"concurrency": 8, "attempts": 3, "breaker_failures": 5, "breaker_s": 0.4}
    with JudgeServer(lambda asked: Reply(status=503)) as server:
        judge = Judge(make(server, tmp_path, limits))
        futures = [ask(judge, f"What is {i}?") for i in range(80)]
        wait(futures)
        assert all(isinstance(future.exception(), CallError) for future in futures)
        sent, spent_s = len(server.asked), server.asked[-1].at - server.asked[0].at
        assert sent <= 5 + 8 + spent_s / 0.4 + 1  # 240 without the breaker
        futures = [ask(judge, f"What is {i}?") for i in range(80)]
        time.sleep(0.1)
        server.behave = numbered
        assert [future.result() for future in futures] == [score_of(i) / 10 for i in range(80)]


def test_the_budget_holds_and_is_remembered(tmp_path):
    """A dollar a token; the most that a call may cost is counted until its reply tells."""
    with JudgeServer() as server:
        models = priced(server, input_usd_per_mtok=1e6, output_usd_per_mtok=1e6, max_tokens=20)
        unlimited = Judge(make(server, tmp_path / "free", models=models))
        ask(unlimited, "What is 0?").result()
        one = server.asked[-1].tokens + 12
        assert unlimited.models[0].remote.store.spent_usd == pytest.approx(one)
        assert unlimited.take().counts["judge/usd"] == pytest.approx(one)

        budget = 30.0 * one
        judge = Judge(make(server, tmp_path, models=models, budget_usd=budget))
        futures = [ask(judge, f"What is {i}?") for i in range(100)]
        wait(futures)
        errors = [future.exception() for future in futures if future.exception()]
        assert 10 < len(errors) < 95
        assert all("budget_usd is" in str(error) for error in errors)
        spent = judge.models[0].remote.store.spent_usd
        assert spent == pytest.approx(sum(asked.tokens + 12 for asked in server.asked[1:]))
        assert spent <= budget
        later = Judge(make(server, tmp_path, models=models, budget_usd=spent + 1))
        with pytest.raises(CallError, match="spent or set aside; raise it"):
            ask(later, "What is 1000?").result()
        known = next(i for i, future in enumerate(futures) if not future.exception())
        assert ask(later, f"What is {known}?").result() == score_of(known) / 10


def test_a_lost_reply_is_counted_as_paid_and_a_refused_call_is_not(tmp_path):
    with JudgeServer(lambda asked: Reply(reset=True)) as server:
        models = priced(server, output_usd_per_mtok=1e6, max_tokens=20)
        judge = Judge(make(server, tmp_path, {"attempts": 1}, models=models, budget_usd=1e9))
        assert ask(judge, "What is 1?").exception()
        assert judge.models[0].remote.store.spent_usd == 20
        server.behave = lambda asked: Reply(status=500)
        assert ask(judge, "What is 1?").exception()
        assert judge.models[0].remote.store.spent_usd == 20


NO_COUNTS = ["-1", "-999999999", "1.5", '"7"', "true", "null", "[1]", "1" + "0" * 400]


@pytest.mark.parametrize("count", NO_COUNTS)
def test_a_usage_that_is_no_count_is_not_believed(tmp_path, count):
    """The most that the call may take is counted, as for a reply that does not tell."""
    with JudgeServer() as server:
        models = priced(server, input_usd_per_mtok=1e6, output_usd_per_mtok=1e6, max_tokens=20)
        judge = Judge(make(server, tmp_path, models=models))

        def behave(asked: Asked) -> Reply:
            told = b'"usage": {"prompt_tokens": %s, "completion_tokens": 5}}' % usages[len(server.asked) - 1].encode()
            return Reply(body=packed(numbered(asked), asked).partition(b"\r\n\r\n")[2].split(b'"usage"')[0] + told)

        server.behave = behave
        usages, taken = ("null", count, "7"), []
        for number in range(3):
            assert ask(judge, f"What is {number}?").result() == score_of(number) / 10
            totals = judge.take().counts
            taken.append((totals["judge/tokens"], totals["judge/usd"]))
    assert taken[1] == taken[0]
    assert taken[0][0] == taken[0][1] > 25
    assert taken[2] == (12, 12)


def test_an_answer_that_cannot_be_kept_is_still_an_answer(tmp_path, caplog):
    """The disk is full, or the file cannot be written any more."""
    with JudgeServer() as server, caplog.at_level(logging.WARNING):
        judge = Judge(make(server, tmp_path / "full"))
        judge.models[0].remote.store._db.execute("PRAGMA max_page_count = 1")  # as small as it is now
        server.behave = lambda asked: Reply(verdict(7, "so " * 90))
        for future in [ask(judge, f"What is {i}?") for i in range(60)]:
            assert future.result() == 0.7
        assert judge.take().counts["judge/unanswered"] == 0
        (warning,) = caplog.messages
        assert warning.startswith(f"{tmp_path / 'full' / 'answers.sqlite'}: database or disk is full; answers that are")

        caplog.clear()
        judge = Judge(make(server, tmp_path / "cut", models=priced(server, output_usd_per_mtok=1e6, max_tokens=20)))
        store = judge.models[0].remote.store

        def behave(asked: Asked) -> Reply:
            store._db.execute("PRAGMA query_only = 1")
            return numbered(asked)

        server.behave = behave
        assert ask(judge, "What is 4?").result() == 0.5
        assert store.spent_usd == 20  # the most
        assert len(caplog.messages) == 1


def test_a_store_that_is_none(tmp_path):
    (tmp_path / "answers.sqlite").write_text("not a database, but long enough to be looked at" * 30)
    with pytest.raises(RuntimeError, match=r"answers.sqlite: file is not a database; give another folder, or delete"):
        Judge(make("http://127.0.0.1:1/v1", tmp_path))


def test_a_store_waits_for_who_makes_it(tmp_path):
    """SQLite itself does not, as ranks that begin together found."""
    other = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE something (x)")
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    release.start()
    assert Store(tmp_path).spent_usd == 0
    release.join()


def test_another_service_is_called_in_the_same_way(tmp_path):
    """A scorer of media, say: whoever calls says what a request is, and what it took."""
    sent = []

    async def call(used: Use) -> float:
        sent.append(used.usd)
        if len(sent) < 3:
            raise http_error(503, {}, "starting")
        used.usd = 0.5
        return 0.75

    limits = make("http://unused", tmp_path).limits
    remote = Remote("scorer", limits, Store(tmp_path))
    futures = [start(remote.ask("a picture", call, Use(usd=1.0))) for _ in range(5)]
    assert [future.result() for future in futures] == [0.75] * 5
    assert sent == [1.0] * 3
    counts = remote.take().counts
    assert (counts["requests"], counts["from_cache"], counts["unanswered"], counts["usd"]) == (3, 4, 0, 2.5)
