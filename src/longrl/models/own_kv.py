"""The keys and values that decoding streams add after their prefixes: static buffers, one row a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.types import Prefix


class OwnKV:
    """All streams are aligned at their end: shorter ones have padding in front, so one number says how far all are."""

    def __init__(self, prefixes: Sequence[Prefix], sizes: Sequence[int], lengths: Tensor, max_new: int) -> None:
        """
        Args:
            prefixes: one or several, perhaps of different lengths.
            sizes: how many streams, one after the other, follow each of them.
            lengths: int64 [N], prompt tokens of each stream after its prefix; all are fed in the first call.
            max_new: tokens to be decoded after those.
        """
        lengths = lengths.to(prefixes[0].keys[0].device)
        longest = int(lengths.max())
        size = longest + max_new
        self.filled, self.sizes = 0, list(sizes)
        self.padding = torch.arange(size, device=lengths.device) < (longest - lengths)[:, None]
        """bool [N, size]: True where there is no token."""
        self.hidden: Tensor | None = None
        """bool [N, new, T]: True where a token that is being fed does not see a key; None: it sees all."""
        self._is_padded = bool(self.padding.any())
        shape = [(len(lengths), x.shape[0], size, x.shape[-1]) for x in prefixes[0].keys]
        self.keys = [x.new_zeros(s) for x, s in zip(prefixes[0].keys, shape, strict=True)]
        self.values = [x.new_zeros(s) for x, s in zip(prefixes[0].values, shape, strict=True)]

    def feed(self, new: int) -> None:
        """Called before so many tokens of every stream go through the layers."""
        end = self.filled + new
        if new == 1 and not self._is_padded:
            self.hidden = None
        else:
            device = self.padding.device
            later = torch.arange(end, device=device) > torch.arange(self.filled, end, device=device)[:, None]
            self.hidden = self.padding[:, None, :end] | later

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values [N, KV, new, d]; returns all of them so far [N, KV, T, d]."""
        end = self.filled + k.shape[2]
        self.keys[layer][:, :, self.filled : end] = k
        self.values[layer][:, :, self.filled : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drops the streams that have finished. rows: bool [N]."""
        self.sizes = [int(part.sum()) for part in rows.split(self.sizes)]
        self.padding = self.padding[rows]
        self._is_padded = bool(self.padding.any())
        self.keys, self.values = ([x[rows] for x in xs] for xs in (self.keys, self.values))
