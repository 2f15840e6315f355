"""`longrl quickstart` in miniature, through the command line: all stages, the summary, the report, a second run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
KEYS = {
    "video_seconds_max",
    "frames_per_video",
    "prompt_tokens",
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


def small(tmp_path: Path) -> list[str]:
    """The shipped configuration, shrunk to one-minute videos, single steps and the random twin."""
    return [
        str(ROOT / "configs/tiny/quickstart.yaml"),
        f"run_dir={tmp_path}/run",
        f"videos.dir={tmp_path}/videos",
        "videos.seconds=60",
        "videos.train_videos=1",
        "videos.test_videos=1",
        "videos.train_questions=8",
        "videos.test_questions=8",
        f"sft.cache.dir={tmp_path}/cache",
        f"rl.cache.dir={tmp_path}/cache",
        "sft.model.path=tiny:qwen2_5_vl",
        "sft.steps=1",
        "rl.steps=1",
        "rl.rollout.max_new_tokens=8",
    ]


def longrl(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longrl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def test_quickstart(tmp_path):
    first = longrl("quickstart", *small(tmp_path))
    assert first.returncode == 0, first.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary.keys() >= KEYS
    assert summary["frames_per_video"] >= 60 and summary["prompt_tokens"] > 30
    assert summary["logprob_diff_max"] < 1e-5
    assert summary["wall_s"]["total"] >= sum(v for k, v in summary["wall_s"].items() if k != "total") - 1
    report = (tmp_path / "run/report.html").read_text()
    assert "<html" in report and "http://" not in report.replace("http://www.w3.org", "")
    for stage in ("base", "sft", "sft_careful", "rl", "rl_no_video", "rl_shuffled"):
        assert json.loads((tmp_path / f"run/eval/{stage}.json").read_text())["num_questions"] == 8
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["sft"]["steps"] == 1

    again = longrl("quickstart", *small(tmp_path))
    assert again.returncode == 0, again.stderr
    second = json.loads((tmp_path / "run/summary.json").read_text())
    assert second["cache_hit_rate"] == 1.0
    assert all(second[key] == summary[key] for key in ("accuracy_base", "accuracy_sft", "accuracy_rl", "controls"))
