"""The training programs on every family: rows of every kind of media that it takes, through the loops to an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longrl.config import ModelConfig, RlConfig, SftConfig
from longrl.export import export_command
from longrl.models import adapters, load_family
from longrl.models.family import Family
from longrl.policy import Policy
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.verify import shared
from tests import in_process
from tests.families.matrix import TAKES, contents, every, is_stock, taking, twin, untied, written

EVEN = {"tests.e2e.rewards:first_token_even": 1.0}
COLUMNS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": "a.png"},
    "several images": {"images": ["a.png", "b.png"]},
    "interleaved": {
        "question": "At first <image> and then <video> and in between <image>: which is 3?",
        "images": ["b.png", "a.png"],
        "video": "video.mp4",
    },
    "video": {"video": "video.mp4"},
    "audio": {"audio": "video.mp4"},
}
"""Kind of prompt -> what a row says of its media, and where they stand."""


def make_config(name: str, files: Path, folder: Path, model: dict[str, Any] | None = None, **changes: Any) -> dict:
    """A row of each kind: all of them in each step."""
    rows = [
        {"id": kind, "question": f"which is {i}?", "answer": "x", "response": f"it is {i}", **columns}
        for i, (kind, columns) in enumerate(COLUMNS.items())
        if kind in TAKES[name]
    ]
    data = files / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": f"tiny:{name}", **(model or {})},
        "data": {"train": str(data)},
        "cache": {"dir": str(files / "cache")},
        "prompts_per_step": max(2, len(rows)),
        "runtime": {"tensorboard": False},
    } | changes


@every
def test_rl(name, files, tmp_path):
    """GRPO: half of all first tokens are even; after 20 steps nearly all are, whatever was shown."""
    require_rl(name, files, tmp_path)


def require_rl(name: str, files: Path, folder: Path, **changes: Any) -> None:
    learning = {"steps": 20, "rewards": EVEN, "scoring": in_process(EVEN), "optim": {"lr": 3e-3}}
    learning |= {"rollout": {"group_size": 16, "max_new_tokens": 1}}
    train_rl(RlConfig.model_validate(make_config(name, files, folder, **learning, **changes)))
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    assert 0.2 < lines[0]["reward/mean"] < 0.8
    assert sum(line["reward/mean"] for line in lines[-3:]) / 3 > 0.9
    assert max(line["sampling/logprob_diff"] for line in lines if line["groups/informative"]) < 1e-5


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> dict[str, Path]:
    """Family -> the folder of its SFT run, made when it is asked for."""

    class Runs(dict):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp(name)
            train_sft(SftConfig.model_validate(make_config(name, files, folder, steps=6, optim={"lr": 1e-3})))
            self[name] = folder / "run"
            return self[name]

    return Runs()


@every
def test_sft(name, trained):
    require_sft(trained[name])


def require_sft(run: Path) -> None:
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


@taking("video with its sound")
def test_sound(name, files, tmp_path):
    """Of a run's videos, all or none are heard: the same once more, with theirs."""
    heard = {"video": {"with_audio": True}}
    run = make_config(name, files, tmp_path / "sft", steps=6, optim={"lr": 1e-3}, **heard)
    train_sft(SftConfig.model_validate(run))
    require_sft(tmp_path / "sft" / "run")
    require_rl(name, files, tmp_path / "rl", **heard)


@every
def test_export(name, trained, tmp_path):
    """What an SFT run leaves is read and written again, key for key and bit for bit; transformers' own class makes the
    same logits of it."""
    require_export(trained[name], tmp_path)


def require_export(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    export_command(run, None, tmp_path / "out")
    family = load_family(ModelConfig(path=str(tmp_path / "out")))
    family.save(tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors"))
    assert files
    for file in files:
        first, second = (load_file(tmp_path / folder / file) for folder in ("out", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    text = "what comes first?"
    ids = torch.tensor([family.tokenizer(text)["input_ids"]])
    if is_stock(family):
        kind: Any = type(family.model)
        family.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            theirs = kind.from_pretrained(tmp_path / "out")(input_ids=ids).logits
            assert torch.equal(theirs, family.model(input_ids=ids).logits)
    return {key: x for file in files for key, x in load_file(tmp_path / "out" / file).items()}


@every
def test_lora(name, files, tmp_path):
    """Adapters learn, nothing else does; the merged export computes what base and adapters do (fp32: 1e-5)."""
    require_lora(name, {}, twin(name, torch.float32), files, tmp_path)


def require_lora(name: str, model: dict[str, Any], base: Family, files: Path, tmp_path: Path) -> None:
    """model: what says that it is base."""
    model = model | {"lora": {"rank": 4, "alpha": 16}}
    run = make_config(name, files, tmp_path, model, steps=4, optim={"lr": 1e-2})
    saved = train_sft(SftConfig.model_validate(run))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", adapters.WEIGHTS]
    export_command(tmp_path / "run", None, tmp_path / "out", merge_lora=True)
    case = written(twin(name, torch.float32), contents(files)[TAKES[name][-1]])
    loaded = [load_family(ModelConfig(path=str(path))) for path in (saved, tmp_path / "out")]
    pair, merged, base = (shared(Policy(one), case).logprobs for one in (*loaded, base))
    assert (pair - merged).abs().max() < 1e-5
    assert (pair - base).abs().max() > 1e-3


def test_a_head_of_its_own(files, tmp_path):
    """Is trained, exported, and left as it is by adapters: of all twins, head and embeddings are the same weights."""
    name, model = "qwen2_5_vl", {"path": str(untied("qwen2_5_vl", tmp_path / "model"))}
    before = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    train_sft(SftConfig.model_validate(make_config(name, files, tmp_path / "sft", model, steps=2)))
    after = require_export(tmp_path / "sft" / "run", tmp_path)
    assert not torch.equal(after["lm_head.weight"], before)
    base = load_family(ModelConfig(path=model["path"]))
    require_lora(name, model, base, files, tmp_path / "lora")
    assert torch.equal(load_file(tmp_path / "lora" / "out" / "model.safetensors")["lm_head.weight"], before)
