"""Runs of the RL loop whose rollouts vLLM draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrl.config import RlConfig
from longrl.config_files import save_config
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from tests.distributed.test_torchrun import torchrun
from tests.e2e.conftest import dataset as dataset
from tests.e2e.conftest import rl_config

pytestmark = pytest.mark.vllm

BOUND = 1e-3
ROLLOUT = {"engine": "vllm", "group_size": 8, "max_new_tokens": 2}
LEARNING = {
    "steps": 12,
    "prompts_per_step": 8,
    "rollout": ROLLOUT,
    "rewards": {"tests.e2e.rewards:first_token_even": 1.0},
    "optim": {"lr": 5e-3},
    "algo": {"max_logprob_diff": BOUND},
}


def run(config: RlConfig) -> list[dict[str, Any]]:
    train_rl(config)
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")


def texts(tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"what is {i}?", "answer": str(i)}) + "\n" for i in range(8)))
    return {"train": str(rows)}


def check_learned(lines: list[dict[str, Any]]) -> None:
    """Half of all tokens are even: the reward begins near 0.5. Where all are, there is nothing to compare."""
    rewards = [line["reward/mean"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    differences = [line["sampling/logprob_diff"] for line in lines if line["sampling/logprob_diff"] is not None]
    assert differences[0] > 0  # it was not taken from the trainer
    assert max(differences) <= BOUND


@pytest.mark.parametrize("name", ["vila", "qwen2_5_vl", "qwen3_vl"])
def test_the_reward_of_a_video_model_rises(name, dataset, tmp_path):
    check_learned(run(rl_config(dataset, tmp_path, **LEARNING, model={"path": f"tiny:{name}"})))


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 8, "alpha": 64.0}}], ids=["weights", "adapters"])
def test_the_reward_of_a_text_model_rises(changes, dataset, tmp_path):
    given = {"data": texts(tmp_path), "model": {"path": "tiny:qwen2", **changes}}
    check_learned(run(rl_config(dataset, tmp_path, **LEARNING, **given)))


def test_an_engine_of_another_precision_is_corrected_or_stops_the_run(dataset, tmp_path):
    """bfloat16 in vLLM, fp32 in the trainer."""
    rough = {**LEARNING, "steps": 1, "rollout": {**ROLLOUT, "vllm": {"dtype": "bfloat16"}}}
    given = {"data": texts(tmp_path), "model": {"path": "tiny:qwen2"}}
    with pytest.raises(
        RuntimeError, match=r"engine and trainer log-probs differ by .* more than algo.max_logprob_diff"
    ):
        run(rl_config(dataset, tmp_path, **rough, **given))
    for number, settings in enumerate(
        (
            {"correction": "truncate", "correction_high": 1.001},
            {"correction": "mask", "correction_low": 0.97, "correction_high": 1.03, "correction_level": "sequence"},
        )
    ):
        rough["algo"] = {"max_logprob_diff": 1.0, **settings}
        folder = tmp_path / str(number)
        folder.mkdir()
        [line] = run(rl_config(dataset, folder, **rough, **given))
        assert line["sampling/logprob_diff"] > BOUND
        assert 0 < line["correction/bounded"] < 1


def test_what_is_longer_than_its_room_is_left_out(dataset, tmp_path):
    rows = texts(tmp_path)
    with Path(rows["train"]).open("a") as file:
        file.write(json.dumps({"id": "long", "problem": "why? " * 99, "answer": "1"}) + "\n")
    rollout = {**ROLLOUT, "vllm": {"max_model_len": 128}}
    given = {**LEARNING, "steps": 2, "rollout": rollout, "model": {"path": "tiny:qwen2"}}
    lines = run(rl_config(dataset, tmp_path, **given, data=rows | {"on_error": "skip"}))
    assert [line["data/skipped"] for line in lines][-1] == 1


def test_shuffled_and_greedy_rollouts_and_refills_come_from_the_same_engine(dataset, tmp_path):
    for name in ("t_grpo", "remax", "dapo"):
        folder = tmp_path / name
        folder.mkdir()
        settings = {**LEARNING, "steps": 2, "algorithm": name}
        settings["algo"] = {"max_logprob_diff": BOUND, "accuracy": "tests.e2e.rewards:first_token_even"}
        lines = run(rl_config(dataset, folder, **settings))
        assert [line["step"] for line in lines] == [1, 2]
        assert all(line["sampling/logprob_diff"] <= BOUND for line in lines)


@pytest.mark.parametrize("parallel", [{}, {"sp": 2, "shard": True}], ids=["dp 2", "sp 2, sharded"])
def test_two_processes_draw_what_one_does(parallel, dataset, tmp_path, root):
    """An engine each, or one of both, which then has half of the heads and weights on each."""
    settings = {**LEARNING, "steps": 2, "model": {"path": "tiny:qwen2_5_vl"}}
    alone = run(rl_config(dataset, tmp_path, **settings))
    config = rl_config(dataset, tmp_path, **settings, parallel=parallel)
    config = config.model_copy(update={"run_dir": str(tmp_path / "two")})
    save_config(config, tmp_path / "two.yaml")
    done = torchrun(root, "rl", tmp_path / "two.yaml")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for ours, theirs in zip(lines, alone, strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], abs=0.01)  # of 64: the same draws
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)  # its rounding, in fp32
        assert ours["sampling/logprob_diff"] <= BOUND
