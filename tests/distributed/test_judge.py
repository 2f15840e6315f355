"""Ranks that share a prompt share its verdicts: one asks, all know. Ranks with prompts of their own lose it alike."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
import torch

from longrl.config import RlConfig
from longrl.parallel.processes import in_processes
from longrl.parallel.ranks import Ranks, make_ranks
from longrl.parallel.sequence import SequenceGroup
from longrl.report.metrics import read_metrics
from longrl.rewards import build_rewards
from longrl.rollout import engine as engine_module
from longrl.rollout.native import NativeEngine
from longrl.scoring import Scoring
from longrl.stopping import Stopped
from longrl.totals import Totals
from longrl.train_rl import train_rl
from longrl.types import Example, Group, Message, Prefix, Prompt, Rollout
from tests.judge_server import Asked, JudgeServer, Reply, score_of, verdict

pytestmark = pytest.mark.distributed


def group(number: int) -> Group:
    prompt = Prompt(
        token_ids=torch.tensor([1]), position_ids=torch.zeros(1, 1, dtype=torch.int64), media=(), media_slots=()
    )
    asked = Message(role="user", content=(f"What is {number}?",))
    example = Example(id=f"q{number}", messages=(asked,), answer="a cat", kind="open")
    rollouts = tuple(
        Rollout(
            token_ids=(1,), logprobs=(-0.1,), text=f"<answer>{said}</answer>", finish_reason="stop", policy_version=0
        )
        for said in ("a cat", "")
    )
    return Group(id=example.id, example=example, prompt=prompt, rollouts=rollouts)


def judge(sp: SequenceGroup | None, url: str, folder: str) -> list[tuple[float | None, float]]:
    config = RlConfig.model_validate(
        {
            "run_dir": folder,
            "model": {"path": "tiny:qwen2"},
            "data": {"train": "rows.jsonl"},
            "steps": 1,
            "rewards": {"judge": 1.0},
            "judge": {"models": {"one": {"base_url": url, "model": "m", "key_env": None}}, "dir": folder},
        }
    )
    rewards = build_rewards(config.rewards, judge=config.judge)
    score = Scoring(rewards, config, Ranks(sp=sp), Totals(), lambda _: nullcontext())
    cohorts = [([group(number)], Prefix([], [], 0, 0)) for number in range(3)]
    return [(one.reward, one.advantage) for _, scored, _ in score(cohorts) for part in scored for one in part]


def test_one_rank_asks_and_all_know(tmp_path):
    with JudgeServer() as server:
        alone = judge(None, server.url, str(tmp_path / "alone"))
        assert len(server.asked) == 3
        first, second = in_processes(2, judge, server.url, str(tmp_path / "two"))
        assert len(server.asked) == 6
    assert [reward for reward, _ in alone[::2]] == [score_of(number) / 10 for number in range(3)]
    assert first == second == alone


class Distinct(NativeEngine):
    """Answers that no rank has given before: no verdict on them is kept."""

    rank = 0
    number = count()

    def _decode_in_turns(self, *args: Any) -> list[list[Rollout]]:
        groups = super()._decode_in_turns(*args)
        return [
            [replace(one, text=f"<answer>{self.rank} {next(self.number)}</answer>") for one in group]
            for group in groups
        ]


def train(sp: SequenceGroup | None, settings: dict[str, Any]) -> str:
    """What this of two dp ranks says as it ends."""
    assert sp is not None
    Distinct.rank = sp.rank
    engine_module.NativeEngine = Distinct
    try:
        train_rl(RlConfig.model_validate(settings), make_ranks(2, 1, timedelta(minutes=15)))
    except Stopped as stopped:
        return str(stopped)
    return "done"


def test_all_ranks_stop_saved_where_one_has_lost_the_judge(tmp_path):
    """From step 2 on it fails on one of two questions, which one of two ranks puts. Then it is back."""
    metrics, back = tmp_path / "run" / "metrics.jsonl", False

    def judge(asked: Asked) -> Reply:
        if not back and metrics.exists() and metrics.stat().st_size and "is 2?" in asked.texts["QUESTION"]:
            return Reply(status=400, body=b"{}")
        return Reply(verdict(score_of(ord(asked.texts["ANSWER"][-1]))))

    rows = [{"id": i, "question": f"What is {i}?", "answer": "3", "kind": "open"} for i in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with JudgeServer(judge) as server:
        settings = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": "tiny:qwen2"},
            "data": {"train": str(tmp_path / "rows.jsonl")},
            "steps": 3,
            "prompts_per_step": 2,
            "rollout": {"group_size": 2, "max_new_tokens": 2},
            "rewards": {"judge": 1.0},
            "scoring": {"max_failures": 1},
            "judge": {
                "models": {"one": {"base_url": server.url, "model": "m", "key_env": None}},
                "dir": str(tmp_path / "judge"),
            },
        }
        first, second = in_processes(2, train, settings)
        assert first == second
        assert "failed on 2 of its last" in first
        assert "stopped after step 1 of 3 and saved" in first
        assert [line["step"] for line in read_metrics(metrics)] == [1]
        back = True
        assert in_processes(2, train, settings) == ["done", "done"]
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2, 3]
