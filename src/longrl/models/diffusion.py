"""What training needs of a diffusers pipeline, and no more: texts -> embeddings, (latents, time) -> velocity, latents
-> pixels, sizes that it can make. The pipeline's own classes do the work; see sd3.py and wan.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from longrl.flow_types import Schedule, TextEmbeds


class MediaFamily(ABC):
    """A pipeline. Latents are fp32 outside of the denoiser, whatever its dtype."""

    is_video: ClassVar[bool]
    encoder_names: ClassVar[tuple[str, ...]]
    most_tokens: ClassVar[int]
    """That the pipeline gives its T5 encoder where nothing is said; SD3's two CLIP encoders take 77."""

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        """
        Args:
            max_tokens: that T5 takes, shorter prompts being padded to so many; None: most_tokens.
        """
        self.pipe, self.max_tokens = pipe, max_tokens or self.most_tokens
        for name in ("transformer", "vae", *self.encoder_names):
            part = getattr(pipe, name)
            if part is not None:
                part.requires_grad_(False).eval()

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The denoiser's layers."""

    @abstractmethod
    def require_size(self, height: int, width: int, frames: int) -> None:
        """
        Raises:
            ValueError: the autoencoder or the denoiser cannot make media of this size.
        """

    @abstractmethod
    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        """Without the batch."""

    @abstractmethod
    def lengths(self, text: str) -> list[tuple[str, int, int]]:
        """(tokenizer, tokens of this text, most that it takes) of each text encoder, end marks included."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> TextEmbeds:
        """As the pipeline does it."""

    @abstractmethod
    def velocity(self, latents: Tensor, timesteps: Tensor, embeds: TextEmbeds) -> Tensor:
        """fp32 [N, ...]; timesteps [N]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 [N, F, H, W, 3]"""

    def schedule(self, steps: int, latent_shape: Sequence[int], shift: float | None = None) -> Schedule:
        """The pipeline's own sigmas and times; of a solver of higher order too, whose steps are not taken.

        Args:
            shift: instead of the scheduler's; null: its own.
        """
        scheduler = flow_scheduler(self.pipe.scheduler, shift)
        dynamic = scheduler.config.get("use_dynamic_shifting")
        mu = {"mu": self._dynamic_shift(scheduler, latent_shape)} if dynamic else {}
        scheduler.set_timesteps(steps, **mu)
        return Schedule(sigmas=scheduler.sigmas, timesteps=scheduler.timesteps)

    def _dynamic_shift(self, scheduler: Any, latent_shape: Sequence[int]) -> float:
        raise AssertionError(f"{type(self).__name__} with dynamic shifting")


def flow_scheduler(scheduler: Any, shift: float | None) -> Any:
    """A scheduler as a pipeline's, perhaps with another shift.

    Raises:
        ValueError: it is not of a flow model.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    name = "shift" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else "flow_shift"
    if name == "flow_shift" and not scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"the pipeline's scheduler is {type(scheduler).__name__} without flow sigmas, expected one of a flow model"
        )
    if (last := scheduler.config.get("final_sigmas_type", "zero")) != "zero":
        raise ValueError(f"the pipeline's scheduler has final_sigmas_type {last!r}, expected 'zero'")
    given = {} if shift is None else {name: shift, "use_dynamic_shifting": False}
    return type(scheduler).from_config(scheduler.config, **given)


def pixels(decoded: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8, rounded as diffusers does it."""
    unit = (decoded.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).cpu().numpy()
