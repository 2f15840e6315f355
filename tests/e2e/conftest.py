"""A small world of real files: four one-minute videos and their questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrl.config import RlConfig, SftConfig, SyntheticConfig
from longrl.data.synthetic.dataset import Dataset, build_dataset
from tests import in_process


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("videos")
    return build_dataset(
        SyntheticConfig(
            dir=str(folder), train_videos=2, test_videos=1, seconds=60, train_questions=6, test_questions=6, fps=2.0
        )
    )


def common(dataset: Dataset, tmp_path: Path, train: Path) -> dict:
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "tiny:qwen2_5_vl"},
        "data": {"train": str(train), "eval": str(dataset.test), "share_media": 3},
        "cache": {"dir": str(tmp_path / "cache")},
        "prompts_per_step": 4,
        "optim": {"lr": 1e-3},
        "runtime": {"tensorboard": False},
    }


def sft_config(dataset: Dataset, tmp_path: Path, **changes) -> SftConfig:
    return SftConfig.model_validate({**common(dataset, tmp_path, dataset.train_sft), "steps": 3, **changes})


def rl_config(dataset: Dataset, tmp_path: Path, **changes) -> RlConfig:
    rollout = {"group_size": 4, "max_new_tokens": 6}
    rows = common(dataset, tmp_path, dataset.train_rl)
    scoring = in_process(changes.get("rewards", ()))
    return RlConfig.model_validate({**rows, "steps": 3, "rollout": rollout, "scoring": scoring, **changes})
