"""Qwen2.5-VL: preprocessing, M-RoPE positions, prompts and checkpoint layout around transformers' own classes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from longrl.models.tiny import make_tokenizer
from longrl.models.trunk import ATTENTION, TrunkParts
from longrl.types import Clip, Example, Frames, MediaEmbeds, Prompt

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200
PREPROCESSOR_FILE = "video_preprocessor_config.json"


class Qwen25VL:
    """See models/family.py for the contract."""

    model_type = "qwen2_5_vl"

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        text: Any = model.config.text_config
        if text.use_sliding_window or text.attention_dropout:
            raise ValueError(
                "model: sliding-window attention and attention dropout are not supported; set both off in config.json"
            )
        self.model, self.tokenizer = model, tokenizer
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
        model.eval()

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Qwen25VL:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
        limits = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
        for name in ("preprocessor_config.json", PREPROCESSOR_FILE):
            if (path / name).exists():
                saved = json.loads((path / name).read_text())
                limits |= {key: saved[key] for key in limits if saved.get(key)}
        return cls(model, tokenizer, **limits)

    @classmethod
    def tiny(cls, seed: int, dtype: torch.dtype) -> Qwen25VL:
        tokenizer = make_tokenizer()

        def token_id(token: str) -> int:
            return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1 << 18,
                "tie_word_embeddings": True,
                # the temporal axis tells seconds from hours; the slow half of the frequencies hardly turns in an hour
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [8, 4, 4]},
                "bos_token_id": None,
                "eos_token_id": token_id("<|im_end|>"),
                "pad_token_id": token_id("<|endoftext|>"),
            },
            vision_config={
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
                "window_size": 112,
                "tokens_per_second": 1,
            },
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen2_5_VLForConditionalGeneration(config)
        model.to(dtype)  # pyright: ignore[reportArgumentType]
        return cls(model, tokenizer, min_pixels=28 * 28, max_pixels=28 * 28)

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        (path / PREPROCESSOR_FILE).write_text(json.dumps(limits, indent=2) + "\n")

    @property
    def encoder_id(self) -> str:
        digest = hashlib.sha256(f"{self.model_type} v1 {self.min_pixels} {self.max_pixels} {self.model.dtype}".encode())
        for name, tensor in sorted(self.model.model.visual.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        text: Any = self.model.config.text_config
        eos = eos if eos is not None else text.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos)

    def parts(self) -> TrunkParts:
        body = self.model.model.language_model
        return TrunkParts(
            embed=body.embed_tokens, layers=body.layers, norm=body.norm, rotary=body.rotary_emb, head=self.model.lm_head
        )

    # ---- media

    def encode(self, clip: Clip) -> MediaEmbeds:
        from longrl.video.decode import read_frames

        times: list[np.ndarray] = []

        def chunks() -> Iterator[Frames]:
            for frames in read_frames(clip):
                times.append(frames.timestamps_s)
                yield frames

        with torch.no_grad():
            embeds, grid = self.encode_frames(chunks(), clip.max_pixels)
        timestamps = torch.from_numpy(np.concatenate(times))
        return MediaEmbeds(
            embeds=embeds,
            grid_thw=grid,
            seconds_per_grid=_seconds_per_grid(clip, timestamps, self._vision.temporal_patch_size),
            timestamps_s=timestamps,
            key="",
        )

    def encode_frames(
        self, chunks: Iterable[Frames], max_pixels: int | None = None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        embeds, grid_t, grid_hw = [], 0, (0, 0)
        for pixels in _even_chunks(chunks, self._vision.temporal_patch_size):
            rows, grid = self.patches(pixels, max_pixels)
            embeds.append(self.model.model.visual(rows, grid_thw=torch.tensor([grid])).pooler_output)
            grid_t, grid_hw = grid_t + grid[0], grid[1:]
        return torch.cat(embeds), (grid_t, *grid_hw)

    def patches(self, pixels: np.ndarray, max_pixels: int | None = None) -> tuple[Tensor, tuple[int, int, int]]:
        """Frames as the vision tower reads them: resized, normalised, cut into patches in merge order.

        Args:
            pixels: uint8 [F, H, W, 3], F a multiple of the temporal patch.
            max_pixels: a smaller limit than the model's own.

        Returns:
            [t * h * w, C * temporal_patch * patch * patch] and the grid (t, h, w).
        """
        vision = self._vision
        patch, merge, temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        limit = min(self.max_pixels, max_pixels or self.max_pixels)
        height, width = frame_size(*pixels.shape[1:3], patch * merge, min(self.min_pixels, limit), limit)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        x = (x.float() / 255 - mean) / std
        t, h, w = len(x) // temporal, height // patch, width // patch
        x = x.view(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return x.to(self.model.dtype), (t, h, w)

    # ---- prompts

    def prompt(self, example: Example, media: tuple[MediaEmbeds, ...]) -> Prompt:
        template = [
            {
                "role": message.role,
                "content": [
                    {"type": "video"} if isinstance(part, Clip) else {"type": "text", "text": part}
                    for part in message.content
                ],
            }
            for message in example.messages
        ]
        text = self.tokenizer.apply_chat_template(template, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportArgumentType]
        pad = self.model.config.video_token_id
        if ids.count(pad) != len(media):
            raise ValueError(
                f"example {example.id}: {ids.count(pad)} video placeholders in the text for {len(media)} clips"
            )
        token_ids: list[int] = []
        slots: list[tuple[int, int]] = []
        for token in ids:
            if token == pad:
                count = len(media[len(slots)].embeds)
                slots.append((len(token_ids), len(token_ids) + count))
                token_ids += [pad] * count
            else:
                token_ids.append(token)
        positions = self.positions(len(token_ids), media, slots)
        return Prompt(token_ids=torch.tensor(token_ids), position_ids=positions, media=media, media_slots=tuple(slots))

    def positions(self, length: int, media: tuple[MediaEmbeds, ...], slots: list[tuple[int, int]]) -> Tensor:
        """M-RoPE: text counts up on all three axes; a video's tokens are (seconds, row, column) from where it starts,
        and the text after it continues at the largest position so far plus one.

        Differs: transformers 5.18-5.23 continues at start + max(rows, columns), which collides with the video's times.
        Reference: Qwen2.5-VL (arXiv 2502.13923), section 2.1.2.
        """
        merge = self._vision.spatial_merge_size
        out = torch.empty(3, length, dtype=torch.int64)
        here, following = 0, 0  # token index, next position
        for item, (start, end) in zip(media, slots, strict=True):
            out[:, here:start] = following + torch.arange(start - here)
            following += start - here
            t, h, w = item.grid_thw[0], item.grid_thw[1] // merge, item.grid_thw[2] // merge
            seconds = torch.arange(t, dtype=torch.float64) * item.seconds_per_grid * self._vision.tokens_per_second
            axes = torch.meshgrid(seconds.long(), torch.arange(h), torch.arange(w), indexing="ij")
            out[:, start:end] = following + torch.stack([axis.flatten() for axis in axes])
            following, here = int(out[:, start:end].max()) + 1, end
        out[:, here:] = following + torch.arange(length - here)
        return out

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config


def frame_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `factor`, area within limits, aspect kept as well as may be.

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


def _even_chunks(chunks: Iterable[Frames], multiple: int) -> Iterator[np.ndarray]:
    """Regroups frames so that every chunk is whole temporal patches; the last frame repeats to fill the last patch, as
    the model's own preprocessing does."""
    rest: np.ndarray | None = None
    for frames in chunks:
        pixels = frames.pixels if rest is None else np.concatenate([rest, frames.pixels])
        whole = len(pixels) // multiple * multiple
        if whole:
            yield pixels[:whole]
        rest = pixels[whole:]
    if rest is not None and len(rest):
        yield np.concatenate([rest, np.repeat(rest[-1:], multiple - len(rest), 0)])


def _seconds_per_grid(clip: Clip, timestamps: Tensor, temporal_patch: int) -> float:
    if clip.fps is not None:
        return temporal_patch / clip.fps
    span = float(timestamps[-1] - timestamps[0])
    return temporal_patch * span / (len(timestamps) - 1) if len(timestamps) > 1 else 1.0
