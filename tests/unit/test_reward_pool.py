"""Rewards in worker processes, and what may go wrong in one: the row is not scored, the next one is."""

from __future__ import annotations

import os
import time

import pytest

from longrl.rewards import build_rewards
from longrl.rewards.pool import Pool, RewardError
from longrl.scoring_config import ScoringConfig
from longrl.types import Example
from tests.judging import make
from tests.unit.test_rewards import group, rollout

MIB = 2**20


NAME, SEES, LATE = (f"tests.unit.naughty:{name}" for name in ("naughty", "sees", "late"))
EXAMPLE = Example(id="q7", messages=(), answer="B", kind="choice")


@pytest.fixture(scope="module")
def pool():
    pool = Pool(count=1, timeout_s=1.0, memory_bytes=512 * MIB)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hang", "TimeoutError: no reward after 1 s; the worker was ended"),
        ("spin", "TimeoutError: no reward after 1 s"),
        ("crash", "the worker ended with SIGSEGV"),
        ("leave", "the worker ended with 0"),
        ("bequeath", "the worker ended with 1"),
        ("exit", "SystemExit: 3"),
        ("raise", r"KeyError: 'no such.* \(.*tests/unit/naughty\.py:\d+\)$"),
        ("grow", "MemoryError"),
        ("print", "it printed 1048576 bytes or more"),
        ("print bit by bit", "printed 1048576 bytes or more|File too large"),
        ("text", "TypeError: a reward must be a number or None, got a str"),
        ("nan", "ValueError: a reward must be a finite number, got nan"),
        ("mute", r"MuteError: \(its message cannot be read: RuntimeError\)"),
    ],
)
def test_a_row_that_breaks_its_worker_has_no_reward_and_the_next_one_has(pool, said, message):
    with pytest.raises(RewardError, match=message):
        pool.submit(NAME, {}, EXAMPLE, rollout(said)).result(timeout=300)
    assert pool.submit(NAME, {}, EXAMPLE, rollout("fine")).result(timeout=300) == 1.0


def test_none_and_a_little_print_are_no_failures(pool):
    assert pool.submit(NAME, {}, EXAMPLE, rollout("none")).result(timeout=300) is None
    for _ in range(3):  # more than a limit of 1,000 bytes together would allow
        assert pool.submit(NAME, {}, EXAMPLE, rollout("print a little")).result(timeout=300) == 1.0


def test_what_a_reward_forks_does_not_reply_to_the_next_request(pool):
    assert pool.submit(NAME, {}, EXAMPLE, rollout("fork")).result(timeout=300) == 0.25
    time.sleep(0.6)
    assert [pool.submit(NAME, {}, EXAMPLE, rollout("fine")).result(timeout=300) for _ in range(3)] == [1.0] * 3


def test_workers_see_no_keys(monkeypatch, tmp_path):
    """Neither those whose names tell, nor those that the judge's configuration names."""
    names = ("SOME_API_KEY", "JUDGE_AUTH", "OPENAI", "HARMLESS")
    for name in names:
        monkeypatch.setenv(name, "1")
    models = {name: {"base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": name} for name in names[1:3]}
    rewards = build_rewards({"judge": 0.5, SEES: 0.5}, judge=make("", tmp_path, models=models))
    asked = group(*names, answer=None)  # which a judge gives no score
    assert [one.rewards[SEES] for one in rewards(asked)] == [0.0, 0.0, 0.0, 1.0]


def test_workers_end_with_the_pool():
    pool = Pool(count=1, timeout_s=5.0, memory_bytes=512 * MIB)
    pid = int(pool.submit("tests.unit.naughty:process", {}, EXAMPLE, rollout("")).result() or 0)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_group_is_scored_by_workers_at_once_and_in_its_order(caplog):
    scoring = ScoringConfig(options={NAME: {"good": 0.5}}, timeout_s=1.0, memory_gib=0.5)
    rewards = build_rewards({NAME: 1.0, "format": 0.0}, scoring)
    begun = rewards.begin(group("fine", "hang", "crash", "none", "nan", "fine"))
    assert not begun.is_late
    scored = begun.result()
    assert [one.reward for one in scored] == [0.5, None, None, None, None, 0.5]
    assert [one.failed for one in scored] == [(), (NAME,), (NAME,), (), (NAME,), ()]
    assert rewards.failures == {NAME: 3, "format": 0}
    assert "example q7" in caplog.text
    assert "SIGSEGV" in caplog.text


def test_math_is_scored_by_workers():
    rewards = build_rewards({"answer": 1.0})
    asked = group("\\boxed{\\frac{2}{4}}", "0.25", answer="1/2", kind="math")
    rewards.require([asked.example])
    assert [one.reward for one in rewards(asked)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os; os._exit(3)", "while it was imported, the worker ended with 3"),
        ("import time; time.sleep(1000)", "it is still being imported after 4 s"),
        ("print('x' * 2**21)", "while it was imported, it printed 1048576 bytes or more"),
    ],
)
def test_a_reward_that_breaks_its_worker_while_imported_is_named(tmp_path, monkeypatch, text, words):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    if "after 4 s" in words:
        monkeypatch.setattr("longrl.rewards.pool._LOAD_S", 4.0)
    with pytest.raises(ValueError, match=rf"^reward 'mine\.py:x' cannot be loaded: {words}; let its module define"):
        build_rewards({"mine.py:x": 1.0})


def test_a_truth_that_takes_for_ever_to_read_is_found_before_the_run():
    rewards = build_rewards({"math": 1.0}, ScoringConfig(timeout_s=1.0))
    asked = [group("5", answer=truth, kind="math").example for truth in ("(" * 3000, "1/2", "2/3", "3/4")]
    with pytest.raises(ValueError, match=r"example q7: the truth '\(+' cannot be read by math: TimeoutError"):
        rewards.require(asked)


def test_a_reward_of_ones_own_is_never_imported_here_and_must_exist(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import sys\nprint(1)\ndef reward(example, rollout):\n    return float('pytest' in sys.modules)\n")
    name = f"{path}:reward"
    assert build_rewards({name: 1.0})(group("x"))[0].reward == 0.0
    assert build_rewards({name: 1.0}, ScoringConfig(in_process=(name,)))(group("x"))[0].reward == 1.0
    routed = build_rewards({"answer": 1.0}, ScoringConfig(by_kind={"open": name}))
    assert routed(group("x", kind="open"))[0].reward == 0.0
    for wrong, message in [
        (f"{path}:rewards", "cannot be imported: there is no 'rewards' in .*mine.py"),
        (f"{path}x.py:reward", "there is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_rewards({wrong: 1.0})
    path.write_text("raise SystemExit(1)\n")
    with pytest.raises(ValueError, match="cannot be loaded: SystemExit: 1"):
        build_rewards({name: 1.0})


def test_a_late_reward_has_to_be_named(caplog):
    late = build_rewards({LATE: 1.0}, ScoringConfig(in_process=(LATE,))).begin(group("x"))
    assert late.is_late
    assert late.result()[0].reward == 1.0
    assert build_rewards({LATE: 1.0})(group("x"))[0].failed == (LATE,)
    assert "a late reward cannot leave a worker process; name it in scoring.in_process" in caplog.text
