"""Qwen2.5-VL: preprocessing, M-RoPE positions, prompts and checkpoint layout around transformers' own classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from longrl.models.qwen_processor import (
    DEFAULT_LIMITS,
    MEAN,
    PROCESSOR_FILES,
    STD,
    even_chunks,
    frame_size,
    make_processor_files,
    pixel_limits,
    seconds_per_grid,
)
from longrl.models.tiny import make_tokenizer
from longrl.models.trunk import ATTENTION, TrunkParts
from longrl.types import Clip, Example, Frames, MediaEmbeds, MediaError, MediaSize, Prompt

if TYPE_CHECKING:
    from longrl.video.decode import Selection

PREPROCESSING = 2
"""Raise it when `patches` or what is encoded together changes: cached embeddings are then made again."""
CHUNK_PATCHES, CHUNK_GRIDS, CHUNK_BYTES = 2**14, 64, 64 * 2**20
"""The tower sees at most so many patches at a time, temporal patches, and bytes of pixels; one temporal patch at least.
The first two bound what it keeps, the last what is decoded."""
BACKWARD_PATCHES = 4096
"""The tower is differentiated over at most so many patches at a time, or one temporal patch."""
VIDEO_TOKEN = "<|video_pad|>"


class Qwen25VL:
    """See models/family.py for the contract."""

    model_type = "qwen2_5_vl"

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        processor_files: dict[str, str],
    ) -> None:
        """processor_files: name -> text of the PROCESSOR_FILES of this checkpoint; `save` writes them again."""
        text: Any = model.config.text_config
        if text.use_sliding_window or text.attention_dropout:
            raise ValueError(
                "sliding-window attention and attention dropout are not supported; set both off in config.json"
            )
        self.model, self.tokenizer, self.processor_files = model, tokenizer, processor_files
        self.min_pixels, self.max_pixels = pixel_limits(processor_files)
        self._encoder_id: tuple[list[int], str] | None = None
        model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
        model.eval()

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Qwen25VL:
        try:
            with _only_errors():
                # sizes that differ are listed rather than raised, so that the message can name them
                model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                    path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
                )
            _refuse_missing(info)
            for parameter in model.parameters():
                # as read, tensors lie in memory as in the file, and products round differently by alignment: a resumed
                # run would leave the path of one that never stopped
                parameter.data = parameter.data.clone()
            tokenizer = AutoTokenizer.from_pretrained(path)
            if tokenizer.convert_tokens_to_ids(VIDEO_TOKEN) != model.config.video_token_id:
                raise ValueError(f"its tokenizer does not have {VIDEO_TOKEN} where config.json says; copy it again")
            if not tokenizer.chat_template:
                raise ValueError("its tokenizer has no chat template; add chat_template.jinja")
            files = {name: (path / name).read_text() for name in PROCESSOR_FILES if (path / name).exists()}
            return cls(model, tokenizer, files or make_processor_files(model.config.vision_config, *DEFAULT_LIMITS))
        except SafetensorError as error:
            raise ValueError(f"model.path {path}: its weights cannot be read ({error}); copy them again") from error
        except ValueError as error:
            raise ValueError(f"model.path {path}: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"model.path {path}: {error}") from error

    @classmethod
    def tiny(cls, seed: int, dtype: torch.dtype) -> Qwen25VL:
        tokenizer = make_tokenizer()

        def token_id(token: str) -> int:
            return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "initializer_range": 0.08,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1 << 18,
                "tie_word_embeddings": True,
                # fast enough to tell neighbours apart, slow enough to find the same thing an hour away
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [12, 2, 2]},
                "bos_token_id": None,
                "eos_token_id": token_id("<|im_end|>"),
                "pad_token_id": token_id("<|endoftext|>"),
            },
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
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # not .to(dtype): that would round the rotary frequencies too, which loading keeps in fp32
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return cls(model, tokenizer, make_processor_files(config.vision_config, 28 * 28, 28 * 28))

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        with _only_errors():
            self.model.save_pretrained(path, state_dict=weights)
        self.tokenizer.save_pretrained(path)
        for name, text in self.processor_files.items():
            (path / name).write_text(text)

    @property
    def encoder_id(self) -> str:
        """Hashed at the first use and kept until the weights are written to, as training the encoder does."""
        versions = [x._version for x in self.model.model.visual.state_dict(keep_vars=True).values()]
        if self._encoder_id is None or self._encoder_id[0] != versions:
            self._encoder_id = versions, self._identify()
        return self._encoder_id[1]

    def _identify(self) -> str:
        base = PreTrainedConfig().to_dict().keys()
        about = {
            "family": self.model_type,
            "preprocessing": [PREPROCESSING, self.min_pixels, self.max_pixels],
            "dtype": str(self.model.dtype),
            # without what every config has: the version of transformers, labels, ...
            "vision_config": {key: value for key, value in self._vision.to_dict().items() if key not in base},
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in sorted(self.model.model.visual.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
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

    def measure(self, clip: Clip) -> MediaSize:
        from longrl.video.decode import select_frames

        return self._measure(clip, select_frames(clip))

    def _measure(self, clip: Clip, selected: Selection) -> MediaSize:
        index, vision, num_frames = selected.index, self._vision, len(selected.chosen)
        try:
            # shown upright, height and width may change places, which the number of patches does not depend on
            height, width = self._size(index.height, index.width, clip.max_pixels)
        except ValueError as error:
            raise MediaError(f"{clip.path}: {error}") from error
        temporal = vision.temporal_patch_size
        patches = height * width // vision.patch_size**2
        grids = min(CHUNK_PATCHES // patches, CHUNK_GRIDS, CHUNK_BYTES // (temporal * 3 * index.height * index.width))
        tokens = patches // vision.spatial_merge_size**2
        num_tokens = -(-num_frames // temporal) * tokens
        return MediaSize(
            num_frames=num_frames,
            num_tokens=num_tokens,
            num_bytes=num_tokens * vision.out_hidden_size * self.model.dtype.itemsize + 8 * num_frames,
            chunk_frames=temporal * max(1, grids),
            chunk_tokens=tokens * max(1, grids),
        )

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        from longrl.video.decode import select_frames

        selected = select_frames(clip)
        size = self._measure(clip, selected)
        part = None if chunks is None else range(chunks.start * size.chunk_frames, chunks.stop * size.chunk_frames)
        times = torch.from_numpy(selected.times_s)
        seconds = seconds_per_grid(clip, times, self._vision.temporal_patch_size)
        # a map keeps no chunk of pixels while the next one is decoded, as a loop would
        return map(partial(self._encode_chunk, clip, seconds), selected.read(size.chunk_frames, part))

    @torch.no_grad()
    def _encode_chunk(self, clip: Clip, seconds_per_grid: float, frames: Frames) -> MediaEmbeds:
        embeds, grid = self.encode_frames([frames], clip.max_pixels)
        return MediaEmbeds(
            embeds=embeds.cpu(),
            grid_thw=grid,
            seconds_per_grid=seconds_per_grid,
            timestamps_s=torch.from_numpy(frames.timestamps_s),
            key="",
        )

    def encode_frames(
        self, chunks: Iterable[Frames], max_pixels: int | None = None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        embeds, grid_t, grid_hw = [], 0, (0, 0)
        for pixels in even_chunks(chunks, self._vision.temporal_patch_size):
            rows, grid = self.patches(pixels, max_pixels)
            grids = torch.tensor([grid], device=rows.device)
            embeds.append(self.model.model.visual(rows, grid_thw=grids).pooler_output)
            grid_t, grid_hw = grid_t + grid[0], grid[1:]
        return torch.cat(embeds), (grid_t, *grid_hw)

    def encoder_parameters(self, part: str) -> list[torch.nn.Parameter]:
        visual = self.model.model.visual
        named = {"tower": visual, "projector": visual.merger}[part].named_parameters()
        return [p for name, p in named if part == "projector" or not name.startswith("merger.")]

    def encode_backward(self, media: MediaEmbeds, span: slice, grads: Tensor) -> None:
        """A temporal patch attends to itself alone, so any division into whole ones gives what `encode` gave."""
        from longrl.video.decode import select_frames

        assert media.clip, f"media {media.key} comes from no clip"
        (t, h, w), temporal = media.grid_thw, self._vision.temporal_patch_size
        selected = select_frames(media.clip)
        grids = -(-len(selected.chosen) // temporal)
        assert grids == t, f"{media.clip.path}: {grids} temporal patches, {t} before"
        first = 0
        for frames in selected.read(max(1, BACKWARD_PATCHES // (h * w)) * temporal):
            end = first + -(-len(frames.pixels) // temporal) * h * w // self._vision.spatial_merge_size**2
            here = slice(max(first, span.start), min(end, span.stop))
            if here.start < here.stop:
                embeds, _ = self.encode_frames([frames], media.clip.max_pixels)
                part = grads[here.start - span.start : here.stop - span.start]
                embeds[here.start - first : here.stop - first].backward(part.to(embeds))
            first = end
            if first >= span.stop:
                break

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
        height, width = self._size(pixels.shape[1], pixels.shape[2], max_pixels)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        x = (x.float() / 255 - mean) / std
        t, h, w = len(x) // temporal, height // patch, width // patch
        x = x.view(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return x.to(self.model.device, self.model.dtype), (t, h, w)

    def _size(self, height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
        limit = min(self.max_pixels, max_pixels or self.max_pixels)
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        return frame_size(height, width, factor, min(self.min_pixels, limit), limit)

    # ---- prompts

    def count_tokens(self, example: Example, media_tokens: Sequence[int]) -> int:
        return len(self._template_ids(example, len(media_tokens))) - len(media_tokens) + sum(media_tokens)

    def _template_ids(self, example: Example, num_media: int) -> list[int]:
        """The tokens of an example, one placeholder for each of its clips."""
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
        if (found := ids.count(self.model.config.video_token_id)) != num_media:
            raise ValueError(f"example {example.id}: {found} video placeholders in the text for {num_media} clips")
        return ids

    def prompt(self, example: Example, media: tuple[MediaEmbeds, ...]) -> Prompt:
        pad = self.model.config.video_token_id
        token_ids: list[int] = []
        slots: list[tuple[int, int]] = []
        for token in self._template_ids(example, len(media)):
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


def _refuse_missing(info: dict[str, Any]) -> None:
    """An error where transformers fills in random numbers: what a checkpoint lacks, or has in another size."""
    missing = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} weights are missing or of another size than config.json says: {names}; copy them again"
        )


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keeps transformers' progress bars and table of weights off the terminal; what matters of them is raised."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
