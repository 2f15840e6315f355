"""From examples to prompts: each clip embedded once (or fetched from the cache), then the family's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longrl.config import RunConfig
from longrl.data.examples import Skips
from longrl.models.family import Family
from longrl.types import Clip, Example, MediaEmbeds, MediaError, Prompt
from longrl.video.cache import EmbedCache
from longrl.video.encode import embed

Change = Callable[[Example, tuple[MediaEmbeds, ...]], tuple[Example, tuple[MediaEmbeds, ...]]]
"""What a control does to an example and its media before the prompt is built."""


class PromptBuilder:
    """Builds the prompts of a run; keeps no embeddings of its own (the cache maps them from disk)."""

    def __init__(self, family: Family, config: RunConfig) -> None:
        self.family = family
        self.cache = EmbedCache(config.cache.dir, int(config.cache.max_gib * 2**30))
        self.skips = Skips(config.data)

    def __call__(self, examples: Sequence[Example], change: Change | None = None) -> tuple[list[Example], list[Prompt]]:
        """The examples that can be used, and their prompts.

        Raises:
            MediaError: a clip cannot be used and `data.on_error` is `raise`.
        """
        kept: list[Example] = []
        prompts: list[Prompt] = []
        media: dict[Clip, MediaEmbeds] = {}
        for example in examples:
            try:
                for clip in example.clips:
                    if clip not in media:
                        media[clip] = embed(clip, self.family, self.cache)
            except MediaError as error:
                self.skips.record(example.id, error)
                continue
            seen = tuple(media[clip] for clip in example.clips)
            shown, seen = change(example, seen) if change else (example, seen)
            kept.append(example)
            prompts.append(self.family.prompt(shown, seen))
        return kept, prompts
