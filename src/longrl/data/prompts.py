"""From examples to prompts: each clip embedded once (or fetched from the cache), then the family's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longrl.config import CacheConfig
from longrl.data.examples import Skips
from longrl.models.family import Family
from longrl.types import Clip, Example, MediaEmbeds, MediaError, Prompt
from longrl.video.cache import EmbedCache
from longrl.video.encode import embed

Change = Callable[[Example, tuple[MediaEmbeds, ...]], tuple[Example, tuple[MediaEmbeds, ...]]]
"""What a control does to an example and its media before the prompt is built."""


class PromptBuilder:
    """Builds the prompts of a run; keeps no embeddings of its own (the cache maps them from disk)."""

    def __init__(self, family: Family, cache: CacheConfig, skips: Skips) -> None:
        """skips: the run's, which has counted the rows whose files are missing."""
        self.family, self.skips = family, skips
        self.cache = EmbedCache(cache.dir, int(cache.max_gib * 2**30))

    def __call__(self, examples: Sequence[Example], change: Change | None = None) -> tuple[list[int], list[Prompt]]:
        """Indices of the examples that can be used, and their prompts.

        Raises:
            MediaError: a clip cannot be used and `data.on_error` is `raise`.
            ValueError: too many were skipped.
        """
        kept: list[int] = []
        prompts: list[Prompt] = []
        media: dict[Clip, MediaEmbeds] = {}
        for index, example in enumerate(examples):
            try:
                for clip in example.clips:
                    if clip not in media:
                        media[clip] = embed(clip, self.family, self.cache)
            except MediaError as error:
                self.skips.record(example.id, error)
                continue
            seen = tuple(media[clip] for clip in example.clips)
            shown, seen = change(example, seen) if change else (example, seen)
            kept.append(index)
            prompts.append(self.family.prompt(shown, seen))
        return kept, prompts


def response_ids(family: Family, text: str) -> list[int]:
    """A written response as the tokens that a model would have sampled: its text, then the end of the turn."""
    stop = family.tokenizer.eos_token_id
    assert stop in family.stop_ids, f"eos_token {family.tokenizer.eos_token} does not end a response"
    return [*family.tokenizer.encode(text, add_special_tokens=False), stop]
