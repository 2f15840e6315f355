"""The keys and values that decoding streams add after their shared prefix: static buffers, one row a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.types import Prefix


class OwnKV:
    """All streams are aligned at their end: shorter ones have padding in front, so one number says how far all are."""

    def __init__(self, prefix: Prefix, lengths: Tensor, max_new: int, place: int = 0, places: int = 1) -> None:
        """
        Args:
            lengths: int64 [N], prompt tokens of each stream after the prefix; all are fed in the first call.
            max_new: tokens to be decoded after those.
            place, places: of a ring, whose places keep every so many-th token each.
        """
        lengths = lengths.to(prefix.keys[0].device)
        longest, self.place = int(lengths.max()), (place, places)
        self.filled = 0
        """Tokens that have been fed, on all places."""
        self.positions = torch.arange(place, longest + max_new, places, device=lengths.device)
        """int64 [size]: which tokens are kept here."""
        self.padding = self.positions < (longest - lengths)[:, None]
        """bool [N, size]: True where there is no token."""
        size = len(self.positions)
        shape = [(len(lengths), x.shape[0], size, x.shape[-1]) for x in prefix.keys]
        self.keys = [x.new_zeros(s) for x, s in zip(prefix.keys, shape, strict=True)]
        self.values = [x.new_zeros(s) for x, s in zip(prefix.values, shape, strict=True)]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores a layer's new keys and values [N, KV, new, d], those that are kept here.

        Returns:
            keys, values: [N, KV, T, d], all so far.
            hidden: bool [N, new, T], True where a new token does not see a key.
        """
        place, places = self.place
        start, end = (-(-(n - place) // places) for n in (self.filled, self.filled + k.shape[2]))  # kept of so many
        kept = slice(start * places + place - self.filled, None, places)
        self.keys[layer][:, :, start:end] = k[:, :, kept]
        self.values[layer][:, :, start:end] = v[:, :, kept]
        new = torch.arange(self.filled, self.filled + k.shape[2], device=k.device)
        hidden = self.padding[:, None, :end] | (self.positions[:end] > new[:, None])
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end], hidden

    def keep(self, rows: Tensor) -> None:
        """Drops the streams that have finished. rows: bool [N]."""
        self.padding = self.padding[rows]
        self.keys, self.values = ([x[rows] for x in xs] for xs in (self.keys, self.values))
