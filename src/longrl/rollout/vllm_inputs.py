"""Prompts as vLLM's engine takes them: embeddings of the cache, not pixels, at their placeholders.

no media                  token ids
positions of one axis     token ids, and a row for each token that is none           (VILA: prompt_embeds)
positions of three axes   token ids, and media, of which vLLM computes the positions (Qwen2.5-VL, Qwen3-VL)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longrl.types import MediaEmbeds, Prompt

FRAMES_APART = frozenset({"qwen3_vl"})
"""Families with text between a video's frames, which vLLM looks for from the mark before the first one on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """A clip of a prompt, by vLLM's names."""

    modality: str
    fields: dict[str, Tensor]
    offset: int
    """Where it begins in the prompt."""
    is_embed: Tensor
    """bool [length]: which tokens from there on its embeddings fill."""
    key: str
    """What identifies its content."""


def media_items(prompt: Prompt, model_type: str) -> list[MediaItem]:
    """Of a model with three axes of positions."""
    items = []
    for media, ranges in zip(prompt.media, prompt.media_slots, strict=True):
        kind = _kind(media)
        begin = ranges[0][0] - (kind == "video" and model_type in FRAMES_APART)
        is_embed = torch.zeros(ranges[-1][1] - begin, dtype=torch.bool)
        for start, end in ranges:
            is_embed[start - begin : end - begin] = True
        levels = [media.embeds] if media.deepstack is None else [media.embeds, *media.deepstack]
        fields = {f"{kind}_embeds": torch.cat(levels, -1), f"{kind}_grid_thw": torch.tensor(media.grid_thw)}
        if kind == "video":
            fields["second_per_grid_ts"] = torch.tensor(media.seconds_per_grid, dtype=torch.float64)
        items.append(MediaItem(modality=kind, fields=fields, offset=begin, is_embed=is_embed, key=media.key))
    return items


def media_rows(prompt: Prompt, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a model with one axis of positions: a row [P, width] for each token, zeros where the model looks up its own,
    and which tokens those are, bool [P]."""
    rows = torch.zeros(len(prompt), width, dtype=dtype)
    is_token = torch.ones(len(prompt), dtype=torch.bool)
    for index, media in enumerate(prompt.media):
        where = prompt.slot(index)
        rows[where], is_token[where] = media.embeds.to(dtype), False
    return rows, is_token


def engine_input(prompt: Prompt, model_type: str, width: int, dtype: torch.dtype) -> Any:
    """One of vLLM's records of vllm.inputs; needs vLLM.

    Args:
        width: of an embedding.
        dtype: that the engine computes in.
    """
    from vllm.inputs import embeds_input, mm_input, tokens_input  # pyright: ignore[reportMissingImports]

    token_ids: list[int] = prompt.token_ids.tolist()
    if not prompt.media:
        return tokens_input(token_ids)
    if len(prompt.position_ids) == 1:
        rows, is_token = media_rows(prompt, width, dtype)
        return embeds_input(rows, prompt_token_ids=token_ids, is_token_ids=is_token.tolist())
    from vllm.multimodal.inputs import PlaceholderRange  # pyright: ignore[reportMissingImports]

    items = media_items(prompt, model_type)
    by_kind = {kind: [item for item in items if item.modality == kind] for kind in {item.modality for item in items}}
    return mm_input(
        token_ids,
        _kwargs(by_kind, dtype),
        {kind: [item.key for item in some] for kind, some in by_kind.items()},
        {
            kind: [PlaceholderRange(item.offset, len(item.is_embed), _mask(item.is_embed)) for item in some]
            for kind, some in by_kind.items()
        },
    )


def _kwargs(by_kind: dict[str, list[MediaItem]], dtype: torch.dtype) -> Any:
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems  # pyright: ignore[reportMissingImports]

    def item(one: MediaItem) -> Any:
        made = {}
        for name, x in one.fields.items():
            if name.endswith("_embeds"):
                field = MultiModalFieldConfig.flat_from_sizes(one.modality, torch.tensor([len(x)]))
                made[name] = field.build_elems(name, x.to(dtype))[0]
            else:
                field = MultiModalFieldConfig.batched(one.modality, keep_on_cpu=True)
                made[name] = field.build_elems(name, x[None])[0]
        return MultiModalKwargsItem(made)

    return MultiModalKwargsItems({kind: [item(one) for one in some] for kind, some in by_kind.items()})


def _mask(is_embed: Tensor) -> Tensor | None:
    return None if is_embed.all() else is_embed


def _kind(media: MediaEmbeds) -> str:
    return "video" if media.clip is None else media.clip.kind
