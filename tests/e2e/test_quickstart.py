"""`longrl quickstart` in miniature: all stages, the summary, the report, a second run, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from longrl.report.metrics import read_metrics

ROOT = Path(__file__).parents[2]
KEYS = {
    "video_seconds_max",
    "frames_per_video",
    "prompt_tokens",
    "questions",
    "accuracy_base",
    "accuracy_sft",
    "accuracy_rl",
    "rl_steps",
    "cache_hit_rate",
    "wall_s",
    "peak_rss_bytes",
    "logprob_diff_max",
    "controls",
    "seed",
}
"""Promised by the README."""
STAGES = ("base", "sft", "sft_careful", "rl", "rl_no_video", "rl_shuffled")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Videos and embeddings, made by the first test that needs them."""
    return tmp_path_factory.mktemp("shared")


def small(shared: Path, run: Path, **changes: object) -> list[str]:
    """The shipped configuration, shrunk to one-minute videos, few steps and the random twin."""
    settings = {
        "run_dir": run,
        "videos.dir": shared / "videos",
        "videos.seconds": 60,
        "videos.train_videos": 1,
        "videos.test_videos": 1,
        "videos.train_questions": 8,
        "videos.test_questions": 8,
        "cache.dir": shared / "cache",
        "model.path": "tiny:qwen2_5_vl",
        "rollout.max_new_tokens": 8,
        "sft.steps": 1,
        "sft.optim.warmup_steps": 0,
        "rl.steps": 1,
        "rl.optim.warmup_steps": 0,
        **changes,
    }
    return [str(ROOT / "configs/tiny/quickstart.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "longrl", "quickstart", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(arguments: list[str]) -> tuple[int, str, str]:
    with start(arguments) as process:
        out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_quickstart(shared, tmp_path):
    run = tmp_path / "run"
    status, shown, errors = finish(small(shared, run))
    assert status == 0, errors
    summary = summary_of(run)
    assert summary.keys() >= KEYS
    # one-minute videos are at most 5% longer, and sampled once a second
    assert 60 <= summary["video_seconds_max"] <= 63.5
    assert summary["video_seconds_max"] - 1 <= summary["frames_per_video"] <= summary["video_seconds_max"] + 1
    assert summary["prompt_tokens"] > 30
    assert 0 < summary["questions"] <= summary["questions_total"] == 8
    assert summary["logprob_diff_max"] is None or summary["logprob_diff_max"] < 1e-5
    parts = {name: seconds for name, seconds in summary["wall_s"].items() if name != "total"}
    assert parts.keys() == {"videos", "embeddings", "evaluation", "sft", "rl"}
    assert summary["wall_s"]["total"] >= sum(parts.values())
    report = (run / "report.html").read_text()
    assert "<html" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    for stage in STAGES:
        result = json.loads((run / f"eval/{stage}.json").read_text())
        assert (result["num_questions"], result["skipped"]) == (8, {})
    assert yaml.safe_load((run / "config.yaml").read_text())["sft"]["steps"] == 1
    # the random twin learns nothing in two steps, and the run says so
    assert [line.split()[-2:] for line in shown.splitlines() if line.startswith("Accuracy after RL")] == [
        ["NOT", "HELD"]
    ]

    (run / "mine.txt").write_text("a file of the user's")
    status, _, errors = finish(small(shared, run, **{"rl.steps": 2}))
    assert (status, summary_of(run)) == (2, summary)  # another configuration: refused, and nothing was removed
    assert "holds a run with another configuration" in errors

    status, _, errors = finish(small(shared, run))
    assert status == 0, errors
    again = summary_of(run)
    assert again["cache_hit_rate"] == 1.0
    assert all(again[key] == summary[key] for key in ("accuracy_base", "accuracy_sft", "accuracy_rl", "controls"))
    assert (run / "mine.txt").read_text() == "a file of the user's"


def test_interrupted_in_the_rl_stage_and_taken_up(shared, tmp_path):
    run, steps = tmp_path / "run", 25
    arguments = small(shared, run, **{"rl.steps": steps, "rl.prompts_per_step": 4, "rl.checkpoint.every_steps": 1})
    with start(arguments) as process:
        while not list((run / "rl" / "checkpoints").glob("step_*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "longrl: interrupted"
    done = len(read_metrics(run / "rl" / "metrics.jsonl"))
    assert 0 < done < steps
    assert not (run / "summary.json").exists()
    before = json.loads((run / "usage.json").read_text())["wall_s"]

    status, _, errors = finish(arguments)
    assert status == 0, errors
    assert [line["step"] for line in read_metrics(run / "rl" / "metrics.jsonl")] == list(range(1, steps + 1))
    assert "sft 1/1" not in errors  # what was done is not done again
    after = summary_of(run)["wall_s"]
    assert all(after[part] > before[part] for part in before)
    assert after["total"] >= before["total"] + after["rl"] - before["rl"]
