"""From a clip to its embeddings: out of the cache, or through the vision tower and into the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from longrl.types import Clip, MediaEmbeds, MediaError
from longrl.video.cache import EmbedCache, cache_key, file_digest


class Encoder(Protocol):
    """The part of a model family that sees."""

    @property
    def encoder_id(self) -> str:
        """Stands for all that decides the embeddings besides the clip: preprocessing, encoder weights, dtype."""
        ...

    def encode(self, clip: Clip) -> MediaEmbeds:
        """Decodes and encodes a clip. The key of the result is left empty.

        Raises:
            MediaError: The file cannot be used.
        """
        ...


def embed(clip: Clip, family: Encoder, cache: EmbedCache | None) -> MediaEmbeds:
    """Embeds a clip once: what comes from the cache equals, bit for bit, what the encoder made.

    Args:
        clip: What to look at.
        family: Encodes it where the cache cannot answer. On a hit, the video is not opened.
        cache: None: encode always, store nothing.

    Raises:
        MediaError: The file cannot be used, or changed while it was being encoded.
        OSError: The cache cannot be written.
    """
    digest = cache.digest(clip.path) if cache else file_digest(clip.path)
    key = cache_key(clip, family.encoder_id, digest)
    if cache and (hit := cache.get(key)) is not None:
        return hit
    media = replace(family.encode(clip), key=key)
    if cache:
        # A file that is still being written would leave an entry that belongs to no content at all.
        if cache.digest(clip.path) != digest:
            raise MediaError(f"{clip.path}: the file changed while it was being encoded; run again when it is complete")
        cache.put(key, media)
    return media
