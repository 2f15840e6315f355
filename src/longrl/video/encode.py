"""From a clip to its embeddings: out of the cache, or through the vision tower and into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from longrl.types import Clip, MediaEmbeds, MediaError, MediaSize
from longrl.video.cache import EmbedCache, cache_key, file_digest


class Encoder(Protocol):
    """The part of a model family that sees."""

    @property
    def encoder_id(self) -> str:
        """Stands for all that decides the embeddings besides the clip: preprocessing, encoder weights, dtype."""
        ...

    def measure(self, clip: Clip) -> MediaSize:
        """What `encode` will give of a clip. Nothing is decoded.

        Raises:
            MediaError: The file cannot be used.
        """
        ...

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        """What an embedded clip takes up in a prompt, as `MediaSize.prompt_tokens`."""
        ...

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        """Decodes and encodes a clip chunk by chunk; each has the grid and times of its own frames, and no key.

        Args:
            clip: What to look at.
            chunks: Which of those that `measure` counts; None: all. What a chunk gives does not depend on it.

        Raises:
            MediaError: The file cannot be used.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """A clip, looked up in the cache: little, to be told to others."""

    key: str
    digest: str
    """Of the file's bytes."""
    num_tokens: int
    """That it takes up in a prompt."""
    num_rows: int
    """Of its embeddings: fewer, where the family puts text between them."""
    size: MediaSize | None
    """None: the cache has it."""


def look_up(clip: Clip, family: Encoder, cache: EmbedCache) -> Looked:
    """Looks a clip up; one that the cache does not have is measured, but not decoded.

    Raises:
        MediaError: The file cannot be used.
    """
    digest = cache.digest(clip.path)
    key = cache_key(clip, family.encoder_id, digest)
    if (hit := cache.get(key)) is not None:
        tokens = family.prompt_tokens(replace(hit, clip=clip))
        return Looked(key=key, digest=digest, num_tokens=tokens, num_rows=len(hit.embeds), size=None)
    size = family.measure(clip)
    return Looked(key=key, digest=digest, num_tokens=size.prompt_tokens, num_rows=size.num_tokens, size=size)


def encode(clip: Clip, looked: Looked, family: Encoder, cache: EmbedCache) -> None:
    """Encodes a clip into the cache, a chunk at a time.

    Raises:
        MediaError: The file cannot be used, or changed while it was being encoded.
        OSError: The cache cannot be written.
    """
    with cache.writing(looked.key, looked.size or family.measure(clip)) as entry:
        part = entry.write(family.encode(clip))
        require_unchanged(clip, looked, cache)
        entry.seal(looked.key, [part])


def require_unchanged(clip: Clip, looked: Looked, cache: EmbedCache) -> None:
    """A file that is still being written would leave an entry that belongs to no content at all.

    Raises:
        MediaError: It changed since it was looked up.
    """
    if cache.digest(clip.path) != looked.digest:
        raise MediaError(f"{clip.path}: the file changed while it was being encoded; run again when it is complete")


def embed(clip: Clip, family: Encoder, cache: EmbedCache | None) -> MediaEmbeds:
    """Embeds a clip once: what comes from the cache equals, bit for bit, what the encoder made.

    Args:
        clip: What to look at.
        family: Encodes it where the cache cannot answer. On a hit, the video is not opened.
        cache: None: encode always, store nothing.

    Raises:
        MediaError, OSError: As `encode`.
    """
    if cache is None:
        key = cache_key(clip, family.encoder_id, file_digest(clip.path))
        return replace(_joined(list(family.encode(clip))), key=key, clip=clip)
    looked = look_up(clip, family, cache)
    if looked.size is not None:
        encode(clip, looked, family, cache)
    return replace(require(cache, looked), clip=clip)


def require(cache: EmbedCache, looked: Looked) -> MediaEmbeds:
    """Reads what was there a moment ago.

    Raises:
        OSError: It is gone already.
    """
    media = cache.read(looked.key)
    if media is None:
        raise OSError(f"embedding cache {cache.dir}: an entry was evicted as soon as it was there; raise cache.max_gib")
    return media


def _joined(chunks: list[MediaEmbeds]) -> MediaEmbeds:
    deepstack = [chunk.deepstack for chunk in chunks if chunk.deepstack is not None]
    return replace(
        chunks[0],
        embeds=torch.cat([chunk.embeds for chunk in chunks]),
        grid_thw=(sum(chunk.grid_thw[0] for chunk in chunks), *chunks[0].grid_thw[1:]),
        timestamps_s=torch.cat([chunk.timestamps_s for chunk in chunks]),
        deepstack=torch.cat(deepstack, 1) if deepstack else None,
    )
