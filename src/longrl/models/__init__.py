"""Model families: `load_family` finds the right one by the checkpoint's `model_type`. One line each below.

Importing this does not import torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.config import ModelConfig
from longrl.models.folder_files import read_texts, require_weights, require_words
from longrl.models.qwen_processor import PROCESSOR_FILES, require_processor
from longrl.models.vila_config import PARTS

if TYPE_CHECKING:
    from longrl.models.family import Family

FAMILIES = {
    "qwen2": "longrl.models.text:Qwen2",
    "qwen3": "longrl.models.text:Qwen3",
    "qwen2_5_vl": "longrl.models.qwen_vl:Qwen25VL",
    "qwen3_vl": "longrl.models.qwen3_vl:Qwen3VL",
    "qwen2_5_omni": "longrl.models.omni:Omni",
    "qwen2_5_omni_thinker": "longrl.models.omni:Omni",
    "vila": "longrl.models.vila:Vila",
    "llava_llama": "longrl.models.vila:Vila",  # as NVlabs' checkpoints before the remote code say
}


ADAPTER_CONFIG = "adapter_config.json"


def load_family(config: ModelConfig, seed: int = 0) -> Family:
    """Loads a checkpoint folder, or makes the tiny twin for `tiny:FAMILY` (`tiny:FAMILY@SEED`: of that seed).

    A folder with adapters (as peft writes it) is loaded into the model that it names; `config.lora` adds new ones to a
    model without.

    Raises:
        ValueError: no such folder, no config.json in it, a model_type that no family handles, weights that are
            missing or unreadable, or no such device.
    """
    base = base_path(config.path)
    family = _load_plain(base, config.dtype, seed)
    if config.rope:
        from longrl.models.rope import override

        override(family.model, config.rope)
    if base != config.path or config.lora:
        from longrl.models import adapters

        if base != config.path:
            adapters.load(family, Path(config.path))
        elif config.lora:
            pointer = os.path.abspath(base) if not base.startswith("tiny:") else _with_seed(base, seed)
            adapters.inject(family, config.lora, pointer, seed)
    family.model.to(device_of(config))  # pyright: ignore (its stubs take no device)
    return family


def base_path(path: str) -> str:
    """The model that a folder with adapters belongs to; any other path is a model's own.

    Raises:
        ValueError: the folder does not say.
    """
    about = Path(path) / ADAPTER_CONFIG
    if not about.is_file():
        return path
    try:
        base = json.loads(about.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {json.dumps(base)}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"adapter {path}: its {ADAPTER_CONFIG} names no base model ({error}); copy it again"
        ) from error
    return base


def tiny_family(path: str) -> tuple[str, int | None]:
    """`tiny:FAMILY@SEED` -> its parts; None where no seed is written.

    Raises:
        ValueError: the seed is no number.
    """
    name, at, seed = path.removeprefix("tiny:").partition("@")
    if at and not seed.isdecimal():
        raise ValueError(f"model.path {path}: the seed {seed!r} is not a number; write tiny:FAMILY@0")
    return name, int(seed) if at else None


def _with_seed(path: str, seed: int) -> str:
    name, given = tiny_family(path)
    return f"tiny:{name}@{seed if given is None else given}"


def _load_plain(where: str, dtype_name: str, seed: int) -> Family:
    import importlib

    import torch

    dtype = getattr(torch, dtype_name)
    if where.startswith("tiny:"):
        (model_type, given), path = tiny_family(where), None
        seed = seed if given is None else given
    else:
        path = Path(where)
        try:
            model_type = _config(path)["model_type"]
        except ValueError as error:
            raise ValueError(f"model.path {error}") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model.path {where}: {_unknown(model_type)}")
    module, name = FAMILIES[model_type].split(":")
    family = getattr(importlib.import_module(module), name)
    return family.tiny(seed, dtype) if path is None else family.load(path, dtype)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["model_type"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a Hugging Face folder (no config.json with a model_type: {error}); download or export one, "
            "or use tiny:FAMILY"
        ) from error
    return config


def _unknown(model_type: Any) -> str:
    return f"no family for model_type {model_type!r}; known: {', '.join(FAMILIES)}"


def require_folder(path: Path) -> None:
    """Looks at the files of a model without loading it.

    Raises:
        ValueError: no family handles its model_type, or its weights, words or processor are not all there.
    """
    config = _config(path)
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path}: {_unknown(model_type)}")
    is_vila = "llm_cfg" in config
    for folder in [path / part for part in PARTS] if is_vila else [path]:
        require_weights(folder)
    require_words(path / "llm" if is_vila else path)
    if not is_vila and not {"vision_config", "thinker_config"}.isdisjoint(config):
        try:
            require_processor(read_texts(path, PROCESSOR_FILES))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def device_of(config: ModelConfig) -> str:
    """cpu, or cuda: the current GPU.

    Raises:
        ValueError: it is asked for and not there.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is cuda, but PyTorch finds no GPU; use auto or cpu, or install PyTorch for CUDA")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
