"""Pipeline class -> family of image and video generators. Importing this does not import torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.config import ModelConfig
from longrl.models import device_of

if TYPE_CHECKING:
    from longrl.models.diffusion import MediaFamily

MEDIA_FAMILIES = {"StableDiffusion3Pipeline": "longrl.models.sd3:SD3", "WanPipeline": "longrl.models.wan:Wan"}
_TWINS = {"sd3": ("StableDiffusion3Pipeline", "tiny_sd3"), "wan": ("WanPipeline", "tiny_wan")}


def pipeline_class(path: str) -> str:
    """Of a diffusers folder, or of `tiny:sd3` and `tiny:wan`.

    Raises:
        ValueError: there is no such folder, or no family for its pipeline.
    """
    if path.startswith("tiny:"):
        name = path.removeprefix("tiny:").partition("@")[0]
        if name not in _TWINS:
            raise ValueError(f"model.path {path}: no such twin; known: {', '.join(f'tiny:{name}' for name in _TWINS)}")
        return _TWINS[name][0]
    try:
        found = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model.path {path}: not a diffusers folder (no model_index.json with a _class_name: {error}); download or "
            f"export one, or use {' or '.join(f'tiny:{name}' for name in _TWINS)}"
        ) from error
    if found not in MEDIA_FAMILIES:
        raise ValueError(f"model.path {path}: no family for {found}; known: {', '.join(MEDIA_FAMILIES)}")
    return found


def load_media_family(config: ModelConfig, seed: int = 0, max_tokens: int | None = None) -> MediaFamily:
    """Loads a diffusers folder, or makes a tiny twin (`tiny:sd3@SEED`: of that seed).

    Raises:
        ValueError: as pipeline_class; weights that cannot be read; no such device.
        RuntimeError: diffusers is not installed.
    """
    path = config.path
    name = pipeline_class(path)
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeError("image and video generation needs diffusers: pip install 'longrl[flow]'") from error
    import torch

    with quiet():
        family, device, dtype = _load(MEDIA_FAMILIES[name]), device_of(config), getattr(torch, config.dtype)
        if path.startswith("tiny:"):
            twin, _, given = path.removeprefix("tiny:").partition("@")
            if given and not given.isdecimal():
                raise ValueError(f"model.path {path}: the seed {given!r} is not a number; write tiny:{twin}@0")
            pipe = _load(f"longrl.models.tiny_diffusion:{_TWINS[twin][1]}")(int(given or seed))
            if dtype != torch.float32:  # which they are
                pipe.to(dtype)
        else:
            try:
                pipe = getattr(diffusers, name).from_pretrained(path, dtype=dtype)
            except (OSError, ValueError, RuntimeError) as error:
                why = " ".join(str(error).split())[:300]
                raise ValueError(f"model.path {path}: cannot be loaded ({why})") from error
    pipe.set_progress_bar_config(disable=True)
    return family(pipe.to(device), max_tokens)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bars and hints of diffusers and transformers off the terminal; what matters of them is
    raised."""
    from diffusers.utils import logging

    from longrl.models import folder

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with folder.quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load(where: str) -> Any:
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)
