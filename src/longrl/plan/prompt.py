"""How many tokens the prompts of a configuration have: of its first videos, where they are there, else at most."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from longrl.config import DataRunConfig, SftConfig
from longrl.data.examples import load_examples
from longrl.plan.shapes import ModelShape
from longrl.plan.towers import VisionShape
from longrl.types import Clip, Example, MediaError

PROBED = 8
"""Videos whose packets are read: a tenth of a second each for an hour."""
TEXT_TOKENS = 512
"""Of question and template, where no row says."""
TEMPLATE_TOKENS = 64
SPAN_S = 3600.0
"""Assumed of a video where no row says."""
HEARD_PER_S = 25
"""Tokens of sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSize:
    """Of the longest prompt that was looked at."""

    video_tokens: int
    text_tokens: int
    """With what is heard, and the times between frames: all that is not seen."""
    frames: int
    merge: int
    temporal: int
    """Frames in a patch."""
    source: str
    """What it was taken from."""

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def patches(self) -> int:
        """That the tower reads."""
        return self.video_tokens * self.merge**2

    @property
    def grid_patches(self) -> int:
        """Of a temporal patch."""
        return self.patches // max(1, ceil(self.frames / self.temporal))


def prompt_size(config: DataRunConfig, shape: ModelShape) -> PromptSize:
    """From the first rows of the data where they and their videos can be read, else the most that `video` allows."""
    path = config.data.eval if config.kind == "eval" else config.data.train  # pyright: ignore[reportAttributeAccessIssue]
    vision = shape.vision
    if path is None or not Path(path).exists():  # of the hub: a plan downloads nothing
        assumed = "the most that `video` allows" if vision else f"{TEXT_TOKENS} tokens of text"
        return _most(config, vision, f"{assumed}, as the data are not there")
    try:
        examples = load_examples(
            path,
            config.data.model_copy(update={"on_error": "skip"}),
            config.video,
            cache=config.cache,
            demonstrations=isinstance(config, SftConfig),
        )
        sizes = _measured(examples, vision) if vision else [(0, 0, 0, 0)] * len(examples)
    except (ImportError, RuntimeError, ValueError) as error:
        return _most(config, vision, f"the most that {'`video`' if vision else 'a text'} allows ({error})")
    longest = max(sizes, key=lambda size: size[1] + size[2])
    text = longest[2] + max(_text_tokens(example) for example in examples)
    kinds = {clip.kind for example in examples for clip in example.clips} or {"question"}
    source = f"the longest of {len(sizes)} {' and '.join(f'{kind}s' for kind in sorted(kinds))} in {path}" + (
        f", the first of {len(examples)} rows" * (len(sizes) == PROBED)
    )
    if longest[3]:
        source += f"; {longest[3]:,} of its frames are repeated ones, as it has fewer"
    return PromptSize(
        frames=longest[0],
        video_tokens=longest[1],
        text_tokens=text,
        merge=vision.merge if vision else 1,
        temporal=vision.temporal if vision else 1,
        source=source,
    )


def _most(config: DataRunConfig, vision: VisionShape | None, source: str) -> PromptSize:
    video = config.video
    if vision is None:
        return PromptSize(frames=0, video_tokens=0, text_tokens=TEXT_TOKENS, merge=1, temporal=1, source=source)
    if video.num_frames is not None:
        frames = video.num_frames
    else:
        assert video.fps is not None
        frames, source = ceil(video.fps * SPAN_S), f"{source}, of one hour"
    if video.max_pixels is None:
        source += "; video.max_pixels is null, so frames are as large as the model takes"
    return PromptSize(
        frames=frames,
        video_tokens=vision.most_tokens(frames, video.max_pixels),
        text_tokens=TEXT_TOKENS + vision.stamp_tokens * ceil(frames / vision.temporal),
        merge=vision.merge,
        temporal=vision.temporal,
        source=source,
    )


def _measured(examples: list[Example], vision: VisionShape) -> list[tuple[int, int, int, int]]:
    """(frames, tokens seen, tokens between and beside them, frames that repeat others) of the first examples with
    different media, none perhaps."""
    first: dict[tuple[Clip, ...], Example] = {}
    for example in examples:
        first.setdefault(example.clips, example)
    sizes: list[tuple[int, int, int, int]] = []
    for example in list(first.values())[:PROBED]:
        try:
            parts = [_clip_size(clip, vision) for clip in example.clips]
        except MediaError:
            continue  # the run says what is wrong with it
        frames, seen, beside, again = map(sum, zip(*parts, strict=True)) if parts else (0, 0, 0, 0)
        sizes.append((frames, seen, beside, again))
    if not sizes:
        raise ValueError("none of its first media can be read")
    return sizes


def _clip_size(clip: Clip, vision: VisionShape) -> tuple[int, int, int, int]:
    """As _measured, of what encoding will make; of times at most."""
    if clip.kind == "image":
        from longrl.video.image import image_size

        return 1, vision.tokens("image", 1, *image_size(clip.path), clip.max_pixels), 0, 0
    if clip.kind == "audio":
        from longrl.video.audio import count_samples

        return 0, 0, ceil(HEARD_PER_S * count_samples(clip.path, clip.start_s, clip.end_s, 16000) / 16000), 0
    from longrl.video.decode import select_frames

    selected = select_frames(clip)
    frames, shown = len(selected.chosen), (selected.index.height, selected.index.width)
    times = vision.stamp_tokens * ceil(frames / vision.temporal)
    again = frames - len(set(selected.chosen.tolist()))
    return frames, vision.tokens("video", frames, *shown, clip.max_pixels), times, again


def _text_tokens(example: Example) -> int:
    """At most: a token has one byte at least."""
    parts = (part for message in example.messages for part in message.content if isinstance(part, str))
    return TEMPLATE_TOKENS + sum(len(part.encode()) for part in parts)
