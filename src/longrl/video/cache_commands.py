"""`longrl cache build | verify | info`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import track

from longrl.config import DataRunConfig, SftConfig
from longrl.data.examples import Skips, load_examples
from longrl.models import load_family
from longrl.types import Clip, Example, MediaError
from longrl.video.cache import EmbedCache
from longrl.video.encode import Encoder, embed

logger = logging.getLogger(__name__)

LOG_EVERY = 6
"""Clips, where there is no terminal for a progress bar."""


def cache_build(config: DataRunConfig) -> None:
    """Embeds every clip of the training and evaluation data that is not in the cache yet.

    Raises:
        ValueError: The configuration names no data, or the data cannot be used.
        OSError: The cache cannot be written.
    """
    skips, examples = Skips(config.data), list[Example]()
    for path, demonstrations in ((config.data.train, isinstance(config, SftConfig)), (config.data.eval, False)):
        if path is not None:
            examples += load_examples(
                path, config.data, config.video, skips, cache=config.cache, demonstrations=demonstrations
            )
    if not examples:
        raise ValueError("nothing to embed: set data.train or data.eval")
    cache = EmbedCache(config.cache.dir, int(config.cache.max_gib * 2**30))
    clips = (clip for example in examples for clip in example.clips)
    num_embedded = fill(clips, load_family(config.model), cache, skips)
    typer.echo(
        f"{num_embedded - cache.hits} clips encoded, {cache.hits} were there already, {len(skips.names)} skipped"
    )
    cache_info(config.cache.dir)


def fill(clips: Iterable[Clip], family: Encoder, cache: EmbedCache, skips: Skips) -> int:
    """Embeds each distinct clip once, with a progress bar; unusable ones are recorded as skips, by path.

    Returns:
        How many clips are in the cache now.
    """
    num_embedded, console, distinct = 0, Console(stderr=True), list(dict.fromkeys(clips))
    for done, clip in enumerate(track(distinct, "embedding videos", console=console, transient=True)):
        if done % LOG_EVERY == 0 and not console.is_terminal:
            logger.info("%d of %d clips embedded", done, len(distinct))
        try:
            embed(clip, family, cache)
            num_embedded += 1
        except MediaError as error:
            skips.record(clip.path, error)
    return num_embedded


def cache_verify(dir: str | Path) -> None:
    """Checks every entry against its checksum; the bad ones are removed.

    Raises:
        ValueError: There were bad entries; names them.
    """
    cache = _existing(dir)
    num_entries = cache.info().num_entries
    if bad := cache.verify():
        names = ", ".join(f"{entry.path} ({entry.reason})" for entry in bad)
        raise ValueError(
            f"{len(bad)} of {num_entries} entries were damaged and are removed; run again to encode them anew: {names}"
        )
    typer.echo(f"{num_entries} entries, all as they were written")


def cache_info(dir: str | Path) -> None:
    """Prints what a cache holds.

    Raises:
        ValueError: There is no such folder.
    """
    info = _existing(dir).info()
    typer.echo(f"{dir}: {info.num_entries} entries, {info.size_bytes / 2**20:.1f} MiB")


def _existing(dir: str | Path) -> EmbedCache:
    if not Path(dir).is_dir():
        raise ValueError(f"{dir}: no such cache folder; give the value of cache.dir")
    return EmbedCache(dir)
