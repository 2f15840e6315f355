"""Qwen3-VL: frames with their times as text, interleaved M-RoPE, features added behind the first layers (DeepStack).

Reference: Qwen3-VL (arXiv 2511.21631).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from longrl.models.qwen_processor import HALF, make_processor_files
from longrl.models.qwen_vision import QwenVision
from longrl.models.qwen_vl import Qwen25VL, media_tokens
from longrl.models.text import Ranges, tiny_text
from longrl.models.tiny import make_tokenizer
from longrl.types import Clip, Example, MediaEmbeds, MediaSize, Prompt


class Qwen3VL(Qwen25VL):
    """See models/family.py for the contract."""

    model_type = "qwen3_vl"
    model_class, config_class = Qwen3VLForConditionalGeneration, Qwen3VLConfig
    limits = {"image": (56 * 56, 1280 * 28 * 28), "video": (128 * 32 * 32, 768 * 32 * 32)}  # noqa: RUF012

    def make_vision(self, limits: dict[str, tuple[int, int]]) -> QwenVision:
        visual = self.model.model.visual
        return QwenVision(self.model_type, visual, limits, mean=HALF, std=HALF, shared_budget=True)

    @classmethod
    def processor_files(cls, vision: Any, limits: dict[str, tuple[int, int]]) -> dict[str, str]:
        classes = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", "Qwen2VLImageProcessorFast")
        return make_processor_files(vision, limits["video"], limits["image"], classes, HALF, HALF)

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase:
        tokenizer = make_tokenizer(511)
        tokenizer.add_tokens([" seconds"])  # a common word, one token of a large vocabulary; it stands at every time
        return tokenizer

    @classmethod
    def tiny_config(cls, tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:  # pyright: ignore
        text = tiny_text(tokenizer)
        text["rope_parameters"] |= {"mrope_section": [12, 2, 2], "mrope_interleaved": True}
        text.pop("bos_token_id")
        return Qwen3VLConfig(
            text_config=text,
            vision_config={
                "depth": 3,
                "initializer_range": 0.08,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **media_tokens(tokenizer),
            tie_word_embeddings=True,
        )

    @classmethod
    def tiny_files(cls, config: Any) -> dict[str, str]:
        # the limits of a video are for all of its frames: a token a pair, up to an hour of them
        return cls.processor_files(config.vision_config, {"video": (32 * 32, 32 * 32), "image": (32 * 32, 128 * 128)})

    # ---- media

    def measure(self, clip: Clip) -> MediaSize:
        size = super().measure(clip)
        if clip.kind == "image":
            return size
        from longrl.video.decode import nearest_times

        text = sum(len(tokens) for tokens in self._times(torch.from_numpy(nearest_times(clip))))
        return replace(size, prompt_tokens=size.num_tokens + text)

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        is_image = media.clip is not None and media.clip.kind == "image"
        return len(media.embeds) + (0 if is_image else sum(map(len, self._times(media.timestamps_s))))

    def _times(self, timestamps: Tensor) -> list[list[int]]:
        """What stands around the tokens of each temporal patch: its time, the marks of beginning and end."""
        temporal = self.vision.config.temporal_patch_size
        padded = torch.cat([timestamps, timestamps[-1:].expand(-len(timestamps) % temporal)]).unflatten(
            0, (-1, temporal)
        )
        times = ((padded[:, 0] + padded[:, -1]) / 2).tolist()
        texts = [f"<{time:.1f} seconds><|vision_start|><|vision_end|>" for time in times]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore

    # ---- prompts

    def template_ids(self, example: Example, num_media: int) -> list[int]:
        """Without the marks that the template puts around a video: each of its frames has its own."""
        ids = super().template_ids(example, num_media)
        video = self.token_id(self.placeholders["video"])
        around = [i for i, token in enumerate(ids) if token == video]
        dropped = {i + side for i in around for side in (-1, 1)}
        config = self.model.config
        marks = [ids[i + side] for i in around for side in (-1, 1)]
        if marks != [config.vision_start_token_id, config.vision_end_token_id] * len(around):
            raise ValueError("the chat template does not put <|vision_start|> and <|vision_end|> around a video")
        return [token for i, token in enumerate(ids) if i not in dropped]

    def expand(self, media: MediaEmbeds, pad: int) -> tuple[list[int], Ranges]:
        if self.pads[pad] == "image":
            return super().expand(media, pad)
        each, rest = divmod(len(media.embeds), media.grid_thw[0])
        assert rest == 0, f"media {media.key}: {len(media.embeds)} embeddings of {media.grid_thw[0]} temporal patches"
        tokens: list[int] = []
        ranges: list[tuple[int, int]] = []
        for *before, end in self._times(media.timestamps_s):
            tokens += before
            ranges.append((len(tokens), len(tokens) + each))
            tokens += [pad] * each + [end]
        return tokens, tuple(ranges)

    def positions(self, length: int, media: Sequence[MediaEmbeds], slots: Sequence[Ranges]) -> Tensor:
        """Text counts up on all three axes; a frame's tokens are (0, row, column) from where it starts, and the text
        after it continues max(rows, columns) further: times are text, not positions."""
        merge = self.vision.config.spatial_merge_size
        step = torch.ones(length, dtype=torch.int64)
        out = torch.zeros(3, length, dtype=torch.int64)
        for item, ranges in zip(media, slots, strict=True):
            h, w = item.grid_thw[1] // merge, item.grid_thw[2] // merge
            grid = _grid(h, w)
            for start, end in ranges:
                assert end - start == h * w, f"media {item.key}: {end - start} tokens of a frame of {h} x {w}"
                step[start:end] = 0
                step[end - 1] = max(h, w)
                out[:, start:end] = grid
        # where each token starts: behind the steps of all before it, and within a frame where the frame starts
        before = torch.cat([torch.zeros(1, dtype=torch.int64), step.cumsum(0)[:-1]])
        return out + before

    def decoder_inputs(self, prompt: Prompt) -> dict[str, Any]:
        mask = torch.zeros(1, len(prompt), dtype=torch.bool)
        for i in range(len(prompt.media)):
            mask[0, prompt.slot(i)] = True
        levels = [media.deepstack for media in prompt.media if media.deepstack is not None]
        if not levels:
            return {}
        joined = torch.cat(levels, 1).to(self.model.device, self.model.dtype)
        return {"visual_pos_masks": mask.to(self.model.device), "deepstack_visual_embeds": list(joined)}


def _grid(rows: int, columns: int) -> Tensor:
    """int64 [3, rows * columns]: time, row and column of a frame's tokens."""
    h, w = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(h), h, w]).flatten(1)
