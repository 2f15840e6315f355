"""From examples to prompts: each clip embedded once (or fetched from the cache), then the family's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from longrl.config import CacheConfig, DataConfig, DataRunConfig, QuickstartConfig
from longrl.data.clips import Clips
from longrl.data.examples import Skips
from longrl.models import device_of
from longrl.models.family import Family
from longrl.parallel.ranks import ALONE, Ranks
from longrl.plan.devices import host_share_bytes
from longrl.plan.plan import max_prompt_tokens
from longrl.types import Clip, Example, MediaEmbeds, MediaError, Prompt
from longrl.video.cache import EmbedCache
from longrl.video.encode import Looked

T = TypeVar("T", Looked, MediaEmbeds)

Change = Callable[[Example, tuple[MediaEmbeds, ...]], tuple[Example, tuple[MediaEmbeds, ...]]]
"""What a control does to an example and its media before the prompt is built."""


def prompt_limit(config: DataRunConfig | QuickstartConfig, data: DataConfig, ranks: Ranks) -> tuple[int | None, str]:
    """Tokens of the longest prompt that a run has room for, and what says so; the same on all ranks, which all call it.

    Args:
        data: of the run; a quickstart makes one for each stage.

    Raises:
        ValueError: there is no room for a prompt of any length.
    """
    planned = None
    if isinstance(config, DataRunConfig):
        gpu_bytes = None
        if device_of(config.model) == "cuda":
            gpu_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        gpus, hosts = zip(*ranks.gather_all((gpu_bytes, host_share_bytes())), strict=True)
        # of the least of either, as `sp: auto` plans
        planned = max_prompt_tokens(config, ranks.size, None if None in gpus else min(gpus), min(hosts))
        if planned == 0:
            raise ValueError(
                f"model.path {config.model.path}: the memory plan has no room for a prompt of any length beside the "
                "weights and what training keeps of them; longrl check names a change that makes it fit"
            )
    if planned is None or (data.max_prompt_tokens is not None and data.max_prompt_tokens <= planned):
        return data.max_prompt_tokens, "data.max_prompt_tokens"
    return planned, "the memory plan (longrl check; a larger parallel.sp divides a prompt among more processes)"


class PromptBuilder:
    """Builds the prompts of a run; keeps no embeddings of its own (the cache maps them from disk)."""

    def __init__(
        self,
        family: Family,
        cache: CacheConfig,
        skips: Skips,
        ranks: Ranks = ALONE,
        max_tokens: int | None = None,
        limit: str = "data.max_prompt_tokens",
    ) -> None:
        """
        Args:
            skips: the run's, which has counted the rows whose files are missing.
            max_tokens: an example whose prompt would be longer cannot be used, which is known before it is decoded.
            limit: what says so.
        """
        self.family, self.skips, self.ranks = family, skips, ranks
        self.max_tokens, self.limit = max_tokens, limit
        self.clip_rows: int | None = None
        self.cache = EmbedCache(cache.dir, int(cache.max_gib * 2**30))
        self.clips = Clips(family, self.cache, ranks)
        self._counts = [(0, 0)]

    def limit_to(self, tokens: int | None, clip_rows: int | None, limit: str) -> None:
        """A further limit; the least of those of all ranks counts, which all call this.

        Args:
            tokens: of the longest prompt; None: no limit of this rank's.
            clip_rows: embeddings of the longest clip; None: as above.
            limit: what says so.
        """
        whole, clip = (
            min((one for one in given if one is not None), default=None)
            for given in zip(*self.ranks.gather_all((tokens, clip_rows)), strict=True)
        )
        if whole is not None and (self.max_tokens is None or whole < self.max_tokens):
            self.max_tokens, self.limit = whole, limit
        self.clip_rows = clip

    @property
    def hit_rate(self) -> float:
        """Share of the run's look-ups that the cache answered; 1 before the first."""
        counts = [(self.cache.hits, self.cache.misses)] if self.ranks.size == 1 else self._counts
        hits, misses = map(sum, zip(*counts, strict=True))
        return hits / (hits + misses) if hits + misses else 1.0

    def prepare(self, examples: Sequence[Example]) -> None:
        """Shares the clips out to all ranks, which all call this, so that all skip the same examples: see clips.py.

        Raises:
            RuntimeError: they do not.
            MediaError, ValueError: as `__call__`.
        """
        if self.ranks.size == 1:
            return
        self.clips.look_up_together(clip for example in examples for clip in example.clips)
        said = self.ranks.gather_all(((self.cache.hits, self.cache.misses), sorted(self.skips.names)))
        for rank, (_, skipped) in enumerate(said):
            if differing := set(skipped) ^ set(said[0][1]):
                raise RuntimeError(
                    f"ranks 0 and {rank} do not see the same files: only one of them skipped {', '.join(differing)}"
                )
        self._counts = [counts for counts, _ in said]
        kept, looked = self._look_up(examples)
        lengths: dict[Clip, int] = {}
        for example in (examples[index] for index in kept):
            length = self.family.count_tokens(example, [looked[clip].num_tokens for clip in example.clips])
            lengths |= {clip: max(length, lengths.get(clip, 0)) for clip in example.clips}
        self.clips.encode_together(lengths)

    def __call__(self, examples: Sequence[Example], change: Change | None = None) -> tuple[list[int], list[Prompt]]:
        """Indices of the examples that can be used, and their prompts.

        Raises:
            MediaError: a clip cannot be used, or a prompt is too long, and `data.on_error` is `raise`.
            ValueError: too many were skipped.
        """
        fitting, looked = self._look_up(examples)
        kept: list[int] = []
        prompts: list[Prompt] = []
        media: dict[Clip, MediaEmbeds | MediaError] = {}
        for index in fitting:
            example = examples[index]
            for clip in example.clips:
                if clip not in media:
                    media[clip] = self.clips.embeds(clip, looked[clip])
            seen = self._usable(example, [media[clip] for clip in example.clips])
            if seen is None:
                continue
            seen = tuple(replace(one, clip=clip) for one, clip in zip(seen, example.clips, strict=True))
            shown, seen = change(example, seen) if change else (example, seen)
            kept.append(index)
            prompts.append(self.family.prompt(shown, seen))
        return kept, prompts

    def _look_up(self, examples: Sequence[Example]) -> tuple[list[int], dict[Clip, Looked]]:
        """Indices of the examples whose clips are there and whose prompts are short enough, and what is known of the
        clips; the other examples are skipped. Nothing is decoded."""
        found: dict[Clip, Looked | MediaError] = {}
        kept: list[int] = []
        for index, example in enumerate(examples):
            for clip in example.clips:
                if clip not in found:
                    found[clip] = self.clips.look_up(clip)
            looked = self._usable(example, [found[clip] for clip in example.clips])
            if looked is not None and self._fits(example, looked):
                kept.append(index)
        return kept, {clip: looked for clip, looked in found.items() if isinstance(looked, Looked)}

    def _usable(self, example: Example, found: Sequence[T | MediaError]) -> list[T] | None:
        """What was found, unless the example is skipped for an error among it."""
        usable = [one for one in found if not isinstance(one, MediaError)]
        for error in found:
            if isinstance(error, MediaError):
                self.skips.record(example.id, MediaError(f"example {example.id}: {error}"))
                return None
        return usable

    def _fits(self, example: Example, looked: Sequence[Looked]) -> bool:
        fewer = "sample fewer frames (fps, num_frames, a shorter span)"
        media_tokens = [one.num_tokens for one in looked]
        longest = max((one.num_rows for one in looked), default=0)
        if self.clip_rows is not None and longest > self.clip_rows:
            found = f"a clip of {longest} embeddings, but the engine has room for {self.clip_rows}"
            mend = "set data.max_prompt_tokens to the longest prompt, for which it makes room"
        elif self.max_tokens is not None and (n := self.family.count_tokens(example, media_tokens)) > self.max_tokens:
            media = f"{sum(media_tokens)} of them media"
            found = f"its prompt would have {n} tokens, {media}, and {self.limit} allows {self.max_tokens}"
            mend = "lower video.max_pixels, or make room for more"
        else:
            return True
        self.skips.record(example.id, MediaError(f"example {example.id}: {found}; {fewer}, or {mend}"))
        return False


def response_ids(family: Family, text: str, whose: str = "the response") -> list[int]:
    """A written response as the tokens that a model would have sampled: its text, then the end of the turn.

    Args:
        whose: for messages.

    Raises:
        ValueError: the text has tokens that the model has no embeddings of.
    """
    stop = family.tokenizer.eos_token_id
    assert stop in family.stop_ids, f"eos_token {family.tokenizer.eos_token} does not end a response"
    ids = [*family.tokenizer.encode(text, add_special_tokens=False), stop]
    family.require_known(ids, f"{whose} {text!r:.80}")
    return ids
