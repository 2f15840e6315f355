"""Rollouts by a real vLLM server process: on-policy and a step ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longrl.config import RlConfig
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from tests.e2e.conftest import dataset as dataset
from tests.e2e.conftest import rl_config
from tests.rollout_server import ServerProcess
from tests.vllm.test_training import BOUND, LEARNING, ROLLOUT

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 8, "alpha": 64.0}}], ids=["weights", "adapters"])
def test_a_vllm_server_draws_what_vllm_in_the_process_draws_and_the_reward_rises_a_step_ahead(
    changes, dataset, tmp_path
):
    def config(name: str, url: str | None = None, rollout: dict[str, Any] = {}, **more: Any) -> RlConfig:  # noqa: B006
        server = {} if url is None else {"server": {"urls": [url]}}
        settings = {
            **LEARNING,
            "model": {"path": "tiny:qwen2_5_vl", **changes},
            "run_dir": str(tmp_path / name),
            **more,
        }
        return rl_config(dataset, tmp_path, **{**settings, "rollout": {**ROLLOUT, **rollout, **server}})

    def lines(one: RlConfig) -> list[dict[str, Any]]:
        train_rl(one)
        return read_metrics(Path(one.run_dir) / "metrics.jsonl")

    with ServerProcess(config("server"), tmp_path / "server-files") as server:
        ours, theirs = lines(config("served", server.url, steps=2)), lines(config("alone", steps=2))
        for line, other in zip(ours, theirs, strict=True):
            assert line["reward/mean"] == pytest.approx(other["reward/mean"], abs=0.01)  # of 64: the same draws
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)  # its rounding, in fp32
            assert 0 < line["sampling/logprob_diff"] <= BOUND
        ahead = lines(config("ahead", server.url, {"max_staleness": 1}, algo={"correction": "truncate"}))
    assert ahead[0]["sampling/logprob_diff"] <= BOUND
    assert max(line.get("sampling/stale_logprob_diff", 0.0) for line in ahead) > BOUND
    rewards = [line["reward/mean"] for line in ahead]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
