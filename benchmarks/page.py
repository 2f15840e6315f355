"""Writes benchmarks.md and benchmarks.svg from benchmarks.jsonl, and what other scripts have printed into the same
folder; `python benchmarks/page.py docs` does that alone."""

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
    (out / "benchmarks.md").write_text(make_page(rows, read_others(out)), encoding="utf-8")
    draw(rows, out / "benchmarks.svg")


def read_others(folder: Path) -> dict[str, list[Row]]:
    """Script -> what it has printed, of those scripts whose figures are there."""
    paths = {name: folder / f"{name}.jsonl" for name in OTHERS}
    return {name: read(path) for name, path in paths.items() if path.exists()}


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


def make_page(rows: list[Row], others: dict[str, list[Row]]) -> str:
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
        "of the prompt alone (the limit as responses get short). Both count the operations really done. *x floor* is",
        "the time over that of those FLOPs at the measured rate of products, *gradients* the largest relative",
        "difference to plain's. Seconds are of the fastest run.",
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
    for name, figures in others.items():
        lines += OTHERS[name](figures)
    return "\n".join([*lines, *NOT_MEASURED]) + "\n"


def _asked(rows: list[Row]) -> list[str]:
    lines = [
        "## Asked and found",
        "",
        "| prompt tokens | plain / fused | at least | | plain / shared | stock / fused |",
        "|---|---|---|---|---|---|",
    ]
    shares = [
        "A share of the ratio of counted FLOPs is asked for, too, and FLOPs can be counted in two ways:",
        "",
        "- *whole passes*: every pass over the prompt runs all layers. At G = 8 that is 33 passes of `plain` and 3 of",
        "  `fused`, so their ratio tends to 33 / 3 = 11 as the prompt grows. This counts more than `fused` does, so a",
        "  share can be above 1.",
        "- *operations done*: a pass over a prefix leaves the last layer once its keys and values are there, forward",
        "  and backward. The last layer is a quarter of this body (1/28 of a 7B model), so `fused` has less to do, the",
        "  ratio is higher, and the same time is a smaller share of it.",
        "",
        "| prompt tokens | at least | whole passes: ratio | share | | operations done: ratio | share | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in steps(rows, **DEFAULTS):
        fused, tokens = step["fused"], f"{step['fused']['prompt_tokens']:,}"
        numbers = {field.name: fused[field.name] for field in fields(Work)}
        least, least_share = ASKED.get(fused["prompt_tokens"], (None, None))
        found, by_count = fused["speedup"], []
        for by_flops in (Work(**numbers).speedup_by_whole_passes(), fused["speedup_by_flops"]):
            share = found / by_flops
            by_count.append(f"{by_flops:.2f} | {share:.2f} | {_held(share, least_share)}")
        lines.append(
            f"| {tokens} | {found:.2f} | {least or '-'} | {_held(found, least)} | {step['shared']['speedup']:.2f} "
            f"| {ratio(step, 'stock'):.2f} |"
        )
        shares.append(f"| {tokens} | {least_share or '-'} | {' | '.join(by_count)} |")
    lines += ["", *shares, ""]
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


def _layouts(rows: list[Row]) -> list[str]:
    layouts = [(row["heads"], row["ring"]) for row in rows if "heads" in row]
    layouts = list(dict.fromkeys(layouts))
    lines = [
        "## Which layout `sp: auto` chooses",
        "",
        "`python benchmarks/sequence_degrees.py > docs/sequence_degrees.jsonl`: four gloo processes on the cores",
        "above, each of which may plan 70 MiB. Seconds of a fused step of four prompts, by heads (Ulysses) x ring;",
        "what does not fit in brackets, what is chosen in bold; asked: at most 15% over the best that fits.",
        "",
        f"| prompt tokens | {' | '.join(f'{heads} x {ring}' for heads, ring in layouts)} | over the best |",
        "|---" * (len(layouts) + 2) + "|",
    ]
    for summary in (row for row in rows if "best" in row):
        tokens = summary["prompt_tokens"]
        cells = [
            f"**{row['seconds']:.2f}**" if row["auto"] else f"{row['seconds']:.2f}" if row["fits"] else
            f"({row['seconds']:.2f})"
            for row in rows if "heads" in row and row["prompt_tokens"] == tokens
        ]  # fmt: skip
        lines.append(f"| {tokens:,} | {' | '.join(cells)} | {summary['over_best']:.0%} |")
    return [*lines, ""]


def _host_memory(rows: list[Row]) -> list[str]:
    lines = [
        "## Host memory of encoding an hour",
        "",
        f"`python benchmarks/host_memory.py > docs/host_memory.jsonl`: 3,600 frames of 320 x 240, which are "
        f"{rows[0]['pixels_mb']:.0f} MB of pixels",
        f"and {rows[0]['embeds_mb']:.0f} MB of embeddings; the tiny model. How far the resident memory of each rank "
        "rises at most.",
        "",
        "| ranks | G | while encoding, MB | while sampling, MB |",
        "|---|---|---|---|",
    ]
    for row in rows:
        risen = (", ".join(f"{mb:.0f}" for mb in row[job]) for job in ("encode_mb", "sample_mb"))
        lines.append(f"| {row['ranks']} | {row['group_size']} | {' | '.join(risen)} |")
    return [*lines, ""]


def _in_flight(rows: list[Row]) -> list[str]:
    first = rows[0]
    lines = [
        "## Short prompts side by side",
        "",
        f"`python benchmarks/in_flight.py > docs/in_flight.jsonl`: {first['prompts']} prompts of "
        f"{first['prompt_tokens']} tokens, G = {first['group_size']},",
        f"{first['response_tokens']} tokens each, the tiny twin, {first['threads']} thread. Seconds of the processor "
        "that decoding takes.",
        "",
        "| `prompts_in_flight` | seconds | faster than one by one |",
        "|---|---|---|",
    ]
    lines += [f"| {row['in_flight']} | {row['decode_cpu_s']:.2f} | {row['times']:.1f}x |" for row in rows]
    return [*lines, ""]


def _engines(rows: list[Row]) -> list[str]:
    lines = [
        "## Engines",
        "",
        f"`benchmarks/engines.py`: {rows[0]['response_tokens']} tokens a rollout, a text twin, one thread. Seconds of",
        "the processor up to the update; vLLM's with the prefixes that the update then computes, and new weights.",
        "",
        "| prompt tokens | prompts x G | native, all side by side | one by one | vLLM | of that drawing | prefixes "
        "| weights | one by one / vLLM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["prompts"] > 1):  # of one prompt the built-in engine is the faster anyway
        parts = [row[name] for name in ("draw_s", "prefix_s", "weights_s")]
        lines.append(
            f"| {row['prompt_tokens']:,} | {row['prompts']} x {row['rollouts'] // row['prompts']} "
            f"| {row['native_s']:.2f} | {row['by_one_s']:.2f} | {sum(parts):.2f} "
            f"| {' | '.join(f'{x:.2f}' for x in parts)} | {row['by_one_s'] / sum(parts):.2f} |"
        )
    return [*lines, ""]


OTHERS = {"sequence_degrees": _layouts, "host_memory": _host_memory, "in_flight": _in_flight, "engines": _engines}
"""Scripts of this folder -> the section that shows what they printed into docs/SCRIPT.jsonl."""

NOT_MEASURED = """\
## Not measured

No GPU could be used. `benchmarks/gpu_hour_video.py` is ready for one (an H200; torch and transformers, and peft for the
adapters, are enough); a test runs it on a CPU with a tiny body. What is asked of it, and the one command each:

- (a) An hour: a 7B body with LoRA, 3,600 frames (218,000 tokens), G = 8, 512-token responses. Asked: a complete exact
  step that does not run out of memory; MFU of the update at least 25%, aim 35%.
  `python benchmarks/gpu_hour_video.py hour`
- (b) `plain` / `fused` of that body at 16k, 64k and 128k tokens (there one response of `plain`, counted 8 times).
  `python benchmarks/gpu_hour_video.py curve`
- (c) Full fine-tuning of a 3B body at 64k tokens. `python benchmarks/gpu_hour_video.py full`

Nor were:

- More cores or machines: ranks here are processes that share the cores above.
- Real checkpoints: weights are random, which does not change what is computed.
""".splitlines()


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
