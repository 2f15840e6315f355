"""The benchmark's paths do the same work: equal gradients, and the operations that they claim."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longrl.bench.paths import Step
from longrl.bench.table import bench_step
from longrl.bench.work import PATHS, SEPARATE, Work

KEYS = {
    *("path", "seconds", "prefix_passes", "prompt_tokens", "group_size", "response_tokens", "peak_bytes"),
    *("max_rel_grad_diff", "ranks", "device", "tokens", "tokens_per_s", "mfu", "flops", "over_floor", "bytes_sent"),
    *("speedup", "speedup_by_flops", "speedup_bound"),
}


def measure(work: Work, capsys) -> tuple[dict[str, dict], str]:
    bench_step(work, repeats=1, threads=1, as_json=True)
    printed = capsys.readouterr()
    return {row["path"]: row for row in map(json.loads, printed.out.splitlines())}, printed.err


def check(work: Work, rows: dict[str, dict], passes: dict[str, int]) -> None:
    assert {path: row["prefix_passes"] for path, row in rows.items()} == passes
    assert rows["plain"]["max_rel_grad_diff"] == 0
    for path, row in rows.items():
        assert row.keys() >= KEYS
        assert row["seconds"] > 0
        assert 0 <= row["max_rel_grad_diff"] <= 1e-5
        # other kernels or other sums: equal bits would mean that it was compared with itself
        if path in ("shared", "fused", "stock") or (path == "mrsp" and work.sp > 1):
            assert row["max_rel_grad_diff"] > 0
        assert row["over_floor"] == pytest.approx(1 / row["mfu"])
        assert row["tokens"] == work.prompt_tokens + work.group_size * work.response_tokens


def test_every_path_on_one_process(capsys):
    work = Work(prompt_tokens=70, group_size=3, response_tokens=5)
    rows, said = measure(work, capsys)
    check(work, rows, {"plain": 13, "reuse": 13, "mrsp": 13, "shared": 5, "fused": 3, "stock": 13})
    assert [row["same_as"] for row in rows.values()] == [None, "plain", "plain", None, None, None]
    # responses, which nobody shares, pull it down from the bound
    assert 2 < rows["fused"]["speedup_by_flops"] < rows["fused"]["speedup_bound"]
    first = said.splitlines()[0]
    assert "70 prompt tokens" in first
    assert "at the very least" in first


@pytest.mark.parametrize("video_tokens", [0, 64])
@pytest.mark.parametrize("path", PATHS)
def test_counted_operations_are_those_that_run(path, video_tokens):
    """Against torch's own counter: within 2% (logits are computed again in the backward; causal halves)."""
    work = Work(prompt_tokens=400, group_size=3, response_tokens=10, video_tokens=video_tokens)
    step = Step(work)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        step.run(path, 2 if path in SEPARATE else None)
    assert counter.get_total_flops() == pytest.approx(work.flops(path), rel=0.02)


def _attention_flops(q, k, v, dropout=0.0, causal=False, *args, out_val=None, **kwargs) -> int:
    return 4 * math.prod(q[:3]) * k[2] * q[3] // (2 if causal else 1)


def _attention_backward_flops(grad, q, k, v, out, lse, dropout, causal, *args, out_val=None, **kwargs) -> int:
    """Counted as twice the forward, though kernels make the probabilities again."""
    return 2 * _attention_flops(q, k, v, 0.0, causal)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sp": 3}, "3 = 1 x 2 + 1"),
        ({"sp": 4, "group_size": 3}, "1 too few"),
        ({"sp": 4, "prompt_tokens": 4}, "at least 5"),
        ({"video_tokens": 40}, "40 = 2 x 16 + 8"),
        ({"video_tokens": 112}, "must be fewer than --prompt-tokens 100"),
        ({"video_tokens": 16, "sp": 2}, "at least 32"),
    ],
)
def test_numbers_that_cannot_work_are_refused(changed, why):
    with pytest.raises(ValueError, match=r"choose|few|least|must") as refusal:
        Work(**{"prompt_tokens": 100, "group_size": 8, "response_tokens": 4} | changed)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
