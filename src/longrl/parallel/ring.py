"""Attention where the keys and values of a prefix are split over a ring of ranks that have the same heads.

    prefix   keys and values travel round; each rank attends with its own queries to every part that they see
    streams  queries come to all places; each attends to its part of the prefix, and partial results are merged
    decode   the same, of a few tokens that every rank holds

Tokens of a prefix are dealt to the places in zigzag, a piece from the front and one from the back, so that all have
about as much to do. Results are merged by log-sum-exp. The backward of a part, given the MERGED out and lse, yields
that part's share of the gradients: those of the prefix's keys and values are whole where they are, in a pass over
streams; in the prefix's own they travel round with them.

References: Ring Attention (arXiv 2310.01889); FlashAttention-2 (arXiv 2307.08691), section 3.1 for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longrl.parallel.attend import decode_parts, fold, merge, unfold, widen, wider
from longrl.parallel.kernels import flash, flash_backward
from longrl.parallel.layout import split
from longrl.parallel.sequence import Passing, Peers, Sharded

_KEYS, _GRADIENTS = 0, 1
"""Tags of messages that are on their way at one time."""


def attend_ring(q: Tensor, k: Tensor, v: Tensor, sharded: Sharded, scale: float) -> Tensor:
    """Causal attention of a prefix.

    Args:
        q: [H, T, d] of this place's tokens, as `zigzag` deals them.
        k, v: [KV, T, d].
        scale: the factor of the logits.

    Returns:
        [H, T, d].
    """
    assert sharded.ring is not None
    return _Ring.apply(q, k, v, sharded.ring, sharded.ring_lengths, scale)  # pyright: ignore[reportReturnType]


def attend_ring_streams(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], sharded: Sharded, streams: int, scale: float
) -> Tensor:
    """Attention of N streams over the prefix that they share and their own causal past.

    Args:
        q: [H, T, d] of this place's tokens of all N x R, laid one stream after the other, one place after the other.
        k, v: [KV, T, d] the streams' own.
        prefix: keys and values [KV, P, d] of this place.
        streams: N.
        scale: the factor of the logits.

    Returns:
        [H, T, d].
    """
    args = (sharded.ring, sharded.ring_lengths, sharded.kind, streams, scale)
    return _RingStreams.apply(q, k, v, *prefix, *args)  # pyright: ignore[reportReturnType]


def attend_ring_decode(*args) -> Tensor:
    """As attend_decode, of this place's part of the keys: the result and its log-sum-exp, side by side
    [N, H, new, d + 1]. `Replicated.leave` merges those of all places."""
    out, *both = decode_parts(*args)
    return torch.cat([out, torch.logaddexp(*both)[..., None]], -1)


def _round(x: Tensor, ring: Peers, lengths: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Every place's x [..., its tokens, d] as it comes by, from this one's own on; the next is on its way already."""
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        following = _pass_on(x, owner, ring, lengths, _KEYS) if step + 1 < ring.size else None
        yield owner, x
        if following is not None:
            x = following.wait()


def _pass_on(x: Tensor, owner: int, ring: Peers, lengths: list[int], tag: int) -> Passing:
    """Sends on what is the owner's, and receives what is that of the place before the owner."""
    out = x.new_empty(*x.shape[:-2], lengths[owner - 1], x.shape[-1])
    return ring.pass_on(x, out, "ring", tag)


def _sees(place: int, owner: int, lengths: list[int]) -> tuple[slice, slice]:
    """Which tokens of a place attend to tokens of the owner, and to which."""
    if owner == place:
        return slice(None), slice(None)
    if owner < place:  # its front piece, perhaps empty, is before both of ours, its back piece behind
        return slice(None), slice(lengths[owner] // 2)
    return slice(lengths[place] // 2, None), slice(None)  # both its pieces are between our front and our back


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring, lengths, scale):
        out = lse = torch.empty(0)
        for owner, kv in _round(torch.stack([k, v]), ring, lengths):
            rows, seen = _sees(ring.rank, owner, lengths)
            if owner == ring.rank:
                out, lse = flash(q[None], k[None], v[None], True, scale)
                out = out.to(lse.dtype)
            elif seen.stop != 0:
                more = flash(q[None, :, rows], kv[0, None, :, seen], kv[1, None, :, seen], False, scale)
                first = rows.start or 0
                merged = merge(out[:, :, first:], lse[:, :, first:], *more)
                # not in place: recomputation may keep what a kernel gave
                out, lse = (torch.cat([a[:, :, :first], b], 2) for a, b in zip((out, lse), merged, strict=True))
        out = out[0].to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.lengths, ctx.scale = ring, lengths, scale
        return out

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, out, lse = ctx.saved_tensors
        (grad,), ring, lengths = grads, ctx.ring, ctx.lengths
        gq, sums = torch.zeros_like(q, dtype=lse.dtype), None  # of as many parts as places: in fp32 at least
        for owner, kv in _round(torch.stack([k, v]), ring, lengths):
            rows, seen = _sees(ring.rank, owner, lengths)
            share = torch.zeros_like(kv, dtype=lse.dtype)
            if seen.stop != 0:
                part_q, part_k, part_v = flash_backward(
                    grad[None, :, rows],
                    q[None, :, rows],
                    kv[0, None, :, seen],
                    kv[1, None, :, seen],
                    out[None, :, rows],
                    lse[:, :, rows],
                    owner == ring.rank,
                    ctx.scale,
                )
                gq[:, rows] += part_q[0]
                share[0, :, seen], share[1, :, seen] = part_k[0], part_v[0]
            if sums is not None:
                share += sums.wait()
            sums = _pass_on(share, owner, ring, lengths, _GRADIENTS)
        assert sums is not None
        gk, gv = sums.wait()  # back home
        return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype), None, None, None


class _RingStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, far_k, far_v, ring, lengths, kind, streams, scale):
        heads = [len(q), len(k), len(v)]
        all_q, all_k, all_v = _streams(_gather([q, k, v], ring, lengths, kind), heads, streams)
        out, lse = flash(fold(all_q, len(k)), far_k[None], far_v[None], False, scale)
        out, lse = unfold(out, all_q), unfold(lse, all_q)
        dtype = torch.promote_types(wider(out), lse.dtype)
        out, lse = out.to(dtype), lse.to(dtype)
        own = _own_streams(ring, streams)
        if own.start < own.stop:
            near = flash(widen(all_q[own]), widen(all_k[own]), widen(all_v[own]), True, scale)
            merged = zip((out, lse), merge(out[own], lse[own], *near), strict=True)
            out, lse = (torch.cat([a[: own.start], b, a[own.stop :]]) for a, b in merged)
        # [N, H, R, d + 1] -> tokens first, each to its place, which merges what all made of it
        parts = torch.cat([out, lse[..., None]], -1).transpose(1, 2).flatten(0, 1)
        mine = lengths[ring.rank]
        parts = ring.all_to_all(parts, [mine] * ring.size, lengths, kind).unflatten(0, (ring.size, mine))
        out, lse = parts.split([q.shape[-1], 1], -1)
        out = (lse.softmax(0) * out).sum(0).transpose(0, 1).to(q.dtype)
        lse = lse.logsumexp(0).transpose(0, 1)[..., 0].to(torch.promote_types(q.dtype, torch.float32))
        ctx.save_for_backward(q, k, v, far_k, far_v, out, lse)
        ctx.about = ring, lengths, kind, streams, scale
        return out

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, far_k, far_v, out, lse = ctx.saved_tensors
        ring, lengths, kind, streams, scale = ctx.about
        heads = [len(q), len(k), len(v)]
        everyones = _gather([q, k, v, grads[0], out], ring, lengths, kind)
        all_q, all_k, all_v, grad, out = _streams(everyones, [*heads, len(q), len(q)], streams)
        (lse,) = _streams(_gather([lse[..., None]], ring, lengths, kind), [len(q)], streams)
        lse = lse[..., 0]
        far_grad, far_q, far_out, far_lse = (fold(x, len(k)) for x in (grad, all_q, out, lse))
        far = far_k[None], far_v[None]
        gq, gfar_k, gfar_v = flash_backward(far_grad, far_q, *far, far_out, far_lse, False, scale)
        gq, own = unfold(gq, all_q), _own_streams(ring, streams)
        gkv = torch.zeros_like(torch.cat([all_k, all_v], 1))
        if own.start < own.stop:
            near = all_k[own], all_v[own], out[own], lse[own]
            near_q, near_k, near_v = flash_backward(grad[own], all_q[own], *near, True, scale)
            gq[own] += near_q
            gkv[own] = torch.cat([near_k, near_v], 1)
        parts = torch.cat([gq, gkv], 1).transpose(1, 2).flatten(0, 1)
        mine = lengths[ring.rank]
        parts = ring.all_to_all(parts, [mine] * ring.size, lengths, kind).unflatten(0, (ring.size, mine))
        total = parts.to(lse.dtype).sum(0).to(q.dtype).transpose(0, 1)
        return *total.split(heads), gfar_k[0], gfar_v[0], *[None] * 5


def _own_streams(ring: Peers, streams: int) -> slice:
    """Whose causal past is attended to at this place."""
    before = sum(split(streams, ring.size)[: ring.rank])
    return slice(before, before + split(streams, ring.size)[ring.rank])


def _gather(tensors: list[Tensor], ring: Peers, lengths: list[int], kind: str) -> Tensor:
    """Each [heads, this place's tokens, d] -> [all tokens, all their heads, d], in one message."""
    mine = torch.cat(tensors).transpose(0, 1)
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])  # gloo gathers equal shapes only
    padded[: len(mine)] = mine
    parts = ring.all_gather(padded, kind)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _streams(x: Tensor, heads: list[int], streams: int) -> list[Tensor]:
    """[N x R, heads, d] -> [N, so many heads, R, d] each."""
    return list(x.unflatten(0, (streams, -1)).transpose(1, 2).split(heads, 1))
