"""Samples of image and video generation as files, and report.html: what was made before and after, from equal noise.

RUN/held_out/before/prompt_0000.png the samples of a prompt side by side; .mp4 of videos
RUN/held_out/before.json            their rewards
RUN/report.html                     one page, nothing outside it
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from longrl.config_files import load_config
from longrl.files import write_whole
from longrl.flow_config import FlowConfig
from longrl.flow_types import Media
from longrl.report.metrics import FILE_NAME, read_metrics
from longrl.report.plots import Series, line_chart
from longrl.runtime import CONFIG_NAME

MOST_SAMPLES = 8
"""Of a prompt, side by side."""
MIN_SIDE_PX = 192
"""Smaller pictures are shown enlarged, by a whole factor."""
GAP_PX = 4
"""White between samples; even, as H.264 wants it."""

_CURVES = {
    "Reward": "reward/mean",
    "Reward of held-out noise": "held_out/reward",
    "Samples not scored": "reward/unscored",
    "Loss": "loss",
    "Divergence from the start": "kl",
    "Log-prob difference, largest": "sampling/logprob_diff",
    "Gradient norm": "grad_norm",
    "Seconds a step": "wall_s",
}


def save_samples(stem: Path, media: Media) -> Path:
    """Writes a prompt's samples side by side: a PNG, or of videos an mp4 (H.264, which browsers play).

    Args:
        stem: of the file, without its ending.

    Returns:
        The file.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    scale = -(-MIN_SIDE_PX // media.pixels.shape[2])
    shown = media.pixels[:MOST_SAMPLES].repeat(scale, 2).repeat(scale, 3)
    spaced = np.pad(shown, [(0, 0), (0, 0), (0, 0), (0, GAP_PX), (0, 0)], constant_values=255)
    frames = np.concatenate(list(spaced), axis=2)[:, :, :-GAP_PX]  # [F, H, n W, 3]
    if media.fps is not None:
        path = stem.with_suffix(".mp4")
        write_video(path, frames, media.fps)
        return path
    from PIL import Image

    path = stem.with_suffix(".png")
    Image.fromarray(frames[0]).save(path)
    return path


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """
    Args:
        frames: uint8 [F, H, W, 3] of even height and width.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def gain(before: Mapping[str, Any], after: Mapping[str, Any], name: str = "rewards") -> tuple[float, float, int]:
    """Mean difference of equal prompts and equal noise, its standard error, and the number of pairs.

    Args:
        before, after: contents of held_out/STAGE.json.
        name: rewards, or swapped: the same samples scored against the next prompt's text.
    """
    pairs = [
        (x, y)
        for one, other in zip(before["prompts"], after["prompts"], strict=True)
        for x, y in zip(one[name], other[name], strict=True)
        if x is not None and y is not None
    ]
    differences = np.array([y - x for x, y in pairs])
    if len(pairs) < 2:
        return math.nan, math.nan, len(pairs)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(pairs))), len(pairs)


def write_media_report(run_dir: Path) -> Path:
    """Writes report.html; of a run that has ended summary.json too, with the gain on held-out noise.

    Raises:
        ValueError: there are no samples yet.
    """
    files = {stage: run_dir / "held_out" / f"{stage}.json" for stage in ("before", "after")}
    stages = {stage: json.loads(path.read_text(encoding="utf-8")) for stage, path in files.items() if path.exists()}
    if "before" not in stages:
        raise ValueError(
            f"{run_dir}: no samples yet ({files['before'].name} is missing); they come before the first step"
        )
    summary: dict[str, Any] = {f"reward_{stage}": content["reward"] for stage, content in stages.items()}
    if "after" in stages:
        summary |= _gains(stages)
        write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))
    config = load_config([run_dir / CONFIG_NAME])
    assert isinstance(config, FlowConfig)
    sections = [
        _head(config, summary),
        _samples(run_dir, stages, config.held_out.shown),
        _curves(run_dir / FILE_NAME, list(config.rewards)),
        _configuration(run_dir),
    ]
    style = resources.files("longrl.report").joinpath("page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Generation RL: report</title>'
        f"<style>{style}</style></head><body><main>{''.join(f'<section>{one}</section>' for one in sections)}"
        "</main></body></html>\n"
    )
    path = run_dir / "report.html"
    write_whole(path, page)
    return path


def _gains(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    summary = dict[str, Any]()
    for name in ("rewards", "swapped"):
        mean, error, pairs = gain(stages["before"], stages["after"], name)
        key = "gain" if name == "rewards" else "swapped_gain"
        summary |= {key: _finite(mean), f"{key}_standard_error": _finite(error), "pairs": pairs}
    return summary


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _head(config: FlowConfig, summary: Mapping[str, Any]) -> str:
    def number(key: str, style: str = "+.3f") -> str:
        value = summary.get(key)
        return "&ndash;" if value is None else format(value, style)

    rows = [
        ("Reward before", number("reward_before", ".3f"), ""),
        ("Reward after", number("reward_after", ".3f"), ""),
        ("Gain", number("gain"), f"&plusmn; {number('gain_standard_error', '.3f')}"),
        ("Gain, each sample scored against the next prompt (control)", number("swapped_gain"),
         f"&plusmn; {number('swapped_gain_standard_error', '.3f')}"),
    ]  # fmt: skip
    table = "".join(
        f'<tr><td>{what}</td><td class="number"><b>{value}</b></td><td class="number">{error}</td></tr>'
        for what, value, error in rows
    )
    paired = (
        f"the same before and after: {summary['pairs']} pairs; &plusmn; is one standard error of the paired difference"
        if "pairs" in summary
        else "as it was before training, which has not ended"
    )
    return (
        f"<h1>Reinforcement learning of a generator</h1><p>{escape(config.model.path)}, "
        f"{config.flow.preset or config.flow.method}, {config.steps} steps; reward: "
        f"{escape(', '.join(f'{weight:g} x {name}' for name, weight in config.rewards.items()))}</p>"
        f'<p class="lead">Held-out noise that training never saw, {paired}.</p>'
        f'<div class="scroll"><table class="checks"><tbody>{table}</tbody></table></div>'
    )


def _samples(run_dir: Path, stages: Mapping[str, Mapping[str, Any]], shown: int) -> str:
    parts = [
        "<h2>Samples</h2><p class='note'>Of the first prompts of the file; equal noise above and below. Of a prompt's "
        f"samples {MOST_SAMPLES} are shown at most; the mean is of all.</p>"
    ]
    for i, prompt in enumerate(stages["before"]["prompts"][:shown]):
        figures = ""
        for stage, content in stages.items():
            values = [value for value in content["prompts"][i]["rewards"] if value is not None]
            mean = f"mean reward {sum(values) / len(values):.3f} of {len(values)} samples" if values else "not scored"
            figures += (
                f'<figure class="picture">{_embedded(run_dir / "held_out" / stage / sample_name(i))}'
                f"<figcaption>{stage}: {mean}</figcaption></figure>"
            )
        parts.append(f'<article class="sample"><h3>{escape(prompt["prompt"])}</h3>{figures}</article>')
    return "".join(parts)


def sample_name(place: int) -> str:
    """Of the file with the samples of a prompt, by its place among the prompts."""
    return f"prompt_{place:04d}"


def _embedded(stem: Path) -> str:
    """Picture or video as part of the page."""
    for suffix, kind in ((".png", "image/png"), (".mp4", "video/mp4")):
        path = stem.with_suffix(suffix)
        if path.exists():
            data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            if suffix == ".png":
                return f'<img alt="samples" src="{data}">'
            # The player's own bar would hide half of a small picture.
            pause = 'onclick="this.paused ? this.play() : this.pause()" title="click to pause"'
            return f'<video loop muted autoplay playsinline {pause} src="{data}"></video>'
    return '<p class="missing">Nothing to show: no samples were saved.</p>'


def _curves(path: Path, rewards: Sequence[str]) -> str:
    records = read_metrics(path) if path.exists() else []
    parts = {f"Reward: {name}": f"reward/{name}" for name in rewards} if len(rewards) > 1 else {}
    figures = "".join(_curve(records, title, name) for title, name in (_CURVES | parts).items())
    return f'<h2>Training</h2><div class="grid">{figures}</div>'


def _curve(records: Sequence[Mapping[str, Any]], title: str, name: str) -> str:
    """Over the steps that have it."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if not points or (name == "reward/unscored" and not any(y for _, y in points)):
        return ""
    steps, ys = zip(*points, strict=True)
    svg = line_chart(steps, [Series(label=title, colour="rl", ys=ys)], title)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _configuration(run_dir: Path) -> str:
    text = escape((run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    return f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
