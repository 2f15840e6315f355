"""Runs whose rewards come from a judge: what reaches the metrics, and that the key reaches nothing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from longrl.config import EvalRunConfig, RlConfig
from longrl.config_files import load_config
from longrl.evals import runner
from longrl.evals.runner import Accuracy, EvalResult, run_eval
from longrl.report.metrics import read_metrics
from longrl.rewards.compose import JudgeLostError
from longrl.rollout import engine as engine_module
from longrl.rollout.native import NativeEngine
from longrl.stopping import Stopped
from longrl.train_rl import train_rl
from longrl.training import Training
from longrl.types import Prefix, Prompt, Rollout
from tests.e2e.conftest import rl_config
from tests.judge_server import Asked, JudgeServer, Reply, numbered, verdict

SECRET = "sk-live-fedcba9876543210"


class Answering(NativeEngine):
    """Responses of random weights have no answer tags; these do."""

    def _decode_in_turns(
        self, prefixes: Sequence[Prefix], prompts: Sequence[Sequence[Prompt]], seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        groups = super()._decode_in_turns(prefixes, prompts, seeds)
        return [[replace(one, text=f"<answer>{one.token_ids[0] % 20}</answer>") for one in group] for group in groups]


class Moody:
    """Even answers are right. Quotes the key in errors, of which there are many."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, asked: Asked) -> Reply:
        self.count += 1
        # but not for what is asked at the start
        if self.count % 3 == 0 and asked.texts["QUESTION"] != "What colour is the ball?":
            body = f'{{"error": "no, {asked.key}"}}'.encode()
            return Reply(status=(500, 400)[self.count % 2], body=body, what="refused")
        number = asked.texts["ANSWER"]
        return Reply(verdict(10 * (number.isdigit() and int(number) % 2 == 0), f"you are {asked.key}"))


def judged(server: JudgeServer, tmp_path: Path, **limits: Any) -> dict[str, Any]:
    model = {"base_url": server.url, "model": "m", "key_env": "A_KEY", "output_usd_per_mtok": 1e6}
    return {
        "rewards": {"judge": 1.0},
        "judge": {"models": {"one": model}, "dir": str(tmp_path / "judge"), "limits": {"backoff_s": 0.01, **limits}},
    }


def test_a_judged_run_learns_its_costs_and_keeps_its_key(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "NativeEngine", Answering)
    monkeypatch.setattr(runner, "NativeEngine", Answering)
    monkeypatch.setenv("A_KEY", SECRET)
    for name in ("longrl", "openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)
    with JudgeServer(Moody()) as server:
        settings = judged(server, tmp_path) | {
            "steps": 3,
            "eval_every_steps": 2,
            "eval": {"samples": 1},
            "checkpoint": {"every_steps": 1},
        }
        model = train_rl(rl_config(dataset, tmp_path, **settings))
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        trained = len(server.asked)
        result = run_eval(
            EvalRunConfig.model_validate(
                {
                    "run_dir": str(tmp_path / "evaluated"),
                    "model": {"path": str(model)},
                    "data": {"eval": str(dataset.test)},
                    "cache": {"dir": str(tmp_path / "cache")},
                    "rollout": {"max_new_tokens": 6},
                    "eval": {"samples": 1},
                    **judged(server, tmp_path),
                }
            )
        )
    assert {one.key for one in server.asked} == {SECRET}

    calls = sum(line.get(name, 0) for line in lines for name in ("judge/requests", "eval/judge/requests"))
    assert calls == trained
    assert result.asked["judge/requests"] == len(server.asked) - trained
    assert all(line["judge/latency_s"] > 0 for line in lines)
    assert sum(line["judge/usd"] for line in lines) > 0
    assert sum(line["reward/unscored"] for line in lines) > 0  # the 400s
    assert all(0 < line["reward/mean"] < 1 for line in lines)
    answered = Counter(tuple(one.texts.values()) for one in server.of("answered"))
    assert [texts for texts, count in answered.items() if count > 1] == [
        ("What colour is the ball?", "red", "It is red.")
    ]
    assert sum(line["judge/from_cache"] for line in lines) > 0

    written = json.loads((tmp_path / "evaluated" / "eval.json").read_text())
    assert written["asked"] == result.asked
    assert SECRET not in caplog.text
    assert "[key]" in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def evaluated(server: JudgeServer, tmp_path: Path, **scoring: Any) -> EvalResult:
    """4 questions, 2 answers each; only accuracy asks the judge, which scores by the question's number."""
    rows = [{"id": i, "question": f"What is {i}?", "answer": "2"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "tiny:qwen2"},
        "data": {"eval": str(tmp_path / "rows.jsonl")},
        "rollout": {"max_new_tokens": 1},
        "eval": {"samples": 2, "temperature": 2.0},
        "scoring": {"by_kind": {"open": "judge"}, **scoring},
        **judged(server, tmp_path),
        **({} if scoring else {"rewards": {"format": 1.0}}),
    }
    return run_eval(EvalRunConfig.model_validate(settings))


def test_accuracy_asks_at_once_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "NativeEngine", Answering)
    monkeypatch.setenv("A_KEY", SECRET)
    with JudgeServer(delay_s=1.0) as server:
        result = evaluated(server, tmp_path)
        assert result.asked["judge/requests"] == len(server.asked) > 4  # one at the start
        assert server.most_at_once == len(server.asked) - 1
    assert result.overall == Accuracy(accuracy=pytest.approx(0.25), num_questions=4)
    assert result.unscored == 0


@pytest.mark.parametrize(("refused", "accuracy"), [("3", 0.2), ("0123", None)])
def test_what_the_judge_cannot_score_counts_neither_way(tmp_path, monkeypatch, caplog, refused, accuracy):
    def judge(asked: Asked) -> Reply:
        return Reply(status=400, body=b"{}") if asked.texts["QUESTION"][-2] in refused else numbered(asked)

    monkeypatch.setattr(runner, "NativeEngine", Answering)
    monkeypatch.setenv("A_KEY", SECRET)
    with JudgeServer(judge) as server:
        result = evaluated(server, tmp_path)
    count = 4 - len(refused)
    assert result.overall == Accuracy(accuracy=accuracy and pytest.approx(accuracy), num_questions=count)
    assert result.unscored == 2 * len(refused)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["unscored"] == result.unscored
    assert f"{result.unscored} responses could not be judged" in caplog.text


def test_an_evaluation_that_loses_the_judge_keeps_what_it_has(tmp_path, monkeypatch):
    def judge(asked: Asked) -> Reply:
        return Reply(status=400, body=b"{}") if asked.texts["QUESTION"][-2] in "23" else numbered(asked)

    monkeypatch.setattr(runner, "NativeEngine", Answering)
    monkeypatch.setenv("A_KEY", SECRET)
    with JudgeServer(judge) as server, pytest.raises(JudgeLostError, match="failed on 4 of its last 8 responses"):
        evaluated(server, tmp_path, max_failures=1)
    written = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (written["unscored"], written["num_questions"]) == (4, 2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"key_env": "NOT_SET"}, "the environment variable NOT_SET is not set"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "Connection error"),
    ],
)
@pytest.mark.parametrize("program", [train_rl, run_eval])
def test_a_run_without_a_judge_does_not_begin(dataset, tmp_path, monkeypatch, program, broken, message):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("A_KEY", SECRET)
    with JudgeServer() as server:
        settings = judged(server, tmp_path, attempts=2)
        settings["judge"]["models"]["one"] |= broken
        config: RlConfig | EvalRunConfig = rl_config(dataset, tmp_path, **settings)
        if program is run_eval:
            shared = config.model_dump(mode="json", include={"run_dir", "model", "data", "cache", "rewards", "judge"})
            config = EvalRunConfig.model_validate(shared)
        with pytest.raises((ValueError, RuntimeError), match=f"judge.models.one: .*{message}"):
            program(config)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()


def test_a_judge_that_is_away_too_long_leaves_a_run_that_is_saved(dataset, tmp_path, monkeypatch):
    """It does not come back in step 3, of 104 responses; step 2 is saved, though no checkpoint is due."""
    away, numbers, update = False, count(), Training.update

    class Distinct(NativeEngine):
        """No verdict on such answers is kept."""

        def _decode_in_turns(self, *args: Any) -> list[list[Rollout]]:
            groups = super()._decode_in_turns(*args)
            return [[replace(one, text=f"<answer>{next(numbers)}</answer>") for one in group] for group in groups]

    def down(asked: Asked) -> Reply:
        return Reply(status=400, body=b"{}") if away else Reply(verdict(int(asked.key == SECRET)))

    def lost(self: Training, step: int, *rest: Any) -> Any:
        nonlocal away
        away = step == 2
        return update(self, step, *rest)

    monkeypatch.setattr(engine_module, "NativeEngine", Distinct)
    monkeypatch.setattr(Training, "update", lost)
    monkeypatch.setenv("A_KEY", SECRET)
    rollout = {"group_size": 26, "max_new_tokens": 1}
    with JudgeServer(down) as server:
        settings = {"steps": 3, "rollout": rollout, **judged(server, tmp_path, breaker_failures=1000)}
        with pytest.raises(Stopped, match=r"failed on 104 of its last 312 .*; stopped after step 2 of 3 and saved"):
            train_rl(rl_config(dataset, tmp_path, **settings))
        assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
        away = False
        train_rl(rl_config(dataset, tmp_path, **settings))
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_judge_may_move_and_change_its_limits_when_a_run_is_taken_up(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "NativeEngine", Answering)
    monkeypatch.setenv("A_KEY", SECRET)
    with JudgeServer() as server:
        train_rl(rl_config(dataset, tmp_path, steps=1, **judged(server, tmp_path)))
    with JudgeServer() as server:
        train_rl(rl_config(dataset, tmp_path, steps=1, **judged(server, tmp_path, concurrency=3)))
        other = judged(server, tmp_path)
        other["judge"]["models"]["one"]["model"] = "another"
        with pytest.raises(ValueError, match=r'judge\.models\.one\.model is "m" there, "another" here'):
            train_rl(rl_config(dataset, tmp_path, steps=1, **other))
    assert load_config([tmp_path / "run" / "config.yaml"]).kind == "rl"
