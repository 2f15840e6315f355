"""The records of image and video generation; types.py has those of text. Importing this does not import torch.

Shapes use: N samples, F frames (1 of an image), K steps, C x f x h x w a latent (an image's has no f).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPrompt:
    """A line of a prompt file."""

    id: str
    text: str
    extra: dict[str, Any] = field(default_factory=dict)
    """The line's other columns, for rewards: GenEval's `tag`, `include`, `exclude`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """Images or videos that were made for one prompt: what a reward looks at."""

    prompt: MediaPrompt
    pixels: np.ndarray
    """uint8 [N, F, H, W, 3], RGB; images have F = 1."""
    fps: float | None = None
    """Of videos."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 5 or self.pixels.shape[-1] != 3 or self.pixels.dtype.name != "uint8":
            raise AssertionError(f"media of {self.prompt.id}: {self.pixels.dtype} {self.pixels.shape}")

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredMedia:
    """What the samples of a group earned."""

    rewards: dict[str, list[float | None]]
    """[N] by name; None: could not be scored (never 0 for a failure)."""
    total: list[float | None]
    """[N], the weighted sums, or None where any part of it is None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbeds:
    """What the text encoders made of prompts."""

    tokens: Tensor
    """[N, S, D]"""
    pooled: Tensor | None = None
    """[N, P], of SD3."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TextEmbeds:
        return self._each(lambda x: x[rows])

    def take(self, indices: Tensor) -> TextEmbeds:
        return self._each(lambda x: x[indices])

    def repeat(self, count: int) -> TextEmbeds:
        """Each prompt's so many times, one after the other."""
        return self._each(lambda x: x.repeat_interleave(count, 0))

    def before(self, other: TextEmbeds) -> TextEmbeds:
        """These prompts, then the others."""
        import torch

        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.cat([self.pooled, other.pooled])
        return TextEmbeds(tokens=torch.cat([self.tokens, other.tokens]), pooled=pooled)

    def to(self, device: torch.device) -> TextEmbeds:
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextEmbeds:
        return TextEmbeds(tokens=change(self.tokens), pooled=None if self.pooled is None else change(self.pooled))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps of a sampler."""

    sigmas: Tensor
    """fp32 [T + 1], falling to 0."""
    timesteps: Tensor
    """[T]: sigmas as the denoiser is told them, rounded as the pipeline's scheduler does."""

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The stochastic steps of N samples and where they led."""

    steps: range
    """Which of the schedule's steps were stochastic; empty: none."""
    together: int
    """So many samples in a row are in one state before the first of them: a group that began with one noise, or 1."""
    states: Tensor
    """fp32 [N, K + 1, ...]: before each of them, and after the last."""
    logprobs: Tensor
    """[N, K]"""
    latents: Tensor
    """[N, ...] at sigma 0."""
