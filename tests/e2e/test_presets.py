"""Every preset on real files and the tiny twin: two updates a batch, clipped where it clips, and the reward rises."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrl.algo_config import PRESETS
from longrl.config import EvalRunConfig
from longrl.data.examples import Skips, load_examples
from longrl.data.synthetic.dataset import Dataset
from longrl.evals.runner import run_eval
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from longrl.training import Training
from tests import LONG, in_process
from tests.e2e.conftest import rl_config

EVEN = "tests.e2e.rewards:first_token_even"
PACE = {"remax": (2e-3, 8)}
"""Learning rate and steps, if not 4e-3 and 6. One greedy response decides the sign of a group: slower is steadier."""
SAMPLES = 64


def share_of_even(model: str, dataset: Dataset, folder: Path) -> float:
    """Of first tokens of 64 rollouts of each of the twelve questions: standard error 0.018, of a difference 0.026."""
    config = EvalRunConfig.model_validate(
        {
            "run_dir": str(folder / "eval"),
            "model": {"path": model},
            "data": {"eval": str(dataset.train_rl), "share_media": 3},
            "cache": {"dir": str(folder / "cache")},
            "rewards": {EVEN: 1.0},
            "scoring": in_process([EVEN]),
            "rollout": {"max_new_tokens": 1},
            "eval": {"samples": SAMPLES},
        }
    )
    found = [response["reward"] for one in run_eval(config).examples for response in one["responses"]]
    assert len(found) == 12 * SAMPLES
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def before(dataset, tmp_path_factory) -> float:
    return share_of_even("tiny:qwen2_5_vl", dataset, tmp_path_factory.mktemp("before"))


@pytest.mark.parametrize("name", PRESETS if LONG else ["cispo", "dapo", "gspo", "remax", "t_grpo"])
def test_it_learns(name, dataset, tmp_path, before):
    """The gain is four standard errors or more. With rewards drawn at random the presets gained -0.065 to +0.064; with
    these 0.17 to 0.49."""
    lr, steps = PACE.get(name, (4e-3, 6))
    config = rl_config(
        dataset,
        tmp_path,
        steps=steps,
        algorithm=name,
        algo={"updates_per_batch": 2, "accuracy": EVEN},
        rewards={EVEN: 1.0},
        optim={"lr": lr},
        rollout={"group_size": 12, "max_new_tokens": 2},
    )
    model = train_rl(config)
    assert 0.4 < before < 0.6
    assert share_of_even(str(model), dataset, tmp_path) > before + 0.1
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [line for line in lines if line["loss"] is not None and line["groups/informative"]]
    assert max(line["clip/low"] + line["clip/high"] for line in trained) > 0
    assert max(line["sampling/logprob_diff"] for line in trained) < 1e-5


class StopError(Exception):
    """Ends a run as a crash would."""


@pytest.mark.parametrize("name", ["dapo", "t_grpo"])
def test_resume_is_bit_identical(name, dataset, tmp_path, monkeypatch):
    """Which examples are drawn in refills, and how frames are shuffled, are functions of the step alone."""
    common = {
        "steps": 3,
        "algorithm": name,
        "algo": {"accuracy": EVEN, "kl_coef": 0.01},
        "rewards": {EVEN: 1.0},
        "rollout": {"group_size": 2, "max_new_tokens": 2},  # so that half the groups are alike
        "checkpoint": {"every_steps": 1},
    }
    whole = train_rl(rl_config(dataset, tmp_path, **common, run_dir=str(tmp_path / "whole")))
    config, draw = rl_config(dataset, tmp_path, **common), Training.draw

    def stops(self, examples, step):
        if step == 3:
            raise StopError
        return draw(self, examples, step)

    monkeypatch.setattr(Training, "draw", stops)
    with pytest.raises(StopError):
        train_rl(config)
    monkeypatch.setattr(Training, "draw", draw)
    resumed = train_rl(config)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    kept = [line.get("groups/kept", 1.0) for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert (min(kept) < 1) == (name == "dapo")


def test_refills_draw_what_the_step_has_not(dataset, tmp_path):
    """All other examples, each once, in an order of the step's own; None when there are no more."""
    config = rl_config(dataset, tmp_path, algorithm="dapo", rewards={EVEN: 1.0})
    skips = Skips(config.data)
    training = Training(config, skips)
    examples = load_examples(dataset.train_rl, config.data, config.video, skips)
    orders = []
    for step in (1, 2):
        taken = training.draw(examples, step).ids
        more = [training.refill(examples, step, start, 3) for start in range(0, 12, 3)]
        ids = [one for batch in more if batch for one in batch.ids]
        assert sorted(taken + ids) == sorted(example.id for example in examples)
        assert more[-1] is None
        assert ids == [one for start in (0, 3, 6) for one in training.refill(examples, step, start, 3).ids]  # pyright: ignore
        orders.append(ids)
    assert orders[0] != orders[1]
