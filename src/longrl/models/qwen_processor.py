"""What Qwen2.5-VL's checkpoints say about preparing frames: the processor files, pixel limits, the size of a frame.

Importing this module does not import torch: `longrl check` asks for sizes too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from longrl.types import Clip, Frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200
DEFAULT_LIMITS = (128 * 28 * 28, 768 * 28 * 28)
"""Least and most pixels of a frame where a checkpoint does not say; transformers' own for video."""
PROCESSOR_FILES = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
)
"""What a checkpoint folder holds besides model and tokenizer, as far as there. The first three may tell the limits of a
frame; transformers, and so we, look for them in this order."""


def pixel_limits(files: dict[str, str]) -> tuple[int, int]:
    """The least and most pixels of a frame, from the file that transformers' video processor would read."""
    parsed = {name: json.loads(files[name]) for name in PROCESSOR_FILES[:3] if name in files}
    nested = parsed.pop("processor_config.json", {}).get("video_processor")
    saved: dict[str, Any] = nested or next(iter(parsed.values()), {})
    size = saved.get("size") or {}
    least, most = (
        saved.get(old) or size.get(new) or default
        for old, new, default in zip(
            ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), DEFAULT_LIMITS, strict=True
        )
    )
    return int(least), int(most)


def make_processor_files(vision: Any, min_pixels: int, max_pixels: int) -> dict[str, str]:
    """The files from which transformers makes its own image and video processors."""
    common = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_mean": MEAN,
        "image_std": STD,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    }
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    return {name: json.dumps(kind | common, indent=2) + "\n" for name, kind in kinds.items()}


def frame_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `factor`, area within limits, aspect kept as well as may be.

    No side gets below `factor`, so a very narrow frame may exceed max_pixels, as it does in transformers.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"a frame of {width} x {height} pixels is too narrow; the aspect ratio may be at most {MAX_ASPECT}"
        )
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


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
