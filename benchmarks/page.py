"""Writes benchmarks.md and benchmarks.svg from benchmarks.jsonl; `python benchmarks/page.py docs` does that alone."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from longrl.bench.work import Work

Row = dict[str, Any]
DEFAULTS = {"group_size": 8, "response_tokens": 64, "video_tokens": 0, "sp": 1}
ASKED = {1024: (4.8, 0.75), 4096: (8.3, 0.9), 8192: (9.5, 0.95)}
"""Prompt tokens -> least plain / fused, and least share of the ratio of counted operations; at DEFAULTS."""
MOST_GROWTH = 1.25
"""Time of fused at 16 responses over that at 8."""

COLOURS = {"stock": "#c9c9c9", "plain": "#8a8a8a", "shared": "#9db4d3", "fused": "#2f6db3"}


def read(data: Path) -> list[Row]:
    return [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]


def write(rows: list[Row], out: Path) -> None:
    (out / "benchmarks.md").write_text(make_page(rows), encoding="utf-8")
    draw(rows, out / "benchmarks.svg")


def steps(rows: list[Row], **wanted: Any) -> list[dict[str, Row]]:
    """The measured steps with these numbers, each as path -> row, by prompt, responses and ranks."""
    found: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            key = tuple(row[name] for name in ("prompt_tokens", "group_size", "sp", "video_tokens", "response_tokens"))
            found.setdefault(key, {})[row["path"]] = row
    return [found[key] for key in sorted(found)]


def ratio(step: dict[str, Row], slow: str, fast: str = "fused") -> float:
    return step[slow]["seconds"] / step[fast]["seconds"]


def make_page(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        "# Benchmarks",
        "",
        "Made by `make benchmarks` (`benchmarks/step.py` measures, `benchmarks/page.py` writes this page from",
        "[benchmarks.jsonl](benchmarks.jsonl)). One whole GRPO step of one prompt (rollout with decoding, old",
        "log-probs, update; no KL, nothing recomputed) along several paths of `longrl bench step`, with the same",
        "weights and samples: a text body of hidden size 256 with 4 layers, 8 heads and 2 KV heads, random weights,",
        "fp32.",
        "",
        f"Machine: {first['cpus']} CPU cores, {first['threads']} threads, PyTorch {first['torch'].partition('+')[0]}, "
        f"transformers {first['transformers']}. Products of matrices run at "
        f"{min(r['matmul_flops_per_s'] for r in rows) / 1e9:.0f} to "
        f"{max(r['matmul_flops_per_s'] for r in rows) / 1e9:.0f} GFLOP/s, measured before each step.",
        "",
        "- `plain`: every response is a sequence of its own, at the micro-batch that is fastest; media encoded in",
        "  each pass.",
        "- `reuse`: as plain, media encoded once. `mrsp`: as reuse, each sequence split over the ranks (MR-SP).",
        "- `shared`: the prompt once for the old log-probs and once in the update. `fused`: the prompt once.",
        "- `stock`: stock transformers (SDPA) in the place of the passes of plain.",
        "",
        "*x plain* is the speed-up, *by FLOPs* what it would be if all paths computed at one rate, *bound* the same",
        "of the prompt alone (the limit as responses get short). By passes alone the limit is 33 / 3 = 11 at G = 8;",
        "that it is more comes from the last layer, which a pass over a prefix leaves once keys and values are there:",
        "a quarter of this body, 1/28 of a 7B model. *x floor* is the time over that of the counted FLOPs at the",
        "measured rate of products, *gradients* the largest relative difference to plain's. Seconds are of the",
        "fastest run.",
        "",
        "![speed-up and distance to the floor](benchmarks.svg)",
        "",
        *_asked(rows),
        "## One process",
        "",
        *_table(steps(rows, sp=1, video_tokens=0)),
        *_ranks(rows),
    ]
    if video := [step for step in steps(rows) if step["plain"]["video_tokens"]]:
        lines += [
            "## A prompt of video",
            "",
            f"{video[0]['plain']['video_tokens']} of the prompt's tokens are video, made of synthetic frames by a "
            "vision tower.",
            "",
            *_table(video),
        ]
    lines += [
        "## Not measured",
        "",
        "- GPUs. `benchmarks/gpu_hour_video.py` is ready for one.",
        "- More cores or machines: ranks here are processes that share the cores above.",
        "- Real checkpoints: weights are random, which does not change what is computed.",
    ]
    return "\n".join(lines) + "\n"


def _asked(rows: list[Row]) -> list[str]:
    lines = [
        "## Asked and found",
        "",
        "| prompt tokens | plain / fused | at least | | of the ratio by FLOPs | at least | | with whole passes | "
        "| plain / shared | stock / fused |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps(rows, **DEFAULTS):
        fused = step["fused"]
        found = fused["speedup"]
        share = found / fused["speedup_by_flops"]
        numbers = {field.name: fused[field.name] for field in fields(Work)}
        whole = found / Work(**numbers).speedup_by_whole_passes()
        least, least_share = ASKED.get(fused["prompt_tokens"], (None, None))
        lines.append(
            f"| {fused['prompt_tokens']:,} | {found:.2f} | {least or '-'} | {_held(found, least)} "
            f"| {share:.2f} | {least_share or '-'} | {_held(share, least_share)} | {whole:.2f} "
            f"| {_held(whole, least_share)} | {step['shared']['speedup']:.2f} | {ratio(step, 'stock'):.2f} |"
        )
    lines += [
        "",
        "*With whole passes* counts three whole passes over the prompt for `fused`, as the figures asked for did: they",
        "did not know of the last layer's early end.",
        "",
    ]
    for few in steps(rows, sp=1, video_tokens=0):
        size, prompt = few["fused"]["group_size"], few["fused"]["prompt_tokens"]
        new = few["fused"]["response_tokens"]
        for many in steps(rows, sp=1, video_tokens=0, group_size=2 * size, prompt_tokens=prompt, response_tokens=new):
            growth = ratio({"many": many["fused"], "few": few["fused"]}, "many", "few")
            lines += [
                f"From {size} to {2 * size} responses at {prompt:,} prompt tokens `fused` takes {growth:.2f} times as "
                f"long (asked: at most {MOST_GROWTH}; {'held' if growth <= MOST_GROWTH else '**not held**'}).",
                "",
            ]
    return lines


def _held(found: float, least: float | None) -> str:
    return "-" if least is None else "held" if found >= least else "**not held**"


def _table(found: list[dict[str, Row]]) -> list[str]:
    lines = [
        "| prompt | G x R | path | seconds | tokens/s | x plain | by FLOPs | bound | passes | MFU | x floor | peak MB "
        "| gradients |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in found:
        for row in step.values():
            if row["same_as"] is None:
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
                lines.append(
                    f"| {row['prompt_tokens']:,} | {row['group_size']} x {row['response_tokens']} | {row['path']} "
                    f"| {row['seconds']:.3f} | {row['tokens_per_s']:.0f} | {row['speedup']:.2f} "
                    f"| {row['speedup_by_flops']:.2f} | {row['speedup_bound']:.2f} | {row['prefix_passes']} "
                    f"| {row['mfu']:.0%} | {row['over_floor']:.2f} | {peak} | {row['max_rel_grad_diff']:.0e} |"
                )
    return [*lines, ""]


def _ranks(rows: list[Row]) -> list[str]:
    split = {(row["prompt_tokens"], row["group_size"]) for row in rows if row["sp"] > 1}
    if not split:
        return []
    lines = [
        "## Several processes",
        "",
        "On the same cores. `plain` deals its responses out to the ranks, each of which also reads the prompt for its",
        "rollouts; the others split every prompt (Ulysses). MB sent: in a step by all ranks, besides gradients.",
        "",
        "| prompt | ranks | plain s | mrsp s | shared s | fused s | plain / fused | mrsp / fused | shared / fused "
        "| fused x floor | mrsp sent MB | fused sent MB | fused peak MB, a rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps(rows, video_tokens=0):
        fused = step["fused"]
        if (fused["prompt_tokens"], fused["group_size"]) in split:
            seconds = " | ".join(f"{step[path]['seconds']:.3f}" for path in ("plain", "mrsp", "shared", "fused"))
            ratios = " | ".join(f"{ratio(step, path):.2f}" for path in ("plain", "mrsp", "shared"))
            sent = " | ".join(f"{step[path]['bytes_sent'] / 1e6:.1f}" for path in ("mrsp", "fused"))
            peak = "-" if fused["peak_bytes"] is None else f"{fused['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"| {fused['prompt_tokens']:,} | {fused['sp']} | {seconds} | {ratios} | {fused['over_floor']:.2f} "
                f"| {sent} | {peak} |"
            )
    return [*lines, ""]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "longrl"  # the same figure for the same figures
    found = steps(rows, sp=1, video_tokens=0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    places = _bars(left, found, ("shared", "fused"), "speedup")
    for name, at in places.items():
        label = "by FLOPs" if name == "fused" else None
        left.plot(at, [step[name]["speedup_by_flops"] for step in found], "_k", markersize=16, label=label)
    left.set_ylabel("speed-up over plain")
    _bars(right, found, ("stock", "plain", "shared", "fused"), "over_floor")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("time over the floor")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, found: list[dict[str, Row]], paths: tuple[str, ...], figure: str) -> dict[str, list[float]]:
    """A bar a path, in groups by step; returns where they stand."""
    width = 0.8 / len(paths)
    places = {}
    for number, name in enumerate(paths):
        places[name] = [place + width * (number - (len(paths) - 1) / 2) for place in range(len(found))]
        axes.bar(places[name], [step[name][figure] for step in found], 0.9 * width, color=COLOURS[name], label=name)
    fused = [step["fused"] for step in found]
    axes.set_xticks(range(len(found)), [f"{row['prompt_tokens']:,}\nG = {row['group_size']}" for row in fused])
    axes.set_xlabel("prompt tokens")
    axes.spines[["top", "right"]].set_visible(False)
    return places


if __name__ == "__main__":
    write(read(Path(sys.argv[1]) / "benchmarks.jsonl"), Path(sys.argv[1]))
