"""Wan 2.1, text to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrl.flow_config import require_multiples
from longrl.flow_types import TextEmbeds
from longrl.models.diffusion import MediaFamily, pixels


class Wan(MediaFamily):
    is_video = True
    most_tokens = 512
    encoder_names = ("text_encoder",)

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        """
        Raises:
            ValueError: it has two denoisers (Wan 2.2), or times for each token.
        """
        if pipe.transformer_2 is not None or pipe.config.expand_timesteps:
            raise ValueError(f"{pipe.name_or_path}: Wan 2.2 (two denoisers) is not supported; use a Wan 2.1 pipeline")
        super().__init__(pipe, max_tokens)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    def require_size(self, height: int, width: int, frames: int) -> None:
        _, *patches = self.transformer.config.patch_size
        # 16: the pipeline asks for it
        tall, wide = ((max(self.pipe.vae_scale_factor_spatial * patch, 16), None) for patch in patches)
        require_multiples(height, width, frames, {"height": tall, "width": wide}, self.pipe.vae_scale_factor_temporal)

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        space, time = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return self.transformer.config.in_channels, (frames - 1) // time + 1, height // space, width // space

    def lengths(self, text: str) -> list[tuple[str, int, int]]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return [("tokenizer", len(self.pipe.tokenizer(prompt_clean(text)).input_ids), self.max_tokens)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbeds:
        tokens, _ = self.pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return TextEmbeds(tokens=tokens)

    def velocity(self, latents: Tensor, timesteps: Tensor, embeds: TextEmbeds) -> Tensor:
        dtype = self.transformer.dtype
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=embeds.tokens.to(dtype),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        scaled = (latents * std + mean).to(vae.dtype)
        return pixels(vae.decode(scaled, return_dict=False)[0].permute(0, 2, 3, 4, 1))
