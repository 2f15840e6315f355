"""What makes embeddings, by family: its sizes, counts of its parameters and of the tokens it gives."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from longrl.models.qwen_processor import DEFAULT_LIMITS, IMAGE_LIMITS, Sizing


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """The tower that makes embeddings of frames, as Qwen2.5-VL has it."""

    depth: int
    width: int
    intermediate: int
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    """Frames in a patch."""
    min_pixels: int = DEFAULT_LIMITS[0]
    max_pixels: int = DEFAULT_LIMITS[1]
    """Of a frame, as the checkpoint's processor files say."""
    image_limits: tuple[int, int] = IMAGE_LIMITS
    """Least and most pixels of an image."""
    shared_budget: bool = False
    """As of Sizing."""
    levels: int = 0
    """Features of each embedding that are added behind so many layers of the decoder (DeepStack)."""
    stamp_tokens: int = 0
    """At most, of the text that stands with each `temporal` frames of a video."""

    @property
    def factor(self) -> int:
        """Both sides of a resized frame are multiples of it; so many pixels squared and `temporal` frames: a token."""
        return self.patch * self.merge

    @property
    def sizing(self) -> Sizing:
        limits = {"video": (self.min_pixels, self.max_pixels), "image": self.image_limits}
        return Sizing(
            patch=self.patch,
            merge=self.merge,
            temporal=self.temporal,
            limits=limits,
            shared_budget=self.shared_budget,
        )

    def tokens(self, kind: str, frames: int, height: int, width: int, max_pixels: int | None) -> int:
        """Of a clip; arguments as of `Sizing.frame`."""
        return self.sizing.tokens(kind, frames, height, width, max_pixels)

    def require_pixels(self, max_pixels: int | None) -> None:
        """Raises ValueError where the model sees no frames as small as that."""
        self.tokens("video", self.temporal, self.factor, self.factor, max_pixels)

    def most_tokens(self, frames: int, max_pixels: int | None) -> int:
        """Of a video of any size."""
        limit = min(self.max_pixels, max_pixels or self.max_pixels)
        return ceil(frames / self.temporal) * max(1, limit // self.factor**2)

    def merger_parameters(self, out: int) -> int:
        """Of the projector to the language model's width."""
        w, merged = self.width, self.width * self.merge**2
        return w + merged * merged + merged + merged * out + out

    def parameters(self, out: int) -> int:
        """Of all, the projector included."""
        w, f = self.width, self.intermediate
        block = (4 * w * w + 4 * w) + (3 * w * f + 2 * f + w) + 2 * w
        return 3 * self.temporal * self.patch**2 * w + self.depth * block + self.merger_parameters(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipShape(VisionShape):
    """The tower and projector of VILA: frames are squares of one size."""

    side: int
    """Patches of a frame's side."""
    frame_tokens: int
    """Embeddings, and text around them, of frames that are pooled into one."""
    image_tokens: int
    """The same of an image; in tiles, of as many as there may be."""
    head: bool
    projector: tuple[int, ...]
    """What its products take and give."""

    def tokens(self, kind: str, frames: int, height: int, width: int, max_pixels: int | None) -> int:
        return self.image_tokens if kind == "image" else self.most_tokens(frames, max_pixels)

    def require_pixels(self, max_pixels: int | None) -> None:
        if max_pixels is not None and max_pixels < (self.side * self.patch) ** 2:
            side = self.side * self.patch
            raise ValueError(f"max_pixels is {max_pixels}, but the model's pictures all have {side} x {side} pixels")

    def most_tokens(self, frames: int, max_pixels: int | None) -> int:
        return ceil(frames / self.temporal) * self.frame_tokens

    def merger_parameters(self, out: int) -> int:
        products = sum(before * after + after for before, after in pairwise(self.projector))
        return products + (2 * sum(self.projector[:-2]) if self.merge > 1 else 0)  # norms before all but the last

    def parameters(self, out: int) -> int:
        w, f = self.width, self.intermediate
        mlp, attention, norm = 2 * w * f + f + w, 4 * w * w + 4 * w, 2 * w
        embedding = 3 * self.patch**2 * w + w + self.side**2 * w
        head = attention + norm + mlp + w if self.head else 0
        return embedding + self.depth * (attention + mlp + 2 * norm) + norm + head + self.merger_parameters(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VisionShape(VisionShape):
    """The tower of Qwen3-VL: learned places, plain MLPs, and a projector of its own for each level."""

    places: int

    def merger_parameters(self, out: int) -> int:
        w, merged = self.width, self.width * self.merge**2
        products = merged * merged + merged + merged * out + out
        return (2 * w + products) + self.levels * (2 * merged + products)

    def parameters(self, out: int) -> int:
        w, f = self.width, self.intermediate
        block = (4 * w * w + 4 * w) + (2 * w * f + f + w) + 4 * w
        embedding = 3 * self.temporal * self.patch**2 * w + w + self.places * w
        return embedding + self.depth * block + self.merger_parameters(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioShape:
    """The ear of Qwen2.5-Omni."""

    layers: int
    width: int
    intermediate: int
    mel: int
    """Features of sound."""

    def projector_parameters(self, out: int) -> int:
        return self.width * out + out

    def parameters(self, out: int) -> int:
        """Of all, the projector included."""
        w, f = self.width, self.intermediate
        block = (4 * w * w + 3 * w) + (2 * w * f + f + w) + 4 * w  # keys have no bias
        convolutions = 3 * w * (self.mel + w) + 2 * w
        return convolutions + self.layers * block + 2 * w + 2 * out + self.projector_parameters(out)
