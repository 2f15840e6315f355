"""What checkpoints of Qwen's vision models say about frames: processor files, pixel limits, their size.

Importing this module does not import torch or numpy: `longrl check` plans with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrl.types import Clip, Frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation of Qwen3-VL and SigLIP; above, those of CLIP."""
MAX_ASPECT = 200
DEFAULT_LIMITS = (128 * 28 * 28, 768 * 28 * 28)
"""Least and most pixels of a frame where a checkpoint does not say; transformers' own for video."""
IMAGE_LIMITS = (56 * 56, 1280 * 28 * 28)
"""The same of an image."""
PROCESSOR_FILES = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
)
"""What a checkpoint folder holds besides model and tokenizer, as far as there. The first three may tell the limits of a
frame; transformers, and so we, look for them in this order."""


def pixel_limits(files: dict[str, str], kind: str = "video", default: tuple[int, int] | None = None) -> tuple[int, int]:
    """The least and most pixels of a frame, from the file that transformers' processor of that kind would read.

    default: where no file says; None: transformers' own for Qwen2.5-VL.
    """
    saved = _saved(files, kind) or {}
    size = saved.get("size") or {}
    default = default or (DEFAULT_LIMITS if kind == "video" else IMAGE_LIMITS)
    least, most = (
        saved.get(old) or size.get(new) or usual
        for old, new, usual in zip(
            ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), default, strict=True
        )
    )
    return int(least), int(most)


def require_processor(files: dict[str, str]) -> None:
    """
    Raises:
        ValueError: no file is of the processor of images, or of videos. transformers would take its own limits then,
            with other sizes of frames than the model was trained on.
    """
    for kind in ("video", "image"):
        if _saved(files, kind) is None:
            names = " or ".join(_names(kind)[1:])
            raise ValueError(
                f"it has no {names}, nor {kind}_processor in {PROCESSOR_FILES[0]}, to say which sizes {kind}s are "
                "shown in; copy that file from where the model comes from"
            )


def _names(kind: str) -> tuple[str, ...]:
    return PROCESSOR_FILES[:3] if kind == "video" else (PROCESSOR_FILES[0], PROCESSOR_FILES[2])


def _saved(files: dict[str, str], kind: str) -> dict[str, Any] | None:
    parsed = {name: json.loads(files[name]) for name in _names(kind) if name in files}
    nested = parsed.pop(PROCESSOR_FILES[0], {}).get(f"{kind}_processor")
    return nested or next(iter(parsed.values()), None)


def make_processor_files(
    vision: Any,
    video: tuple[int, int],
    image: tuple[int, int],
    classes: tuple[str, str, str] = ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", "Qwen2VLImageProcessor"),
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, str]:
    """The files from which transformers makes its own image and video processors.

    Args:
        video, image: least and most pixels.
        classes: of the processor that joins all, of videos and of images.
    """
    common = {
        "processor_class": classes[0],
        "image_mean": mean,
        "image_std": std,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    kinds = {
        "preprocessor_config.json": ({"image_processor_type": classes[2]}, image),
        "video_preprocessor_config.json": ({"video_processor_type": classes[1]}, video),
    }
    return {
        name: json.dumps(kind | common | {"size": {"shortest_edge": least, "longest_edge": most}}, indent=2) + "\n"
        for name, (kind, (least, most)) in kinds.items()
    }


def frame_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `factor`, area within limits, aspect kept as well as may be.

    No side gets below `factor`, so a very narrow frame may exceed max_pixels, as it does in transformers.

    Args:
        frames: that the limits are for.
        temporal: frames of a patch; so many count as one.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"a frame of {width} x {height} pixels is too narrow; the aspect ratio may be at most {MAX_ASPECT}"
        )
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    whole = round(frames / temporal) * temporal
    if whole * h * w > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif whole * h * w < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How frames become patches, and pairs of frames tokens."""

    patch: int
    merge: int
    temporal: int
    limits: Mapping[str, tuple[int, int]]
    """Kind of clip -> least and most pixels of a frame."""
    shared_budget: bool = False
    """Of all frames of a video together, as in Qwen3-VL."""

    def frame(self, kind: str, frames: int, height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
        """Height and width that frames are resized to.

        Args:
            frames: of the whole clip.
            max_pixels: of a frame, a smaller limit than the model's own.

        Raises:
            ValueError: frames too narrow, or a limit below what the model sees at least.
        """
        least, most = self.limits[kind]
        factor = self.patch * self.merge
        if max_pixels is not None and max_pixels < factor**2:
            raise ValueError(
                f"max_pixels is {max_pixels}, but what the model sees has at least {factor} x {factor} pixels; set "
                f"{factor**2} or more"
            )
        if self.shared_budget and kind == "video":
            frames = max(frames, self.temporal)
            most = min(most, frames * (most if max_pixels is None else max_pixels))
            if min(height, width) < factor:
                scale = factor / min(height, width)
                height, width = int(height * scale), int(width * scale)
            return frame_size(height, width, factor, min(least, most), most, frames, self.temporal)
        most = min(most, most if max_pixels is None else max_pixels)
        return frame_size(height, width, factor, min(least, most), most)

    def grid_tokens(self, height: int, width: int) -> int:
        """Of `temporal` frames that are resized to this."""
        return (height // (self.patch * self.merge)) * (width // (self.patch * self.merge))

    def tokens(self, kind: str, frames: int, height: int, width: int, max_pixels: int | None) -> int:
        """Of a clip; arguments as of `frame`."""
        resized = self.frame(kind, frames, height, width, max_pixels)
        return -(-frames // self.temporal) * self.grid_tokens(*resized)


def even_chunks(chunks: Iterable[Frames], multiple: int) -> Iterator[np.ndarray]:
    """Regroups frames so that every chunk is whole temporal patches; the last frame repeats to fill the last patch, as
    the model's own preprocessing does."""
    import numpy as np

    rest: np.ndarray | None = None
    for frames in chunks:
        pixels = frames.pixels if rest is None else np.concatenate([rest, frames.pixels])
        whole = len(pixels) // multiple * multiple
        if whole:
            yield pixels[:whole]
        rest = pixels[whole:]
    if rest is not None and len(rest):
        yield np.concatenate([rest, np.repeat(rest[-1:], multiple - len(rest), 0)])


def seconds_per_grid(clip: Clip, timestamps: Tensor, temporal_patch: int) -> float:
    if clip.fps is not None:
        return temporal_patch / clip.fps
    span = float(timestamps[-1] - timestamps[0])
    return temporal_patch * span / (len(timestamps) - 1) if len(timestamps) > 1 else 1.0
