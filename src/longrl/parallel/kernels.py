"""Attention to one segment of keys and values that also returns its log-sum-exp, and its backward, by PyTorch.

    CPU                      flash
    CUDA, bf16 and fp16      flash (FlashAttention-2): KV heads that several query heads share are not expanded
    CUDA, fp32               memory-efficient attention
    anything else            `plain`, which has all logits in memory: fp64 on a GPU, for tests

The backward takes out and lse as arguments, so that those of attention to several segments, merged, can be given: what
comes out is then this segment's share of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_aten = torch.ops.aten
KERNELS = frozenset(
    (
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
    )
)
"""The forward ones, for whoever wants to keep what they give."""
_HALF = (torch.bfloat16, torch.float16)
_LSE_ROWS = 32
"""The memory-efficient kernel wants log-sum-exps in multiples of so many rows."""


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k') v.

    Args:
        q: [N, H, R, d]; H is a multiple of KV.
        k, v: [N, KV, T, d].
        causal: query i sees keys 0 to i.
        scale: the factor of the logits.

    Returns:
        out [N, H, R, d]; log-sum-exp of the logits [N, H, R], fp32, or fp64 for fp64.
    """
    kernel, heads = _kernel(q), q.shape[1]
    if kernel == "plain":
        return plain(q, k, v, causal, scale)
    if kernel == "cuda":
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    k, v = _expand(k, heads), _expand(v, heads)
    if kernel == "efficient":
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return out, lse[..., : q.shape[2]]
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given out, its gradient, and lse; shapes as in `flash`.

    Reference: FlashAttention-2 (arXiv 2307.08691), section 3.1.
    """
    kernel, heads, kv_heads = _kernel(q), q.shape[1], k.shape[1]
    if kernel == "plain":
        return plain_backward(grad, q, k, v, out, lse, causal, scale)
    grad, lse = grad.contiguous(), lse.contiguous()
    if kernel == "cuda":
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale
        )
    k, v = _expand(k, heads), _expand(v, heads)
    if kernel == "efficient":
        lse = pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=float("inf"))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        mask = [True, True, True, False]
        gq, gk, gv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, seed, seed, 0.0, mask, causal, scale=scale
        )
    else:
        gq, gk, gv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return gq, _shrink(gk, kv_heads), _shrink(gv, kv_heads)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The slow twin of `flash`."""
    logits = _logits(q, k, causal, scale)
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp() @ _expand(v, q.shape[1]).to(logits.dtype)
    return out.to(q.dtype), lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The slow twin of `flash_backward`."""
    heads, kv_heads = q.shape[1], k.shape[1]
    weights = (_logits(q, k, causal, scale) - lse[..., None]).exp()
    grad, out = grad.to(weights.dtype), out.to(weights.dtype)
    by_weight = grad @ _expand(v, heads).to(weights.dtype).transpose(-1, -2)
    by_logit = weights * (by_weight - (grad * out).sum(-1, keepdim=True)) * scale
    gq = by_logit @ _expand(k, heads).to(weights.dtype)
    gk = by_logit.transpose(-1, -2) @ q.to(weights.dtype)
    gv = weights.transpose(-1, -2) @ grad
    return gq.to(q.dtype), _shrink(gk, kv_heads).to(k.dtype), _shrink(gv, kv_heads).to(v.dtype)


def _kernel(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and q.dtype in _HALF:
        return "cuda"
    return "efficient" if q.device.type == "cuda" and q.dtype == torch.float32 else "plain"


def _logits(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[N, H, R, T], in fp32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ _expand(k, q.shape[1]).to(dtype).transpose(-1, -2)) * scale
    if not causal:
        return logits
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(hidden, float("-inf"))


def _expand(x: Tensor, heads: int) -> Tensor:
    """[N, KV, T, d] -> [N, heads, T, d], each KV head repeated for its query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _shrink(grad: Tensor, kv_heads: int) -> Tensor:
    """The adjoint of _expand."""
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)
