"""Sequence parallelism: the ranks of a group share one prompt. Queries travel, keys and values stay.

Outside attention a rank holds a part of the tokens, inside it some heads of all tokens: one all-to-all on the way in,
one on the way out. The keys and values of a prefix stay as they are inside: all positions, this rank's heads. Streams
that continue the prefix come to them. When decoding, every rank holds all tokens, of which there are few; it attends
with its heads, and the heads are gathered.

With more ranks than heads can be dealt to, the group is a table of ring x heads ranks: those of a row (`heads`) do the
above with the row's part of the tokens, those of a column (`ring`) have the same heads and hold the parts of their keys
and values (ring.py). Rank = place in the ring x ranks of a row + place in the row.

Reference: DeepSpeed-Ulysses (arXiv 2309.14509).
Differs: any number of tokens; KV heads that are fewer than the ranks are repeated; query heads that do not divide are
padded with zeros (28 heads with 4 KV heads on 8 ranks: the 7 of each KV head become 8), which are dropped afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longrl.parallel.layout import split, zigzag


class Peers:
    """Ranks that exchange messages, which are counted."""

    def __init__(self, group: dist.ProcessGroup | None, bytes_sent: Counter[str]) -> None:
        """group: of torch.distributed; None: all processes."""
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.bytes_sent = bytes_sent

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x, in place."""
        if self.rank == 0:
            self.bytes_sent["draws"] += (self.size - 1) * _bytes(x)
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def all_gather(self, x: Tensor, kind: str) -> list[Tensor]:
        """Every rank's x, all of one shape."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.bytes_sent[kind] += (self.size - 1) * _bytes(x)
        dist.all_gather(parts, x, group=self.group)
        return parts

    def all_to_all(self, x: Tensor, out_rows: Sequence[int], in_rows: Sequence[int], kind: str) -> Tensor:
        """Sends in_rows[i] rows of x to rank i and puts out_rows[i] rows from each one after the other."""
        out = x.new_empty(sum(out_rows), *x.shape[1:])
        self.bytes_sent[kind] += (len(x) - in_rows[self.rank]) * _bytes(x[0])
        dist.all_to_all_single(out, x.contiguous(), list(out_rows), list(in_rows), group=self.group)
        return out

    def pass_on(self, x: Tensor, out: Tensor, kind: str, tag: int = 0) -> Passing:
        """Begins to send x to the next rank and to receive `out` from the one before, the last rank being before the
        first. Messages on their way at one time have tags of their own."""
        self.bytes_sent[kind] += _bytes(x)
        to, sender = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            dist.P2POp(dist.isend, x, group=self.group, tag=tag, group_peer=to),
            dist.P2POp(dist.irecv, out, group=self.group, tag=tag, group_peer=sender),
        ]
        return Passing(x, out, dist.batch_isend_irecv(operations))


class Passing:
    """Messages on their way."""

    def __init__(self, x: Tensor, out: Tensor, works: list[dist.Work]) -> None:
        self.tensors, self.works = (x, out), works

    def wait(self) -> Tensor:
        """What was received."""
        for work in self.works:
            work.wait()
        return self.tensors[1]


class SequenceGroup(Peers):
    """The ranks that share a prompt: who has which tokens, and the messages between them."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        heads: dist.ProcessGroup | None = None,
        ring: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            group: of torch.distributed; None: all processes.
            heads, ring: the row and the column that this rank is in; None: all are one row.
        """
        super().__init__(group, Counter())
        self.bytes_sent: Counter[str]
        """By this rank to others: prefix, suffix (both with their backward), ring (keys and values of a prefix, and
        their gradients), scores, decode, draws."""
        self.heads = self if heads is None else Peers(heads, self.bytes_sent)
        self.ring = None if ring is None else Peers(ring, self.bytes_sent)

    def lengths(self, total: int) -> list[int]:
        """Tokens of each rank: equal but for one.

        Raises:
            ValueError: on every rank, because one without tokens would leave the others waiting.
        """
        if total < self.size:
            raise ValueError(
                f"{total} tokens cannot be split over {self.size} sequence-parallel ranks: at least one each, so "
                f"{self.size - total} too few"
            )
        return split(total, self.size)

    def ring_lengths(self, total: int) -> list[int]:
        """Tokens of each place in the ring, its rows' together."""
        lengths, row = self.lengths(total), self.heads.size
        return [sum(lengths[start : start + row]) for start in range(0, self.size, row)]

    def span(self, total: int) -> slice:
        """This rank's tokens of streams: one part after the other."""
        lengths = self.lengths(total)
        start = sum(lengths[: self.rank])
        return slice(start, start + lengths[self.rank])

    def spans(self, total: int) -> list[slice]:
        """This rank's tokens of a prefix, ascending. With a ring: as `zigzag` deals them to its places."""
        if self.ring is None:
            return [self.span(total)]
        lengths, first = self.lengths(total), self.ring.rank * self.heads.size
        start = sum(lengths[first : self.rank])
        end = start + lengths[self.rank]  # of the two pieces of this place, one after the other
        mine, before = [], 0
        for piece in zigzag(self.ring_lengths(total))[self.ring.rank]:
            length, shift = piece.stop - piece.start, piece.start - before
            a, b = max(start, before), min(end, before + length)
            if a < b:
                mine.append(slice(a + shift, b + shift))
            before += length
        return mine

    def gather(self, part: Tensor, total: int) -> Tensor:
        """[..., my tokens of streams] -> [..., all tokens], differentiable where every rank computes the same from the
        result."""
        return _Gather.apply(part, self, total)  # pyright: ignore[reportReturnType]


class Sharded:
    """How attention is entered and left where tokens are split over the ranks. A plain class: see trunk.Call."""

    __slots__ = ("heads", "kind", "lengths", "ring", "ring_lengths")

    def __init__(self, sp: SequenceGroup, total: int, kind: str) -> None:
        self.heads, self.ring, self.kind = sp.heads, sp.ring, kind
        self.ring_lengths = sp.ring_lengths(total)
        first = sp.rank - sp.heads.rank
        self.lengths = sp.lengths(total)[first : first + sp.heads.size]
        """Of the ranks of this row."""

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [H, my tokens, d], k, v [KV, my tokens, d] -> some heads of each (as _even makes them), the row's tokens:
        without a ring all."""
        size, mine = self.heads.size, self.lengths[self.heads.rank]
        heads = [x.unflatten(0, (size, -1)).transpose(1, 2) for x in _even(q, k, v, size)]  # [ranks, tokens, heads, d]
        counts = [x.shape[2] for x in heads]
        sent = torch.cat(heads, 2).flatten(0, 1)  # one message, not three
        got = _AllToAll.apply(sent, self.heads, self.lengths, [mine] * size, self.kind)
        q, k, v = (x.contiguous() for x in got.transpose(0, 1).split(counts))  # or one kept would keep the message
        return q, k, v

    def leave(self, out: Tensor, heads: int, kv_heads: int) -> Tensor:
        """[the row's tokens, heads of this rank, d] -> [my tokens, heads, d], the padding dropped."""
        size, mine = self.heads.size, self.lengths[self.heads.rank]
        got = _AllToAll.apply(out, self.heads, [mine] * size, self.lengths, self.kind)
        got = got.unflatten(0, (size, mine)).transpose(0, 1).flatten(1, 2)
        return _real(got, heads, kv_heads)


class Replicated:
    """How attention is entered and left where every rank holds all tokens (decoding). Without gradients."""

    __slots__ = ("ring", "sp")

    def __init__(self, sp: SequenceGroup) -> None:
        self.sp, self.ring = sp, sp.ring

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [H, tokens, d], k, v [KV, tokens, d] -> this rank's heads; nothing travels."""
        heads = self.sp.heads
        q, k, v = (x.chunk(heads.size)[heads.rank] for x in _even(q, k, v, heads.size))
        return q, k, v

    def leave(self, out: Tensor, heads: int, kv_heads: int) -> Tensor:
        """[tokens, heads of this rank, d] -> [tokens, heads, d]. With a ring, [..., d + 1]: partial results and their
        log-sum-exp, in one message, which are merged here."""
        parts = torch.stack(self.sp.all_gather(out.contiguous(), "decode"))
        if self.ring is None:
            return _real(torch.cat(parts.unbind(), 1), heads, kv_heads)
        out, lse = parts.unflatten(0, (self.ring.size, -1)).split([parts.shape[-1] - 1, 1], -1)
        merged = (lse.softmax(0) * out).sum(0)  # exp(lse_i) / sum of exp(lse_j) of each
        return _real(torch.cat(merged.unbind(), 1), heads, kv_heads)


def _even(q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, ...] of which every rank gets as many: its KV heads and the queries that attend to them."""
    kv_heads, copies = len(k), max(1, size // len(k))
    padding = -(len(q) // kv_heads) % copies
    if padding:
        q = q.unflatten(0, (kv_heads, -1))
        q = torch.cat([q, q.new_zeros(kv_heads, padding, *q.shape[2:])], 1).flatten(0, 1)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 0) for x in (k, v))
    return q, k, v


def _real(out: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[tokens, heads with padding, d] -> [tokens, heads, d]."""
    return out.unflatten(1, (kv_heads, -1))[:, :, : heads // kv_heads].flatten(1, 2)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class _AllToAll(torch.autograd.Function):
    """Its backward is itself with the row counts swapped."""

    @staticmethod
    def forward(ctx, x, peers, out_rows, in_rows, kind):
        ctx.back = in_rows, out_rows, kind
        ctx.peers = peers
        return peers.all_to_all(x, out_rows, in_rows, kind)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.peers.all_to_all(grads[0], *ctx.back), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, sp, total):
        ctx.mine = sp.span(total)
        lengths = sp.lengths(total)
        # gloo gathers equal shapes only; lengths differ by one at most
        padded = part.new_zeros(*part.shape[:-1], max(lengths))
        padded[..., : part.shape[-1]] = part
        parts = sp.all_gather(padded, "scores")
        return torch.cat([x[..., :length] for x, length in zip(parts, lengths, strict=True)], -1)

    @staticmethod
    def backward(ctx, *grads):
        # Every rank computes the same loss from the gathered values, so each already has the whole gradient of its own
        # part. Summing over the ranks, as the adjoint of an all-gather would, counts the loss once per rank.
        return grads[0][..., ctx.mine], None, None
