"""Qwen2.5-Omni's thinker: images, video, sound, and video with its own sound, aligned in time (TMRoPE).

Reference: Qwen2.5-Omni (arXiv 2503.20215), section 2.2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from longrl.models.omni_audio import OmniAudio, time_chunks
from longrl.models.qwen_processor import make_processor_files
from longrl.models.qwen_vision import QwenVision
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.text import Ranges, tiny_text
from longrl.models.trunk import ATTENTION
from longrl.types import Clip, MediaEmbeds, MediaSize

MARKS = ("<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the twin."""


class Omni(Qwen25VL):
    """See models/family.py for the contract. Checkpoints of the whole model are read for their thinker."""

    model_type = "qwen2_5_omni_thinker"
    model_class, config_class = Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig
    unread = (r"^talker\.", r"^token2wav\.")
    placeholders = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}  # noqa: RUF012

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, files: dict[str, str]) -> None:
        super().__init__(model, tokenizer, files)
        self.audio = OmniAudio(_tower(model, "audio_tower"))

    def make_vision(self, limits: dict[str, tuple[int, int]]) -> QwenVision:
        return QwenVision(self.model_type, _tower(self.model, "visual"), limits)

    def set_attention(self, model: Any) -> None:
        model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa", "audio_config": "sdpa"})

    @classmethod
    def processor_files(cls, vision: Any, limits: dict[str, tuple[int, int]]) -> dict[str, str]:
        classes = ("Qwen2_5OmniProcessor", "Qwen2VLVideoProcessor", "Qwen2VLImageProcessor")
        files = make_processor_files(vision, limits["video"], limits["image"], classes)
        sound = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "chunk_length": 300}
        name = "preprocessor_config.json"
        return files | {name: json.dumps(json.loads(files[name]) | sound, indent=2) + "\n"}

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase:
        tokenizer = super().tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [*cls.placeholders.values(), *MARKS]})
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    @classmethod
    def tiny_config(cls, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5OmniThinkerConfig:  # pyright: ignore
        text = tiny_text(tokenizer)
        text["rope_parameters"] |= {"mrope_section": [12, 2, 2]}
        text.pop("head_dim")
        tokens = {
            "audio_start_token_id": "<|audio_bos|>",
            "audio_end_token_id": "<|audio_eos|>",
            "vision_start_token_id": "<|vision_bos|>",
            "vision_end_token_id": "<|vision_eos|>",
        } | {f"{kind}_token_index": token for kind, token in cls.placeholders.items()}
        ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
        return Qwen2_5OmniThinkerConfig(
            text_config=text,
            vision_config={
                "depth": 2,
                "initializer_range": 0.08,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            audio_config={
                "encoder_layers": 2,
                "initializer_range": 0.08,
                "d_model": 64,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 128,
                "output_dim": 128,
            },
            **ids,
            tie_word_embeddings=True,
        )

    # ---- media

    @property
    def encoder_id(self) -> str:
        both = f"{self.vision.encoder_id} {self.audio.encoder_id}"
        return hashlib.sha256(both.encode()).hexdigest()

    def measure(self, clip: Clip) -> MediaSize:
        if clip.kind != "audio":
            return super().measure(clip)
        size = self.audio.measure(clip)
        marks = 2 if clip.with_video else 0  # by itself its marks are the template's
        return replace(size, prompt_tokens=size.num_tokens + marks)

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        return len(media.embeds) + (2 if media.clip and media.clip.with_video else 0)

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        return self.audio.encode(clip, chunks) if clip.kind == "audio" else super().encode(clip, chunks)

    def encoder_parameters(self, part: str) -> list[torch.nn.Parameter]:
        return [*self.vision.parameters(part), *self.audio.parameters(part)]

    def encode_backward(
        self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None = None
    ) -> None:
        if media.clip and media.clip.kind == "audio":
            self.audio.backward(media, span, grads)
        else:
            super().encode_backward(media, span, grads)

    # ---- prompts

    def expand_together(self, video: MediaEmbeds, sound: MediaEmbeds, pad: int) -> tuple[list[int], list[Ranges]]:
        """What is seen and what is heard in turns, two seconds each."""
        config = self.model.config
        length = int(config.position_id_per_seconds * config.seconds_per_chunk)
        pads = (pad, self.token_id(self.placeholders["audio"]))
        cuts = [
            time_chunks(self._grid(video)[0].numpy(), length),
            time_chunks(torch.arange(len(sound.embeds)).numpy(), length),
        ]
        tokens: list[int] = [config.audio_start_token_id]
        each: list[list[tuple[int, int]]] = [[], []]
        for turn in range(max(map(len, cuts))):
            for which, cut in enumerate(cuts):
                if turn < len(cut):
                    count = cut[turn][1] - cut[turn][0]
                    each[which].append((len(tokens), len(tokens) + count))
                    tokens += [pads[which]] * count
        return [*tokens, config.audio_end_token_id], [tuple(ranges) for ranges in each]

    def positions(self, length: int, media: Sequence[MediaEmbeds], slots: Sequence[Ranges]) -> Tensor:
        """Times are 25 a second, of what is seen and what is heard; images and videos have rows and columns too. Around
        a video with sound, the two marks of the beginning, and of the end, have the same place."""
        out = torch.empty(3, length, dtype=torch.int64)
        here, following = 0, 0  # token index, next position

        def count_up(end: int) -> None:
            nonlocal here, following
            out[:, here:end] = following + torch.arange(end - here)
            here, following = end, following + max(0, end - here)

        for i, (item, ranges) in enumerate(zip(media, slots, strict=True)):
            kind = item.clip.kind if item.clip else "video"
            if kind == "audio":
                if not (item.clip and item.clip.with_video):
                    count_up(ranges[-1][1])  # as text
                continue
            heard = slots[i + 1] if i + 1 < len(media) and _with_video(media[i + 1]) else ()
            if heard:
                count_up(ranges[0][0] - 1)
                following -= 1
            count_up(ranges[0][0])
            rows = following + self._grid(item)
            last = max([ranges[-1], *heard[-1:]])
            sounds = (following + torch.arange(sum(b - a for a, b in heard))).expand(3, -1)
            for where, positions in ((ranges, rows), (heard, sounds)):
                done = 0
                for start, end in where:
                    out[:, start:end] = positions[:, done : done + end - start]
                    done += end - start
            here, following = last[1], int(out[:, slice(*last)].max()) + 1
            if heard:
                count_up(here + 1)
                following -= 1
        count_up(length)
        return out

    def _grid(self, media: MediaEmbeds) -> Tensor:
        """int64 [3, V]: time, row and column of the tokens of an image or video, counted from its start."""
        merge, config = self.vision.config.spatial_merge_size, self.model.config
        t, h, w = media.grid_thw[0], media.grid_thw[1] // merge, media.grid_thw[2] // merge
        times = (
            torch.arange(t) * torch.tensor(media.seconds_per_grid, dtype=torch.float32) * config.position_id_per_seconds
        )
        axes = torch.meshgrid(times.long(), torch.arange(h), torch.arange(w), indexing="ij")
        return torch.stack([axis.flatten() for axis in axes])


def _with_video(media: MediaEmbeds) -> bool:
    return media.clip is not None and media.clip.with_video


def _tower(model: Any, name: str) -> Any:
    """Where it is differs between versions of transformers."""
    return getattr(model, name, None) or getattr(model.model, name)
