"""Attention of many streams over [one prefix they all see | their own causal past], the prefix never copied
for each.

Softmax over two KV segments is exact when their partial outputs are merged by log-sum-exp:

    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,    lse = log(exp lse_1 + exp lse_2)

and so is the backward: each segment's ordinary flash backward, given the MERGED out and lse, yields that segment's
share of the gradients. The prefix is seen in full (no mask), so all streams and all query heads of one KV head are one
long query: its gradient comes out summed over the streams.

Reference: FlashAttention-2 (arXiv 2307.08691), section 3.1 for the backward from (out, lse).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.parallel.kernels import flash, flash_backward


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    """Exact attention of N streams over their shared prefix and their own causal past.

    Args:
        q: [N, H, R, d] queries; H is a multiple of KV.
        k, v: [N, KV, R, d] each stream's own keys and values.
        prefix: keys and values [KV, P, d] that every stream sees in full, or None.
        scale: the factor of the logits.

    Returns:
        [N, H, R, d].
    """
    prefix_k, prefix_v = prefix if prefix is not None else (None, None)
    return _Attend.apply(q, k, v, prefix_k, prefix_v, scale)  # pyright: ignore[reportReturnType]


def wider(x: Tensor) -> torch.dtype:
    """Of the attention of streams to their own tokens: fp64 for fp32 on the CPU, otherwise as it is.

    Engine and trainer take these sums by different kernels, and so in another order. Those over the prefix they take by
    one kernel, block by block in the same order. What is seen of the difference: docs/numerics.md.
    """
    return torch.float64 if x.dtype == torch.float32 and x.device.type == "cpu" else x.dtype


def widen(x: Tensor) -> Tensor:
    return x.to(wider(x))


def attend_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention of the newest tokens of N streams, without gradients; no prefix is copied for each of its streams.

    Args:
        q: [N, H, new, d], the last `new` of each stream's T own tokens.
        k, v: [N, KV, T, d] all of the streams' own keys and values, of the type that `wider` says.
        hidden: bool [N, new, T], True where a token does not see a key; None: it sees all.
        prefixes: keys and values [KV, P, d] of one or several.
        sizes: how many streams, one after the other, follow each of them; perhaps none.

    Returns:
        [N, H, new, d].
    """
    return decode_parts(q, k, v, hidden, prefixes, sizes, scale)[0].to(q.dtype)


def decode_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, in the type of the keys, fp32 at least; and the log-sum-exps [N, H, new] of the two segments: the
    prefix, and a stream's own."""
    kv_heads, new = k.shape[1], q.shape[2]
    q = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # the query heads of one KV head: [N, KV, rep * new, d]
    followed = zip(q.split(list(sizes)), prefixes, strict=True)
    parts = [_attend_far(part, *prefix, scale) for part, prefix in followed if len(part)]
    far, far_lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
    near, near_lse = _attend_own(q.to(k.dtype), k, v, hidden, scale)
    weight = (near_lse - far_lse).sigmoid_()[..., None]  # exp near_lse / (exp near_lse + exp far_lse)
    out = torch.lerp(far.to(weight.dtype), near.to(weight.dtype), weight)
    out, far_lse, near_lse = (x.unflatten(2, (-1, new)).flatten(1, 2) for x in (out, far_lse, near_lse))
    return out, far_lse, near_lse


def _attend_far(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, KV, R, d] of streams that follow one prefix k, v [KV, P, d]: out [N, KV, R, d], log-sum-exp [N, KV, R]."""
    count = len(q)
    out, lse = flash(q.transpose(0, 1).flatten(1, 2)[None], k[None], v[None], False, scale)
    return out[0].unflatten(1, (count, -1)).transpose(0, 1), lse[0].unflatten(1, (count, -1)).transpose(0, 1)


def _attend_own(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, KV, rep * new, d] of the streams to their own keys: out, and log-sum-exp; of a token that sees no key 0 and
    -inf."""
    if hidden is None:
        return flash(q, k, v, False, scale)
    logits = q @ k.transpose(2, 3) * scale
    logits = logits.unflatten(2, (-1, hidden.shape[1])).masked_fill(hidden[:, None, None], -torch.inf)
    logits = logits.flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None].clamp_min(torch.finfo(lse.dtype).min)).exp_()
    return weights.to(v.dtype) @ v, lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two segments of keys as if to both at once: out [..., d], lse [...], in the type of lse."""
    both = torch.logaddexp(lse, more_lse)
    return out * (lse - both).exp()[..., None] + more * (more_lse - both).exp()[..., None], both


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """[N, H, R, ...] -> [1, KV, H/KV * N * R, ...]: everything that attends to one KV head as one long query."""
    x = x.unflatten(1, (kv_heads, -1)).movedim(0, 2)  # [KV, rep, N, R, ...]
    return x.flatten(1, 3)[None].contiguous()


def unfold(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of fold; `like` is [N, H, R, d], x may lack the last dimension."""
    streams, heads, length, _ = like.shape
    kv_heads = x.shape[1]
    return x[0].unflatten(1, (heads // kv_heads, streams, length)).movedim(2, 0).flatten(1, 2)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, scale):
        kv_heads = k.shape[1]
        if prefix_k is None:
            out, lse = flash(q, k, v, True, scale)
        else:
            near, near_lse = flash(widen(q), widen(k), widen(v), True, scale)
            far = flash(fold(q, kv_heads), prefix_k[None], prefix_v[None], False, scale)
            far, far_lse = (unfold(x, q) for x in far)
            # lse is fp32 at least: merged in that, then cast, or bf16 would lose twice
            out, lse = merge(near, near_lse, far, far_lse)
            out, lse = out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        gq, gk, gv = flash_backward(grad, q, k, v, out, lse, True, ctx.scale)
        if prefix_k is None:
            return gq, gk, gv, None, None, None
        far_grad, far_q, far_out, far_lse = (fold(x, k.shape[1]) for x in (grad, q, out, lse))
        far_q, gpk, gpv = flash_backward(
            far_grad, far_q, prefix_k[None], prefix_v[None], far_out, far_lse, False, ctx.scale
        )
        return gq + unfold(far_q, q), gk, gv, gpk[0], gpv[0], None
