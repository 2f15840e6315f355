"""The keys and values that decoding streams add after their shared prefix: static buffers, one row a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.types import Prefix


class OwnKV:
    """All streams are aligned at their end: shorter ones have padding in front, so one number says how far all are."""

    def __init__(self, prefix: Prefix, lengths: Tensor, max_new: int) -> None:
        """
        Args:
            lengths: int64 [N], prompt tokens of each stream after the prefix; all are fed in the first call.
            max_new: tokens to be decoded after those.
        """
        lengths = lengths.to(prefix.keys[0].device)
        longest = int(lengths.max())
        size = longest + max_new
        self.filled = 0
        self.padding = torch.arange(size, device=lengths.device) < (longest - lengths)[:, None]
        """bool [N, size]: True where there is no token."""
        shape = [(len(lengths), x.shape[0], size, x.shape[-1]) for x in prefix.keys]
        self.keys = [x.new_zeros(s) for x, s in zip(prefix.keys, shape, strict=True)]
        self.values = [x.new_zeros(s) for x, s in zip(prefix.values, shape, strict=True)]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores a layer's new keys and values [N, KV, new, d]; returns all of them so far and the padding [N, T]."""
        end = self.filled + k.shape[2]
        self.keys[layer][:, :, self.filled : end] = k
        self.values[layer][:, :, self.filled : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end], self.padding[:, :end]

    def keep(self, rows: Tensor) -> None:
        """Drops the streams that have finished. rows: bool [N]."""
        self.padding = self.padding[rows]
        self.keys, self.values = ([x[rows] for x in xs] for xs in (self.keys, self.values))
