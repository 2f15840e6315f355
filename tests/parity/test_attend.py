"""`attend` and `attend_decode` against the plain softmax over all keys, and that against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from longrl.parallel.attend import attend, attend_decode, widen


def attend_plain(q, k, v, prefix, scale):
    """The slow twin of `attend`: one softmax over the concatenated keys, by autograd. Arguments as there."""
    streams, heads, length, _ = q.shape
    repeat = heads // k.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if prefix is not None:
        k, v = (torch.cat([p.expand(streams, *p.shape), x], 2) for p, x in zip(prefix, (k, v), strict=True))
        mask = torch.cat([mask.new_ones(length, k.shape[2] - length), mask], 1)
    logits = (q @ k.repeat_interleave(repeat, 1).transpose(-1, -2)) * scale
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 1)


EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7}
"""Relative distance of neighbouring numbers."""
DTYPES = [torch.float64, torch.float32]


def draw(*shape: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size).to(dtype)


def inputs(streams, heads, kv_heads, length, far, dtype, dim=8, size=1.0):
    """q, k, v and the prefix's k, v (or neither); larger queries make sharper softmaxes."""
    made = [
        draw(streams, heads, length, dim, dtype=dtype, seed=0, size=size),
        *(draw(streams, kv_heads, length, dim, dtype=dtype, seed=seed) for seed in (1, 2)),
        *(draw(kv_heads, far, dim, dtype=dtype, seed=seed) for seed in (3, 4) if far),
    ]
    return [x.requires_grad_() for x in made]


def bound(q: torch.Tensor, keys: list[torch.Tensor], scale: float) -> float:
    """A logit is rounded to EPS times its size, which moves its probability by as much, relatively; sums of products
    add a few roundings more. 16 covers both here: the largest seen is 6.2."""
    largest = scale * q.norm(dim=-1).max() * max(k.norm(dim=-1).max() for k in keys)
    return 16 * EPS[q.dtype] * max(1.0, largest.item())


def evaluate(function, tensors, scale):
    """The output and the gradient of every input, for a weighted sum of the output."""
    q, k, v, *prefix = tensors
    out = function(q, k, v, tuple(prefix) or None, scale)
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape, dtype=out.dtype, seed=9)).sum(), tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["soft", "sharp"])
@pytest.mark.parametrize("far", [0, 1, 70], ids="prefix{}".format)
@pytest.mark.parametrize("length", [1, 5, 40], ids="own{}".format)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("streams", [1, 3])
def test_attend_equals_plain(streams, heads, kv_heads, length, far, size, dtype):
    tensors = inputs(streams, heads, kv_heads, length, far, dtype, size=size)
    ours, theirs = (evaluate(function, tensors, 0.3) for function in (attend, attend_plain))
    allowed = bound(tensors[0], tensors[1::2], 0.3)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= allowed * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("far", [0, 3])
def test_plain_is_the_definition(far):
    """Stream by stream, head by head, token by token, in Python's own floats."""
    streams, heads, kv_heads, length, scale = 2, 4, 2, 5, 0.4
    q, k, v, *prefix = (x.detach() for x in inputs(streams, heads, kv_heads, length, far, torch.float64))
    out = attend_plain(q, k, v, tuple(prefix) or None, scale)
    for n in range(streams):
        for h in range(heads):
            group = h * kv_heads // heads
            far_keys, far_values = (x[group].tolist() if far else [] for x in (prefix or (q, q)))
            for r in range(length):
                keys = far_keys + k[n, group, : r + 1].tolist()
                values = far_values + v[n, group, : r + 1].tolist()
                logits = [scale * sum(a * b for a, b in zip(q[n, h, r].tolist(), key, strict=True)) for key in keys]
                weights = [math.exp(x) for x in logits]
                expected = [sum(w * value[d] for w, value in zip(weights, values, strict=True)) for d in range(8)]
                assert out[n, h, r].tolist() == pytest.approx([x / sum(weights) for x in expected], abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", [1, 70], ids="prefix{}".format)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [6], [3, 6, 1, 2]], ids=str)
def test_decode_equals_plain(lengths, heads, kv_heads, far, dtype):
    """All tokens at once, and then only the newest of them: what padding holds makes no difference."""
    longest = max(lengths)
    q, k, v, *prefix = (x.detach() for x in inputs(len(lengths), heads, kv_heads, longest, far, dtype))
    allowed = bound(q, [k, prefix[0]], 0.3)
    padding = torch.arange(longest) < longest - torch.tensor(lengths)[:, None]
    hidden = padding[:, None, :, None]
    junk = [x.masked_fill(hidden, 1e4) for x in (q, k, v)]
    for new in sorted({longest, 2, 1} - {n for n in (2,) if longest < 2}):
        later = torch.arange(longest) > torch.arange(longest - new, longest)[:, None]
        unseen = padding[:, None] | later
        out = attend_decode(
            junk[0][:, :, -new:], *junk[1:], unseen if unseen.any() else None, [tuple(prefix)], [len(lengths)], 0.3
        )
        assert out.shape == (len(lengths), heads, new, 8)
        for n, length in enumerate(lengths):
            alone = attend_plain(*(x[n : n + 1, :, longest - length :] for x in (q, k, v)), tuple(prefix), 0.3)
            seen = min(new, length)
            assert (out[n, :, new - seen :] - alone[0, :, length - seen :]).abs().max() < allowed


@pytest.mark.parametrize("new", [1, 3])
def test_decode_over_several_prefixes_equals_each_alone(new):
    """Streams of prefixes of 1, 9 and 70 tokens, one of which nobody follows any more."""
    q, k, v = (x.detach() for x in inputs(7, 4, 2, 5, 1, torch.float64)[:3])
    prefixes = [tuple(x.detach() for x in inputs(1, 4, 2, 1, far, torch.float64)[3:]) for far in (1, 9, 70)]
    hidden = torch.arange(5) > torch.arange(5 - new, 5)[:, None]
    hidden = hidden | (torch.arange(5) < torch.tensor([0, 1, 2, 0, 0, 1, 0])[:, None])[:, None]
    sizes = [3, 0, 4]
    out = attend_decode(q[:, :, -new:], k, v, hidden, prefixes, sizes, 0.3)
    rows = slice(0, 3), slice(3, 7)
    for part, prefix in zip(rows, (prefixes[0], prefixes[2]), strict=True):
        alone = attend_decode(q[part, :, -new:], k[part], v[part], hidden[part], [prefix], [len(q[part])], 0.3)
        assert (out[part] - alone).abs().max() < 1e-14


def test_engine_and_trainer_agree_where_attention_is_sharp():
    """Over 1,900 tokens, in fp32, 16 rows as decoding keeps: one kernel, and so one order of the sums. Other orders
    differ by 6e-6."""
    q, k, v, *prefix = (x.detach() for x in inputs(16, 4, 2, 5, 1900, torch.float32))
    q *= 8
    trained = attend(q, k, v, (prefix[0], prefix[1]), 0.3)
    for t in range(5):
        own = widen(k[:, :, : t + 1]), widen(v[:, :, : t + 1])
        decoded = attend_decode(q[:, :, t : t + 1], *own, None, [(prefix[0], prefix[1])], [16], 0.3)
        assert (decoded - trained[:, :, t : t + 1]).abs().max() <= 1.2e-7 * trained.abs().max()  # at most one rounding


def test_the_prefix_is_not_copied_for_the_streams():
    """16 streams over 4,000 prefix tokens: a copy for each would be 16 tensors of the prefix's size."""
    tensors = inputs(16, 2, 1, 2, 4000, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Watch():
        evaluate(attend, tensors, 0.3)
    assert largest <= tensors[-1].untyped_storage().nbytes()
