"""A clip walked through by an encoder, a bounded number of frames at a time: there, and back with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrl.models.qwen_processor import seconds_per_grid
from longrl.types import Clip, Frames, MediaEmbeds, MediaSize

if TYPE_CHECKING:
    from longrl.video.decode import Selection

See = Callable[[Frames, int], MediaEmbeds]
"""Embeddings of some frames of a clip, which has so many in all."""


def encode_clip(
    clip: Clip, chunks: range | None, measure: Callable[[Selection], MediaSize], temporal: int, see: See
) -> Iterator[MediaEmbeds]:
    """See `encode` of models/family.py.

    Args:
        measure: of a video, for its chunks.
        temporal: frames of a temporal patch.
    """
    if clip.kind == "image":
        from longrl.video.image import read_image

        return map(partial(_seen, see, 1, 1.0), iter([read_image(clip.path)]))
    from longrl.video.decode import select_frames

    selected = select_frames(clip)
    count, size = len(selected.chosen), measure(selected)
    part = None if chunks is None else range(chunks.start * size.chunk_frames, chunks.stop * size.chunk_frames)
    seconds = seconds_per_grid(clip, torch.from_numpy(selected.times_s), temporal)
    # where key frames cannot be relied on, one process does the whole; see data/clips.py
    frames = selected.read(size.chunk_frames, part, quick_only=part is not None)
    # a map keeps no chunk of pixels while the next one is decoded, as a loop would
    return map(partial(_seen, see, count, seconds), frames)


@torch.no_grad()
def _seen(see: See, count: int, seconds: float, frames: Frames) -> MediaEmbeds:
    media = see(frames, count)
    deepstack = None if media.deepstack is None else media.deepstack.cpu()
    return replace(media, embeds=media.embeds.cpu(), deepstack=deepstack, seconds_per_grid=seconds)


def clip_backward(
    media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None, temporal: int, most: int, see: See
) -> None:
    """See `encode_backward` of models/family.py.

    Args:
        temporal: frames of a temporal patch.
        most: temporal patches at a time.
    """
    clip, patches = media.clip, media.grid_thw[0]
    assert clip, f"media {media.key} comes from no clip"
    tokens = len(media.embeds) // patches
    touched = range(span.start // tokens, -(-span.stop // tokens))
    if clip.kind == "image":
        from longrl.video.image import read_image

        count, chunks = 1, iter([read_image(clip.path)])
    else:
        from longrl.video.decode import select_frames

        selected = select_frames(clip)
        count = len(selected.chosen)
        part = range(touched.start * temporal, min(touched.stop * temporal, count))
        chunks = selected.read(max(1, most) * temporal, part)
    assert -(-count // temporal) == patches, f"{clip.path}: {-(-count // temporal)} temporal patches, {patches} before"
    first = touched.start * tokens
    for frames in chunks:
        end = first + -(-len(frames.pixels) // temporal) * tokens
        start, stop = max(first, span.start), min(end, span.stop)
        again, mine = slice(start - first, stop - first), slice(start - span.start, stop - span.start)
        seen = see(frames, count)
        outputs, gradients = [seen.embeds[again]], [grads[mine].to(seen.embeds)]
        if seen.deepstack is not None and deepstack_grads is not None:
            outputs.append(seen.deepstack[:, again])
            gradients.append(deepstack_grads[:, mine].to(seen.embeds))
        torch.autograd.backward(outputs, gradients)
        first = end
