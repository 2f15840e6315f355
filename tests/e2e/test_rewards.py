"""Rewards in a training run: what breaks in a worker is as if it had said that it cannot score."""

from __future__ import annotations

import pytest

from longrl.check import check_command
from longrl.report.metrics import read_metrics
from longrl.rewards.compose import REWARDS
from longrl.scoring_config import REWARD_NAMES
from longrl.train_rl import train_rl
from tests.e2e.conftest import rl_config
from tests.e2e.test_training import same_bits, weights


def test_rows_that_break_their_worker_are_trained_on_as_rows_without_a_reward(dataset, tmp_path):
    """Hangs, crashes, floods of print and NaN, of about half of 16 rollouts, against a reward that says None there."""
    folders = {}
    for name in ("by_token", "none_by_token"):
        config = rl_config(
            dataset,
            tmp_path,
            run_dir=str(tmp_path / name),
            steps=1,
            prompts_per_step=2,
            rewards={f"tests.unit.naughty:{name}": 1.0},
            scoring={"timeout_s": 1.0},
            rollout={"group_size": 8, "max_new_tokens": 2},
        )
        folders[name] = weights(train_rl(config))
    assert same_bits(folders["by_token"], folders["none_by_token"])
    [broken], [unsaid] = (read_metrics(tmp_path / name / "metrics.jsonl") for name in folders)
    assert 0 < broken["reward/failed"] == broken["reward/unscored"] == unsaid["reward/unscored"] < 1
    assert unsaid["reward/failed"] == 0
    assert broken["reward/mean"] == unsaid["reward/mean"]
    assert broken["groups/informative"] > 0


def test_a_run_whose_reward_always_fails_stops(dataset, tmp_path):
    config = rl_config(
        dataset, tmp_path, rewards={"tests.unit.naughty:not_a_number": 1.0}, scoring={"max_failures": 12}
    )
    with pytest.raises(RuntimeError, match=r"has failed on 13 of its last 13 responses"):
        train_rl(config)


def test_a_reward_that_is_missing_stops_the_run_before_a_model_is_loaded(dataset, tmp_path):
    config = rl_config(dataset, tmp_path, rewards={"mine.py:reward": 1.0}, model={"path": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"reward 'mine\.py:reward' cannot be imported: there is no file"):
        train_rl(config)


def test_check_looks_rewards_up_without_importing_them(dataset, tmp_path, capsys):
    assert set(REWARD_NAMES) == {*REWARDS, "answer", "judge"}
    (tmp_path / "mine.py").write_text("1 / 0\nreward = None\n")
    there = {"format": 0.1, "answer": 0.9, f"{tmp_path}/mine.py:reward": 0.0, "tests.e2e.rewards:first_token_even": 1.0}
    check_command(rl_config(dataset, tmp_path, rewards=there))
    assert "format, weight 0.1\n" in capsys.readouterr().out
    for name, message in [
        ("anwser", "unknown reward 'anwser': .* did you mean 'answer'"),
        ("mine.py:reward", r"reward 'mine\.py:reward' cannot be imported: there is no file /"),
        (
            "nowhere.rewards:one",
            r"reward 'nowhere\.rewards:one' cannot be imported: there is no module 'nowhere\.rewards'",
        ),
    ]:
        with pytest.raises(ValueError, match=f"the run cannot start: {message}"):
            check_command(rl_config(dataset, tmp_path, rewards={name: 1.0}))
