"""From examples to prompts: each clip embedded once (or fetched from the cache), then the family's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from longrl.config import CacheConfig
from longrl.data.examples import Skips
from longrl.models.family import Family
from longrl.parallel.ranks import ALONE, Ranks
from longrl.types import Clip, Example, MediaEmbeds, MediaError, Prompt
from longrl.video.cache import EmbedCache
from longrl.video.encode import embed

Change = Callable[[Example, tuple[MediaEmbeds, ...]], tuple[Example, tuple[MediaEmbeds, ...]]]
"""What a control does to an example and its media before the prompt is built."""


class PromptBuilder:
    """Builds the prompts of a run; keeps no embeddings of its own (the cache maps them from disk)."""

    def __init__(self, family: Family, cache: CacheConfig, skips: Skips, ranks: Ranks = ALONE) -> None:
        """skips: the run's, which has counted the rows whose files are missing."""
        self.family, self.skips, self.ranks = family, skips, ranks
        self.cache = EmbedCache(cache.dir, int(cache.max_gib * 2**30))
        self._others = EmbedCache(cache.dir)  # to read what other ranks have looked up, without counting it again
        self._found: dict[Clip, str | MediaError] = {}
        self._counts = [(0, 0)]

    @property
    def hit_rate(self) -> float:
        """Share of the run's look-ups that the cache answered; 1 before the first."""
        counts = [(self.cache.hits, self.cache.misses)] if self.ranks.size == 1 else self._counts
        hits, misses = map(sum, zip(*counts, strict=True))
        return hits / (hits + misses) if hits + misses else 1.0

    def prepare(self, examples: Sequence[Example]) -> None:
        """Shares the clips out to all ranks, which all call this: one looks at a clip and embeds it if the cache does
        not have it, and all believe what it says, so that all skip the same examples.

        Raises:
            RuntimeError: they do not.
        """
        if self.ranks.size == 1:
            return
        clips = list(dict.fromkeys(clip for example in examples for clip in example.clips))
        mine: dict[Clip, str | MediaError] = {}
        for clip in clips[self.ranks.rank :: self.ranks.size]:
            found = self._look(clip)
            mine[clip] = found if isinstance(found, MediaError) else found.key
        said = self.ranks.gather_all((mine, (self.cache.hits, self.cache.misses), sorted(self.skips.names)))
        for rank, (_, _, skipped) in enumerate(said):
            if differing := set(skipped) ^ set(said[0][2]):
                raise RuntimeError(
                    f"ranks 0 and {rank} do not see the same files: only one of them skipped {', '.join(differing)}"
                )
        self._found = {clip: found for part, _, _ in said for clip, found in part.items()}
        self._counts = [counts for _, counts, _ in said]

    def __call__(self, examples: Sequence[Example], change: Change | None = None) -> tuple[list[int], list[Prompt]]:
        """Indices of the examples that can be used, and their prompts.

        Raises:
            MediaError: a clip cannot be used and `data.on_error` is `raise`.
            ValueError: too many were skipped.
        """
        kept: list[int] = []
        prompts: list[Prompt] = []
        media: dict[Clip, MediaEmbeds | MediaError] = {}
        for index, example in enumerate(examples):
            for clip in example.clips:
                if clip not in media:
                    media[clip] = self._see(clip)
            looked = [media[clip] for clip in example.clips]
            if errors := [one for one in looked if isinstance(one, MediaError)]:
                self.skips.record(example.id, errors[0])
                continue
            found = zip(looked, example.clips, strict=True)
            seen = tuple(replace(one, clip=clip) for one, clip in found if isinstance(one, MediaEmbeds))
            shown, seen = change(example, seen) if change else (example, seen)
            kept.append(index)
            prompts.append(self.family.prompt(shown, seen))
        return kept, prompts

    def _look(self, clip: Clip) -> MediaEmbeds | MediaError:
        try:
            return embed(clip, self.family, self.cache)
        except MediaError as error:
            return error

    def _see(self, clip: Clip) -> MediaEmbeds | MediaError:
        found = self._found.get(clip)
        if found is None:
            return self._look(clip)
        media = found if isinstance(found, MediaError) else self._others.get(found)
        if media is None:  # evicted since, or the rank that looked has another disk
            media = self._look(clip)
            if isinstance(media, MediaError):
                raise RuntimeError(f"{media}; another rank could use it, and all ranks must use the same examples")
        return media


def response_ids(family: Family, text: str) -> list[int]:
    """A written response as the tokens that a model would have sampled: its text, then the end of the turn."""
    stop = family.tokenizer.eos_token_id
    assert stop in family.stop_ids, f"eos_token {family.tokenizer.eos_token} does not end a response"
    return [*family.tokenizer.encode(text, add_special_tokens=False), stop]
