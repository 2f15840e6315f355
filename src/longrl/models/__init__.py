"""Model families: `load_family` finds the right one by the checkpoint's `model_type`. One line each below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from longrl.config import ModelConfig

if TYPE_CHECKING:
    from longrl.models.family import Family

FAMILIES = {"qwen2_5_vl": "longrl.models.qwen_vl:Qwen25VL"}


def load_family(config: ModelConfig, seed: int = 0) -> Family:
    """Loads a checkpoint folder, or makes the tiny twin for `tiny:FAMILY`.

    Raises:
        ValueError: no such folder, no config.json in it, a model_type that no family handles, weights that are
            missing or unreadable, or no such device.
    """
    import importlib

    import torch

    dtype = getattr(torch, config.dtype)
    if config.path.startswith("tiny:"):
        model_type, path = config.path.removeprefix("tiny:"), None
    else:
        path = Path(config.path)
        try:
            model_type = json.loads((path / "config.json").read_text())["model_type"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"model.path {path}: not a Hugging Face folder (no config.json with a model_type: {error}); "
                "download or export one, or use tiny:FAMILY"
            ) from error
    if model_type not in FAMILIES:
        raise ValueError(
            f"model.path {config.path}: no family for model_type {model_type!r}; known: {', '.join(FAMILIES)}"
        )
    module, name = FAMILIES[model_type].split(":")
    family = getattr(importlib.import_module(module), name)
    loaded = family.tiny(seed, dtype) if path is None else family.load(path, dtype)
    loaded.model.to(_device(config))
    return loaded


def _device(config: ModelConfig) -> str:
    """
    Raises:
        ValueError: it is asked for and not there.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is cuda, but PyTorch finds no GPU; use auto or cpu, or install PyTorch for CUDA")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
