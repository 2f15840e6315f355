"""What was measured, beside what was to be expected: a table, or a JSON object a path."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from longrl.bench.measuring import Measured, matmul_rate, measure
from longrl.bench.work import PATHS, Work


def bench_step(work: Work, repeats: int, threads: int, as_json: bool) -> None:
    """Says what it will do, measures and prints.

    Args:
        threads: of all ranks together; each has one at least.
    """
    rate = matmul_rate(min(threads, work.sp * max(1, threads // work.sp)))
    once = sum(work.flops(path) for path in work.distinct())
    typer.echo(
        f"{work.prompt_tokens} prompt tokens ({work.video_tokens} of video), {work.group_size} responses of "
        f"{work.response_tokens} tokens, {work.sp} {'process' if work.sp == 1 else 'processes'}, fp32, {threads} "
        f"threads, products at {rate / 1e9:.0f} GFLOP/s. {len(work.distinct())} paths in turn, up to {repeats} "
        f"timed runs each: a turn counts {once / 1e12:.2f} TFLOP, so takes {once / rate:.0f} s at the very least",
        err=True,
    )
    rows = reckon(work, measure(work, repeats, threads), rate, threads)
    for line in [json.dumps(row) for row in rows] if as_json else table(rows):
        typer.echo(line)


def reckon(work: Work, found: list[Measured], rate: float, threads: int) -> list[dict[str, Any]]:
    """A row a path, in the order of PATHS; one that does not differ from another has that one's figures."""
    measured = {one.path: one for one in found}
    tokens = work.prompt_tokens + work.group_size * work.response_tokens
    rows = []
    for path in PATHS:
        one = measured[work.same_as(path) or path]
        flops = work.flops(path)
        rows.append(
            asdict(one)
            | {"path": path, "same_as": work.same_as(path), **asdict(work)}
            | {
                "ranks": work.sp,
                "device": "cpu",
                "threads": threads,
                "prefix_passes": work.prefix_passes(path),
                "encodings": work.encodings(path),
                "tokens": tokens,
                "tokens_per_s": tokens / one.seconds,
                "flops": flops,
                "matmul_flops_per_s": rate,
                "mfu": flops / one.seconds / rate,
                "over_floor": one.seconds * rate / flops,
                "speedup": measured["plain"].seconds / one.seconds,
                "speedup_by_flops": work.flops("plain") / flops,
                "speedup_bound": work.prompt_flops("plain") / work.prompt_flops(path),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    lines = [
        f"{first['tokens']} tokens: {first['prompt_tokens']} of the prompt, {first['group_size']} x "
        f"{first['response_tokens']} of responses; {first['ranks']} rank(s) on {first['device']}; MFU of "
        f"{first['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, measured",
        "path     seconds  tokens/s  x plain  by FLOPs  bound  passes  GFLOP    MFU  x floor  peak MB  gradients"
        "  sent MB  micro-batch",
    ]
    for row in rows:
        if row["same_as"]:
            why = "no video to encode once" if not row["video_tokens"] else "one rank"
            lines.append(f"{row['path']:7}  is {row['same_as']} here: {why}")
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        lines.append(
            f"{row['path']:7}{row['seconds']:9.3f}{row['tokens_per_s']:10.0f}{row['speedup']:9.2f}"
            f"{row['speedup_by_flops']:10.2f}{row['speedup_bound']:7.2f}{row['prefix_passes']:8}"
            f"{row['flops'] / 1e9:7.0f}{row['mfu']:7.0%}{row['over_floor']:9.1f}{peak:>9}"
            f"{row['max_rel_grad_diff']:11.1e}{row['bytes_sent'] / 1e6:9.1f}"
            f"{'-' if row['micro_batch'] is None else row['micro_batch']:>13}"
        )
    if over := [row["path"] for row in rows if row["speedup"] > row["speedup_bound"]]:
        lines.append(f"above the bound, so noise (more --repeats) or products at unequal rates: {', '.join(over)}")
    lines += [
        "x plain: speed-up; by FLOPs: counted, what it would be at equal rates; bound: the same of the prompt alone",
        "passes: forward passes over the prompt, a backward counts two; x floor: seconds over those of the FLOPs at",
        "the measured rate of products",
        "gradients: largest relative difference to plain's; sent: by all ranks, besides gradients",
    ]
    return lines
