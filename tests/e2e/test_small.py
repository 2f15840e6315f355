"""Image and text RL through the same programs as video, on the small sets and the tiny twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from longrl.config import RlConfig, SftConfig
from longrl.config_files import load_config
from longrl.data.synthetic.small import make_small
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from tests import in_process

EVEN = {"tests.e2e.rewards:first_token_even": 1.0, "answer": 0.0}
PARITY = {"tests.e2e.rewards:parity_of_answer": 1.0}
MODELS = {"arithmetic": "tiny:qwen2", "counting": "tiny:qwen2_5_vl"}


@pytest.fixture(scope="module", params=MODELS)
def task(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    return request.param, make_small(request.param, tmp_path_factory.mktemp(request.param), train=16, test=4)


def common(task: tuple[str, dict[str, Path]], split: str, tmp_path: Path) -> dict:
    name, files = task
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": MODELS[name]},
        "data": {"train": str(files[split]), "eval": str(files["test"])},
        "cache": {"dir": str(tmp_path / "cache")},
        "prompts_per_step": 4,
        "runtime": {"tensorboard": False},
    }


def test_rl_raises_the_reward(task, tmp_path):
    config = RlConfig.model_validate(
        common(task, "train_rl", tmp_path)
        | {"steps": 14, "rewards": EVEN, "optim": {"lr": 3e-3}, "eval_every_steps": 14, "eval": {"samples": 1}}
        | {"rollout": {"group_size": 16, "max_new_tokens": 1}, "scoring": in_process(EVEN)}
    )
    train_rl(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0.2 < lines[0]["reward/mean"] < 0.8
    assert sum(line["reward/mean"] for line in lines[-3:]) / 3 > 0.9
    assert max(line["sampling/logprob_diff"] for line in lines if line["groups/informative"]) < 1e-5
    assert lines[-1]["eval/accuracy"] == 0.0  # one token is no answer: every question was asked and scored


def test_rl_learns_to_look(tmp_path):
    """Two pictures, one question, an even and an odd answer: who looks can always be right, who does not (the control,
    the same run on black pictures) half of the time."""
    files = make_small("counting", tmp_path / "set", train=16, test=4)
    rows = [json.loads(line) for line in files["train_rl"].read_text().splitlines()]
    even, odd = ([row for row in rows if int(row["answer"]) % 2 == rest] for rest in (0, 1))
    pair = next((a, b) for a in even for b in odd if a["question"] == b["question"])
    files["train_rl"].write_text("".join(json.dumps(row) + "\n" for row in pair))

    def reward(name: str) -> float:
        asked = common(("counting", files), "train_rl", tmp_path / name) | {"prompts_per_step": 2, "steps": 24}
        learning = {"rewards": PARITY, "scoring": in_process(PARITY), "optim": {"lr": 3e-3}}
        learning |= {"rollout": {"group_size": 16, "max_new_tokens": 1}}
        train_rl(RlConfig.model_validate(asked | learning))
        lines = read_metrics(tmp_path / name / "run" / "metrics.jsonl")
        return sum(line["reward/mean"] for line in lines[-3:]) / 3

    assert reward("seen") > 0.9
    for row in pair:
        Image.new("RGB", (84, 84)).save(tmp_path / "set" / row["image"])
    assert reward("blank") < 0.65


def test_sft_lowers_the_loss(task, tmp_path):
    train_sft(SftConfig.model_validate(common(task, "train_sft", tmp_path) | {"steps": 8, "optim": {"lr": 1e-3}}))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["text", "image"])
def test_shipped_configurations_go_together(root, name):
    sft, rl = (load_config([root / "configs" / "tiny" / f"{name}_{kind}.yaml"]) for kind in ("sft", "rl"))
    assert isinstance(sft, SftConfig)
    assert isinstance(rl, RlConfig)
    assert rl.model.path == f"{sft.run_dir}/checkpoints/step_{sft.steps:06d}/model"
    folders = {Path(path).parent for path in (sft.data.train, rl.data.train, rl.data.eval) if path}
    text = (root / "configs" / "tiny" / f"{name}_rl.yaml").read_text()
    assert [f"--out {folder.as_posix()}" in text for folder in folders] == [True]
