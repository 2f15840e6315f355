"""The recipe of the shipped warm start, in miniature; and what is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longrl.config import ModelConfig, WarmStartConfig
from longrl.models import load_family
from longrl.warm_start import warm_start

SHIPPED = Path(__file__).parents[2] / "assets/warm_start"
SMALL = {
    "threads": 1,
    "stories": 4,
    "read_steps": 2,
    "read_rows": 8,
    "look_steps": 2,
    "look_windows": 2,
    "watch_steps": 2,
    "watch_stories": 1,
    "log_every": 1,
}


def test_recipe_in_miniature_is_deterministic(tmp_path):
    folders = [warm_start(WarmStartConfig(out=str(tmp_path / name), **SMALL)) for name in ("a", "b")]
    a, b = (load_family(ModelConfig(path=str(folder))).model.state_dict() for folder in folders)
    random = load_family(ModelConfig(path="tiny:qwen2_5_vl")).model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = [name for name in a if not torch.equal(a[name], random[name])]
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_recipe_does_not_overwrite(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        warm_start(WarmStartConfig(out=str(tmp_path), **SMALL))


def test_shipped_warm_start_is_the_recipes_twin():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8e6
    shipped, fresh = (load_family(ModelConfig(path=path)) for path in (str(SHIPPED), "tiny:qwen2_5_vl"))
    assert shipped.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    ours, theirs = shipped.model.config.to_dict(), fresh.model.config.to_dict()
    for part in ("text_config", "vision_config"):
        assert {k: v for k, v in ours[part].items() if k != "dtype"} == {
            k: v for k, v in theirs[part].items() if k != "dtype"
        }
