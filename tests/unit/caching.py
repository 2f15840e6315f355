"""Entries of the embedding cache, made up, and what is compared of them."""

from __future__ import annotations

from pathlib import Path

import torch

from longrl.types import MediaEmbeds, MediaSize
from longrl.video.cache import EmbedCache

KEY = "3f" + "0" * 62


def key_of(number: int) -> str:
    return f"{number:02x}" * 32


def make_media(seed: int = 0, num_tokens: int = 50, dtype: torch.dtype = torch.float32, deepstack: bool = False):
    generator = torch.Generator().manual_seed(seed)
    return MediaEmbeds(
        embeds=torch.randn(num_tokens, 16, generator=generator).to(dtype),
        grid_thw=(num_tokens, 2, 2),
        seconds_per_grid=2 / 3,
        timestamps_s=torch.rand(2 * num_tokens, generator=generator, dtype=torch.float64),
        key="",
        deepstack=torch.randn(3, num_tokens, 16, generator=generator).to(dtype) if deepstack else None,
    )


def put(cache: EmbedCache, key: str, media: MediaEmbeds) -> None:
    """Writes an entry in one piece."""
    tensors = [media.embeds, media.timestamps_s, *([] if media.deepstack is None else [media.deepstack])]
    size = MediaSize(
        num_frames=len(media.timestamps_s),
        num_tokens=len(media.embeds),
        prompt_tokens=len(media.embeds),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        chunk_frames=len(media.timestamps_s),
        chunk_tokens=len(media.embeds),
    )
    with cache.writing(key, size) as entry:
        entry.seal(key, [entry.write([media])])


def bits(tensor: torch.Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(media: MediaEmbeds | None) -> tuple | None:
    """Everything but the key, comparable bit for bit."""
    if media is None:
        return None
    tensors = (bits(media.embeds), bits(media.timestamps_s), bits(media.deepstack))
    return (*tensors, media.grid_thw, media.seconds_per_grid)


def entry_path(cache: EmbedCache, key: str) -> Path:
    return cache.dir / key[:2] / f"{key}.safetensors"


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]
