"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrl.flow_config import require_multiples
from longrl.flow_types import TextEmbeds
from longrl.models.diffusion import MediaFamily, pixels


class SD3(MediaFamily):
    is_video = False
    most_tokens = 256
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.transformer_blocks

    def require_size(self, height: int, width: int, frames: int) -> None:
        unit = self.pipe.vae_scale_factor * self.pipe.patch_size
        side = unit, self.transformer.config.pos_embed_max_size * unit
        require_multiples(height, width, frames, {"height": side, "width": side}, None)

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        return self.transformer.config.in_channels, height // scale, width // scale

    def lengths(self, text: str) -> list[tuple[str, int, int]]:
        pipe = self.pipe
        found = [(name, getattr(pipe, name), pipe.tokenizer_max_length) for name in ("tokenizer", "tokenizer_2")]
        found += [("tokenizer_3", pipe.tokenizer_3, self.max_tokens)] if pipe.text_encoder_3 is not None else []
        return [(name, len(tokenizer(text).input_ids), limit) for name, tokenizer, limit in found]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEmbeds:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return TextEmbeds(tokens=tokens, pooled=pooled)

    def velocity(self, latents: Tensor, timesteps: Tensor, embeds: TextEmbeds) -> Tensor:
        dtype = self.transformer.dtype
        assert embeds.pooled is not None
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=embeds.tokens.to(dtype),
            pooled_projections=embeds.pooled.to(dtype),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self.pipe.vae
        scaled = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        return pixels(vae.decode(scaled.to(vae.dtype), return_dict=False)[0].permute(0, 2, 3, 1).unsqueeze(1))

    def _dynamic_shift(self, scheduler: Any, latent_shape: Sequence[int]) -> float:
        """Linear in the number of patches, as in the pipeline."""
        c, patch = scheduler.config, self.transformer.config.patch_size
        patches = (latent_shape[-2] // patch) * (latent_shape[-1] // patch)
        slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
        return c["base_shift"] + slope * (patches - c["base_image_seq_len"])
