"""Long-RL: reinforcement learning of vision-language models on long videos.

    model = longrl.load("path/of/a/model")
    reply = model.generate_content([longrl.Video("lecture.mp4", fps=2), "What is on the board at the end?"])

Importing this does not import torch; `load` does.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from longrl.types import Clip

if TYPE_CHECKING:
    from longrl.inference import Model

__version__ = "0.1.0"


def load(path: str | PathLike[str], *, cache_dir: str = "runs/cache", **model: Any) -> Model:
    """A model to ask.

    Args:
        path: A Hugging Face folder, one of adapters, or `tiny:FAMILY`.
        cache_dir: Where embeddings of media are kept.
        model: Other fields of config.ModelConfig: dtype, device.

    Raises:
        ValueError: There is no such model, or it cannot be loaded.
    """
    from longrl.config import CacheConfig, ModelConfig
    from longrl.config_files import build_section
    from longrl.inference import Model
    from longrl.models import load_family

    if not isinstance(path, str | PathLike):
        raise ValueError(f"longrl.load: path is {path!r:.80}, expected a model's folder or tiny:FAMILY; write its name")
    config = build_section(ModelConfig, {"path": fspath(path), **model}, "longrl.load")
    return Model(load_family(config), CacheConfig(dir=cache_dir))


def Video(
    path: str | PathLike[str],
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_pixels: int | None = None,
) -> Clip:
    """A span of a video, sampled at so many frames a second (one, if nothing is said) or so many frames in all."""
    if fps is None and num_frames is None:
        fps = 1.0
    return Clip(path=fspath(path), fps=fps, num_frames=num_frames, start_s=start_s, end_s=end_s, max_pixels=max_pixels)


def Image(path: str | PathLike[str], *, max_pixels: int | None = None) -> Clip:
    """An image."""
    return Clip(path=fspath(path), kind="image", max_pixels=max_pixels)


def Audio(
    path: str | PathLike[str], *, start_s: float = 0.0, end_s: float | None = None, with_video: bool = False
) -> Clip:
    """A span of sound.

    with_video: It belongs to the video just before it, whose file and span it has: the model hears while it sees.
    """
    return Clip(path=fspath(path), kind="audio", start_s=start_s, end_s=end_s, with_video=with_video)
