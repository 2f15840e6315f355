"""The keys and values that decoding streams add after their prefixes: static buffers, one row a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.parallel.attend import wider
from longrl.types import Prefix


class OwnKV:
    """All streams are aligned at their end: shorter ones have padding in front, so one number says how far all are."""

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        sizes: Sequence[int],
        lengths: Tensor,
        max_new: int,
        place: int = 0,
        places: int = 1,
    ) -> None:
        """
        Args:
            prefixes: one or several, perhaps of different lengths.
            sizes: how many streams, one after the other, follow each of them.
            lengths: int64 [N], prompt tokens of each stream after its prefix; all are fed in the first call.
            max_new: tokens to be decoded after those.
            place, places: of a ring, whose places keep every so many-th token each.
        """
        lengths = lengths.to(prefixes[0].keys[0].device)
        longest, self.place = int(lengths.max()), (place, places)
        self.filled, self.sizes = 0, list(sizes)
        self.positions = torch.arange(place, longest + max_new, places, device=lengths.device)
        """int64 [size]: which tokens are kept here."""
        self.padding = self.positions < (longest - lengths)[:, None]
        """bool [N, size]: True where there is no token."""
        self.hidden: Tensor | None = None
        """bool [N, new, T]: True where a token that is being fed does not see a key; None: it sees all."""
        self._is_padded = bool(self.padding.any())
        shape = [(len(lengths), x.shape[0], len(self.positions), x.shape[-1]) for x in prefixes[0].keys]
        dtype = wider(prefixes[0].keys[0])
        self.keys = [x.new_zeros(s, dtype=dtype) for x, s in zip(prefixes[0].keys, shape, strict=True)]
        self.values = [x.new_zeros(s, dtype=dtype) for x, s in zip(prefixes[0].values, shape, strict=True)]

    def feed(self, new: int) -> None:
        """Called before so many tokens of every stream go through the layers."""
        end = self._kept(self.filled + new)
        if new == 1 and end and not self._is_padded:
            self.hidden = None
        else:
            fed = torch.arange(self.filled, self.filled + new, device=self.padding.device)
            self.hidden = self.padding[:, None, :end] | (self.positions[:end] > fed[:, None])

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values [N, KV, new, d]; returns all that are kept so far [N, KV, T, d]."""
        start, end = self._kept(self.filled), self._kept(self.filled + k.shape[2])
        place, places = self.place
        kept = slice(start * places + place - self.filled, None, places)
        self.keys[layer][:, :, start:end] = k[:, :, kept]
        self.values[layer][:, :, start:end] = v[:, :, kept]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _kept(self, fed: int) -> int:
        """How many of the first so many tokens are kept here."""
        place, places = self.place
        return -(-(fed - place) // places)

    def keep(self, rows: Tensor) -> None:
        """Drops the streams that have finished. rows: bool [N]."""
        self.sizes = [int(part.sum()) for part in rows.split(self.sizes)]
        self.padding = self.padding[rows]
        self._is_padded = bool(self.padding.any())
        for kept in (self.keys, self.values):
            for layer, x in enumerate(kept):  # one after the other, so that no more than one is there twice
                kept[layer] = x[rows]
