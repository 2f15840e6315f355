"""Runs that train adapters: they learn, resume exactly, and leave what longrl, peft and transformers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from longrl.config import ModelConfig
from longrl.models import adapters, load_family
from longrl.parallel import tensor_files
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from tests.e2e import rewards
from tests.e2e.conftest import rl_config, sft_config
from tests.e2e.test_training import EVEN, INTERRUPTED, same_bits

MODEL = {"path": "tiny:qwen2_5_vl", "lora": {"rank": 16, "alpha": 32}}


def test_rl_raises_the_reward(dataset, tmp_path):
    """As the run of all weights in test_training does, in 15 steps of as many rollouts."""
    config = rl_config(
        dataset,
        tmp_path,
        model=MODEL,
        steps=15,
        prompts_per_step=8,
        rewards=EVEN,
        optim={"lr": 1e-2},
        rollout={"group_size": 16, "max_new_tokens": 1},
    )
    train_rl(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0.3 < lines[0]["reward/mean"] < 0.7
    assert sum(line["reward/mean"] for line in lines[-3:]) / 3 > 0.9
    assert max(line["sampling/logprob_diff"] for line in lines if line["groups/informative"]) < 1e-5


def test_resume_is_bit_identical(dataset, tmp_path):
    """Ctrl-C in the middle of step 4 of 5, checkpoints every 2 steps, the reference being the base."""
    common = {
        "model": MODEL,
        "steps": 5,
        "checkpoint": {"every_steps": 2},
        "algo": {"kl": "k3", "kl_coef": 0.1},
        "rewards": INTERRUPTED,
    }
    rewards.calls["until_interrupt"] = -1
    whole = train_rl(rl_config(dataset, tmp_path, **common, run_dir=str(tmp_path / "whole")))
    config = rl_config(dataset, tmp_path, **common)
    rewards.calls["until_interrupt"] = 3 * 16 + 5
    with pytest.raises(KeyboardInterrupt):
        train_rl(config)
    resumed = train_rl(config)
    assert same_bits(*(load_file(folder / adapters.WEIGHTS) for folder in (whole, resumed)))
    assert same_bits(*(tensor_files.read(folder / "../trainer") for folder in (whole, resumed)))
    kl = [[line["kl"] for line in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("run", "whole")]
    assert kl[0] == kl[1]
    assert kl[0][0] == 0  # B is zero: the policy is the reference
    assert kl[0][-1] > 0


def test_resume_is_bit_identical_in_bfloat16(dataset, tmp_path):
    """A bfloat16 base, passes in bfloat16, fp32 adapters and optimizer state."""
    common = {"model": {**MODEL, "dtype": "bfloat16", "compute_dtype": "bfloat16"}, "optim": {"lr": 1e-2}, "steps": 6}
    whole = train_sft(sft_config(dataset, tmp_path, **common, run_dir=str(tmp_path / "whole")))
    config = sft_config(dataset, tmp_path, **common, checkpoint={"every_steps": 3, "keep": 9})
    train_sft(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000006")
    resumed = train_sft(config)
    assert same_bits(*(load_file(folder / adapters.WEIGHTS) for folder in (whole, resumed)))
    assert same_bits(*(tensor_files.read(folder / "../trainer") for folder in (whole, resumed)))
    assert {x.dtype for x in load_file(whole / adapters.WEIGHTS).values()} == {torch.float32}
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> tuple[Path, Path]:
    """A run of adapters on a base on disk, and the base."""
    folder = tmp_path_factory.mktemp("lora")
    base = train_sft(sft_config(dataset, folder, steps=1, run_dir=str(folder / "base")))
    train_sft(sft_config(dataset, folder, steps=3, model={**MODEL, "path": str(base)}, optim={"lr": 1e-2}))
    return folder / "run", base


def test_a_checkpoint_holds_adapters_alone_and_points_to_the_base(trained):
    run, base = trained
    [last] = (run / "checkpoints").iterdir()
    assert sorted(path.name for path in (last / "model").iterdir()) == ["adapter_config.json", adapters.WEIGHTS]
    assert json.loads((last / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    # of every adapter the weight, and two moments and a count
    weights = load_file(last / "model" / adapters.WEIGHTS)
    assert len(tensor_files.read(last / "trainer")) == 3 * len(weights)


def test_an_export_loads_in_transformers_with_the_logits_of_base_and_adapters(trained, tmp_path, longrl):
    run, _ = trained
    said = longrl("export", run, "--out", tmp_path / "out", "--merge-lora")
    assert said.returncode == 0, said.stderr
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    [adapter] = run.glob("checkpoints/*/model")
    ours = {
        name: load_family(ModelConfig(path=str(path)))
        for name, path in {"pair": adapter, "one": tmp_path / "out"}.items()
    }
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("what comes first?", return_tensors="pt").input_ids
    logits = {}
    with torch.no_grad():
        for name, family in ours.items():
            family.model.set_attn_implementation("sdpa")
            logits[name] = family.model(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, logits["one"])
    # one matrix for the sum of two products, in fp32
    assert (logits["one"] - logits["pair"]).abs().max() < 1e-4 * logits["pair"].abs().max()
    said = longrl("export", run, "--out", tmp_path / "adapter")
    assert said.returncode == 0, said.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }


def test_adapters_whose_base_is_gone_are_not_merged(trained, tmp_path, longrl):
    run, base = trained
    base.rename(tmp_path / "elsewhere")
    said = longrl("export", run, "--merge-lora")
    (tmp_path / "elsewhere").rename(base)
    assert said.returncode == 2
    assert f"holds adapters of {base}, which is not there; put the base back, or correct" in said.stderr
    assert not list((run / "export").iterdir())


def test_adapters_are_evaluated_and_asked_but_trained_no_further(trained, dataset, tmp_path, longrl):
    run, _ = trained
    [adapter] = run.glob("checkpoints/*/model")
    rows = tmp_path / "eval.yaml"
    config = {
        "kind": "eval",
        "run_dir": str(tmp_path / "eval"),
        "model": {"path": str(adapter)},
        "data": {"eval": str(dataset.test)},
        "cache": {"dir": str(tmp_path / "cache")},
        "rollout": {"max_new_tokens": 4},
        "eval": {"samples": 1},
    }
    rows.write_text(json.dumps(config))
    said = longrl("eval", rows)
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["num_questions"] == 6
    said = longrl("generate", "--prompt", "who?", "--model", adapter, "--max-new-tokens", "3")
    assert said.returncode == 0, said.stderr
    with pytest.raises(ValueError, match=r"holds adapters of .*longrl export RUN --merge-lora --out DIR"):
        train_sft(sft_config(dataset, tmp_path, model={"path": str(adapter)}))
    said = longrl("eval", rows, "model.lora={rank: 4}")
    assert said.returncode == 2
    assert "model: lora and train say how a model is trained" in said.stderr
