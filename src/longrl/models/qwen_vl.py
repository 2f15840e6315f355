"""Qwen2.5-VL: M-RoPE positions, checkpoint layout and tiny twin around transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from longrl.models.folder import explained
from longrl.models.folder_files import read_texts
from longrl.models.qwen_processor import (
    DEFAULT_LIMITS,
    IMAGE_LIMITS,
    PROCESSOR_FILES,
    make_processor_files,
    pixel_limits,
    require_processor,
)
from longrl.models.qwen_vision import QwenVision, Resize
from longrl.models.text import Ranges, Text, tiny_text
from longrl.models.trunk import ATTENTION
from longrl.types import Clip, Frames, MediaEmbeds, MediaSize


class Qwen25VL(Text):
    """See models/family.py for the contract."""

    model_type = "qwen2_5_vl"
    model_class, config_class = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
    extra_files = PROCESSOR_FILES
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>"}  # noqa: RUF012
    limits: ClassVar[dict[str, tuple[int, int]]] = {"image": IMAGE_LIMITS, "video": DEFAULT_LIMITS}
    """Kind of clip -> least and most pixels where a checkpoint does not say."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, files: dict[str, str]) -> None:
        super().__init__(model, tokenizer, files)
        self.vision = self.make_vision({kind: pixel_limits(files, kind, usual) for kind, usual in self.limits.items()})

    def make_vision(self, limits: dict[str, tuple[int, int]]) -> QwenVision:
        return QwenVision(self.model_type, self.model.model.visual, limits)

    def set_attention(self, model: Any) -> None:
        model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Self:
        with explained(path):
            require_processor(read_texts(path, cls.extra_files))
        family = super().load(path, dtype)
        with explained(path):
            for kind, token in cls.placeholders.items():
                if family.token_id(token) != getattr(family.model.config, f"{kind}_token_id"):
                    raise ValueError(f"its tokenizer does not have {token} where config.json says; copy it again")
        return family

    def describe(self, path: Path) -> None:
        super().describe(path)
        # an engine gets no pixels, but makes up a picture within the limits: a twin's may have no side
        for name, text in self.processor_files(self.model.config.vision_config, self.limits).items():
            (path / name).write_text(text)

    @classmethod
    def processor_files(cls, vision: Any, limits: dict[str, tuple[int, int]]) -> dict[str, str]:
        return make_processor_files(vision, limits["video"], limits["image"])

    @classmethod
    def tiny_config(cls, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
        text = tiny_text(tokenizer)
        text["rope_parameters"] |= {"mrope_section": [12, 2, 2]}
        text.pop("head_dim")
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config={
                "depth": 2,
                "initializer_range": 0.08,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
                "window_size": 112,
                "tokens_per_second": 1,
            },
            **media_tokens(tokenizer),
            tie_word_embeddings=True,
        )

    @classmethod
    def tiny_files(cls, config: Any) -> dict[str, str]:
        return cls.processor_files(config.vision_config, {"video": (28 * 28, 28 * 28), "image": (28 * 28, 112 * 112)})

    # ---- media

    @property
    def encoder_id(self) -> str:
        return self.vision.encoder_id

    def measure(self, clip: Clip) -> MediaSize:
        return self.vision.measure(self._taken(clip))

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        return self.vision.encode(self._taken(clip), chunks)

    def encode_frames(self, chunks: Iterable[Frames], max_pixels: int | None = None) -> MediaEmbeds:
        given = list(chunks)
        return self.vision.encode_frames(
            given, Resize("video", sum(len(frames.pixels) for frames in given), max_pixels)
        )

    def encoder_parameters(self, part: str) -> list[torch.nn.Parameter]:
        return self.vision.parameters(part)

    def encode_backward(
        self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None = None
    ) -> None:
        self.vision.backward(media, span, grads, deepstack_grads)

    # ---- positions

    def positions(self, length: int, media: Sequence[MediaEmbeds], slots: Sequence[Ranges]) -> Tensor:
        """M-RoPE: text counts up on all three axes; a video's tokens are (seconds, row, column) from where it starts,
        and the text after it continues at the largest position so far plus one. An image is a video of one time.

        Differs: transformers 5.17-5.24 continues at start + max(rows, columns), which collides with the video's times.
        Reference: Qwen2.5-VL (arXiv 2502.13923), section 2.1.2.
        """
        vision = self.vision.config
        merge = vision.spatial_merge_size
        out = torch.empty(3, length, dtype=torch.int64)
        here, following = 0, 0  # token index, next position
        for item, ((start, end),) in zip(media, slots, strict=True):
            out[:, here:start] = following + torch.arange(start - here)
            following += start - here
            t, h, w = item.grid_thw[0], item.grid_thw[1] // merge, item.grid_thw[2] // merge
            seconds = torch.arange(t, dtype=torch.float64) * item.seconds_per_grid * vision.tokens_per_second
            axes = torch.meshgrid(seconds.long(), torch.arange(h), torch.arange(w), indexing="ij")
            out[:, start:end] = following + torch.stack([axis.flatten() for axis in axes])
            following, here = int(out[:, start:end].max()) + 1, end
        out[:, here:] = following + torch.arange(length - here)
        return out


def media_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration calls the tokens around media."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
