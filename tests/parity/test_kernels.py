"""Kernels that return the log-sum-exp, and their backward, against the definition and autograd."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longrl.parallel.kernels import flash, flash_backward, plain, plain_backward

KERNELS = {"flash": (flash, flash_backward), "plain": (plain, plain_backward)}


def inputs(heads, kv_heads, rows, total, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 8), (2, kv_heads, total, 8), (2, kv_heads, total, 8)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_autograd(name, heads, kv_heads, causal, dtype):
    """fp32 rounds at 1.2e-7; sums of 30 terms, and gradients of up to 10: 1e-5 covers both (seen: 9.5e-7, 4.8e-6)."""
    forward, backward = KERNELS[name]
    q, k, v = (x.requires_grad_() for x in inputs(heads, kv_heads, 30, 30, dtype))
    wide = [x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v)]
    logits = 0.3 * wide[0] @ wide[1].transpose(-1, -2)
    if causal:
        logits = logits.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), float("-inf"))
    expected = logits.softmax(-1) @ wide[2]
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        out, lse = forward(q, k, v, causal, 0.3)
        ours = [out, lse, *backward(grad, q, k, v, out, lse, causal, 0.3)]
    theirs = [expected, logits.logsumexp(-1), *torch.autograd.grad(expected, (q, k, v), grad)]
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= bound


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_kernel_for_gpus_takes_and_gives_these_shapes(kv_heads):
    """Without a GPU: PyTorch's own rules of shapes, types and devices. Values are not computed."""
    with FakeTensorMode():
        q = torch.empty(2, 8, 40, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(2, kv_heads, 40, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = flash(q, k, v, True, 0.1)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 8, 40), torch.float32)
        for gradient, x in zip(flash_backward(out, q, k, v, out, lse, True, 0.1), (q, k, v), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device.type) == (x.shape, x.dtype, "cuda")
