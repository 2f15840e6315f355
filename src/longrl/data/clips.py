"""The clips of a batch: who looks them up, who encodes them, and what the ranks tell each other about it.

Each clip that the cache lacks is encoded once. One with at least as many chunks (`MediaSize`) as ranks will share its
prompt is split: it goes to one such group, whose ranks decode and encode a run of chunks each, and write the rows to
their place in the entry's file. Other clips are dealt out whole, to all ranks. What travels is keys, sizes and errors.

A part is read in the quick way only, and where a rank cannot go on, or the parts do not fit together, the group's first
rank encodes the whole clip: what becomes of a damaged file, and what is said about it, is what one process would do.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from longrl.models.family import Family
from longrl.parallel.layout import balanced
from longrl.parallel.ranks import Ranks
from longrl.types import Clip, MediaEmbeds, MediaError
from longrl.video.cache import EmbedCache
from longrl.video.encode import Looked, encode, look_up, require, require_unchanged
from longrl.video.entry import EntryFile, Part

logger = logging.getLogger(__name__)


class Clips:
    """Looks clips up and embeds them, in one process or with others."""

    def __init__(self, family: Family, cache: EmbedCache, ranks: Ranks) -> None:
        self.family, self.cache, self.ranks = family, cache, ranks
        self._looked: dict[Clip, Looked | MediaError] = {}
        """What all ranks have been told; of one process nothing."""
        self._apart: set[Ranks] = set()
        """Layouts in which the ranks of this group do not see each other's files in the cache."""

    def look_up_together(self, clips: Iterable[Clip]) -> None:
        """Deals clips to all ranks, which all call this; one looks at a clip, and all believe what it says."""
        unique = list(dict.fromkeys(clips))
        mine = {clip: self._look(clip) for clip in unique[self.ranks.rank :: self.ranks.size]}
        self._looked = {clip: found for part in self.ranks.gather_all(mine) for clip, found in part.items()}

    def look_up(self, clip: Clip) -> Looked | MediaError:
        """What is known of a clip, without decoding it."""
        return self._looked.get(clip) or self._look(clip)

    def _look(self, clip: Clip) -> Looked | MediaError:
        try:
            return look_up(clip, self.family, self.cache)
        except MediaError as error:
            return error

    def encode_together(self, lengths: Mapping[Clip, int]) -> None:
        """Encodes those of the clips, looked up together, that the cache lacks. All ranks call this.

        Args:
            lengths: tokens of the longest prompt with each clip, which say how many ranks share it.
        """
        ranks = self.ranks
        together: defaultdict[Ranks, list[tuple[Clip, Looked]]] = defaultdict(list)
        whole: list[tuple[Clip, Looked]] = []
        for clip, tokens in lengths.items():
            looked = self._looked[clip]
            if isinstance(looked, Looked) and looked.size is not None:
                layout = ranks.layout(tokens)
                is_long = 1 < layout.sp_size <= looked.size.num_chunks
                (together[layout] if is_long else whole).append((clip, looked))
        errors = {clip: self._encode(clip, looked) for clip, looked in _share(whole, ranks.rank, ranks.size)}
        for layout, some in together.items():
            for clip, looked in _share(some, layout.dp_rank, layout.dp_size):
                errors[clip] = self._encode_split(clip, looked, layout)
        for part in ranks.gather_all({clip: error for clip, error in errors.items() if error is not None}):
            self._looked |= part

    def embeds(self, clip: Clip, looked: Looked) -> MediaEmbeds | MediaError:
        """The embeddings of a clip that was looked up: out of the cache, or encoded now.

        Raises:
            RuntimeError: this rank cannot use what another could.
        """
        media = self.cache.read(looked.key)
        if media is None:  # not encoded yet; or evicted since; or the rank that did it has another disk
            error = self._encode(clip, looked)
            if error is not None and clip in self._looked:
                raise RuntimeError(f"{error}; another rank could use it, and all ranks must use the same examples")
            media = error or require(self.cache, looked)
        return media

    def _encode(self, clip: Clip, looked: Looked) -> MediaError | None:
        try:
            encode(clip, looked, self.family, self.cache)
        except MediaError as error:
            return error

    def _encode_split(self, clip: Clip, looked: Looked, ranks: Ranks) -> MediaError | None:
        """On every rank of a sequence group; the first one opens the file and closes it."""
        first = ranks.sp_rank == 0
        assert looked.size is not None
        if ranks not in self._apart:
            with self.cache.writing(looked.key, looked.size) if first else nullcontext() as entry:
                name = ranks.once(lambda: entry.path.relative_to(self.cache.dir) if entry else Path())
                mine = EntryFile(self.cache.dir / name, looked.size)
                said = ranks.gather_sp(self._write_share(mine, clip, looked, ranks))
                parts = [part for part in said if isinstance(part, Part)]
                parts = [part for part in parts if part.about == parts[0].about]
                if entry is not None and len(parts) == len(said):
                    entry.seal(looked.key, parts)
            if len(parts) == len(said):
                return None
            if None in said:
                self._apart.add(ranks)
                if first:
                    logger.warning(
                        "cache.dir %s is not one folder for all ranks, so each encodes every clip by itself; name a "
                        "folder that they share",
                        self.cache.dir,
                    )
        return ranks.once(self._encode, clip, looked)

    def _write_share(self, entry: EntryFile, clip: Clip, looked: Looked, ranks: Ranks) -> Part | MediaError | None:
        """Decodes and encodes this rank's chunks; None: it does not see the file."""
        size = entry.size
        start, stop = (size.num_chunks * (ranks.sp_rank + i) // ranks.sp_size for i in (0, 1))
        if not entry.path.exists():
            return None
        try:
            chunks = self.family.encode(clip, range(start, stop))
            with self.cache.explained(size):
                part = entry.write(chunks, start)
            require_unchanged(clip, looked, self.cache)
            return part
        except MediaError as error:
            return error


def _share(clips: Sequence[tuple[Clip, Looked]], rank: int, size: int) -> list[tuple[Clip, Looked]]:
    """Those that fall to one of so many, who get about as many frames each."""
    frames = [looked.size.num_frames if looked.size else 0 for _, looked in clips]
    return [clips[i] for i in balanced(frames, size)[rank]]
