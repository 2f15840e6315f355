"""report.html: one page, nothing outside it, about a quickstart run: what was learned, how, and whether it holds up.
Or about a training run: how it goes, or went.

Read from the run directory: summary.json, eval/STAGE.json, sft/metrics.jsonl, rl/metrics.jsonl, gallery.png and
config.yaml; of a training run metrics.jsonl and config.yaml.
What is missing or broken is named in the place where it would stand.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from longrl.config_files import read_yaml
from longrl.files import write_whole
from longrl.report.headline import headline_html, plain, standard_error, training_html
from longrl.report.media import write_media_report
from longrl.report.plots import PARTS, Series, area_chart, bar_chart, line_chart, smoothing
from longrl.report.run_files import LOOPS, STAGES, RunFiles, metrics_file, read_run
from longrl.report.samples import samples_html
from longrl.runtime import CONFIG_NAME

_CURVES: dict[str, dict[str, tuple[str, ...]]] = {
    "rl": {
        "Reward": ("reward/mean", "reward/format"),
        "Answer reward": ("reward/answer", "eval/accuracy"),
        "Groups that give a gradient": ("groups/informative",),
        "Response length, tokens": ("response/tokens",),
        "Loss": ("loss",),
        "Entropy, nats a token": ("entropy",),
        "Log-prob difference, largest": ("sampling/logprob_diff",),
        "Gradient norm": ("grad_norm",),
        "Learning rate": ("lr",),
    },
    "sft": {"Loss": ("loss",), "Gradient norm": ("grad_norm",), "Learning rate": ("lr",)},
}
_OPTION = re.compile(r"^[A-Z]\. ", re.MULTILINE)


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory.

    Args:
        run_dir: Of a quickstart or a training run, complete or not.

    Returns:
        The page's path.

    Raises:
        OSError: The page cannot be written.
    """
    run = read_run(run_dir)
    if (kind := run.config.get("kind")) in LOOPS:
        sections = [training_html(run, kind), _curves(run, kind), _step_time(run), _configuration(run)]
    else:
        sections = [
            headline_html(run),
            _gallery(run),
            _accuracy(run),
            _curves(run, "rl"),
            samples_html(run),
            _step_time(run),
            _wall_time(run),
            _curves(run, "sft"),
            _configuration(run),
        ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Long-video RL: report</title>'
        f"<style>{resources.files('longrl.report').joinpath('page.css').read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(f'<section>{section}</section>' for section in sections)}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    write_whole(path, page)
    return path


def report_command(run_dir: Path) -> None:
    """
    Raises:
        ValueError: no such run, or one of a kind that has no such report.
    """
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir}: no run directory (no {CONFIG_NAME}); give the run_dir of a run")
    kinds = (*LOOPS, "quickstart", "flow")
    if (kind := read_yaml(path).get("kind")) not in kinds:
        raise ValueError(f"{run_dir}: a run of kind {kind!r} has no such report; give one of {', '.join(kinds)}")
    typer.echo(write_media_report(run_dir) if kind == "flow" else write_report(run_dir))


# Sections


def _gallery(run: RunFiles) -> str:
    head = '<h2>What the model watches</h2><p class="note">Frames of some of the videos, with their times.</p>'
    path = run.run_dir / "gallery.png"
    if not path.exists():
        return f'{head}<p class="missing">Nothing to show: <code>gallery.png</code> is missing.</p>'
    return f'{head}<figure class="picture"><img alt="Frames of the videos" src="{_picture(path)}"></figure>'


def _accuracy(run: RunFiles) -> str:
    head = "<h2>Accuracy on held-out videos</h2>"
    if not any(stage in run.evals for stage in STAGES):
        return head + run.missing(*(f"eval/{stage}.json" for stage in STAGES))
    sampled = next(iter(run.evals.values())).get("samples_per_question")
    note = (
        f'<p class="note">Mean of {sampled or "the"} sampled answers a question. Error bars: one binomial '
        "standard error, counting questions, not samples. Dashed: a guess, where all have as many options.</p>"
    )
    names = {
        name: list(_union(content.get(name, {}) for content in run.evals.values()))
        for name in ("by_kind", "by_category")
    }
    charts = [
        _bars(run, "Overall and by kind", "by_kind", names["by_kind"]),
        _bars(run, "By category", "by_category", names["by_category"]),
    ]
    missing = (
        "" if all(stage in run.evals for stage in STAGES) else run.missing(*(f"eval/{stage}.json" for stage in STAGES))
    )
    return f'{head}{note}<div class="grid wide">{"".join(charts)}</div>{missing}{_accuracy_table(run, names)}'


def _bars(run: RunFiles, title: str, part: str, groups: list[str]) -> str:
    cells = {
        stage: [_cell(content, part, group) for group in (["all"] if part == "by_kind" else []) + groups]
        for stage, content in run.evals.items()
        if stage in STAGES
    }
    series = [
        Series(
            label=STAGES[stage],
            colour=stage,
            ys=[math.nan if accuracy is None else accuracy for accuracy, _ in row],
            errors=[0.0 if accuracy is None or not num else standard_error(accuracy, num) for accuracy, num in row],
        )
        for stage, row in cells.items()
    ]
    groups = (["all"] if part == "by_kind" else []) + groups
    asked = next(iter(run.evals.values())).get("examples", [])
    chance = [
        _guess(one for one in asked if group in ("all", one.get("kind"), one.get("category"))) for group in groups
    ]
    return _figure(title, series, bar_chart(groups, series, title, chance)) if groups else ""


def _guess(asked: Iterable[Mapping[str, Any]]) -> float | None:
    """How often one is right, where all questions are a choice of as many options, which stand below them."""
    options = {len(_OPTION.findall(one.get("question", ""))) if one.get("kind") == "choice" else 0 for one in asked}
    return 1 / options.pop() if len(options) == 1 and 0 not in options else None


def _cell(content: Mapping[str, Any], part: str, group: str) -> tuple[float | None, int | None]:
    """Accuracy and number of questions of a group, or of all."""
    cell = content if group == "all" else content.get(part, {}).get(group, {})
    return cell.get("accuracy"), cell.get("num_questions")


def _accuracy_table(run: RunFiles, names: Mapping[str, list[str]]) -> str:
    columns = [("by_kind", "all"), *((part, group) for part in names for group in names[part])]
    first = next(iter(run.evals.values()))
    counts = [_cell(first, *column)[1] for column in columns]
    head = "".join(
        f'<th class="number">{escape(group)}{"" if num is None else f" ({num})"}</th>'
        for (_, group), num in zip(columns, counts, strict=True)
    )
    rows = []
    for stage, content in run.evals.items():
        cells = [_cell(content, *column)[0] for column in columns] + [content.get("mean_response_tokens")]
        styles = [".3f"] * len(columns) + [".1f"]
        shown = "".join(f'<td class="number">{plain(x, style)}</td>' for x, style in zip(cells, styles, strict=True))
        rows.append(f"<tr><td>{escape(STAGES.get(stage, stage.replace('_', ' ')))}</td>{shown}</tr>")
    return (
        "<details><summary>All numbers (questions in brackets)</summary>"
        f'<div class="scroll"><table><thead><tr><th>stage</th>{head}'
        '<th class="number">tokens a response</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _curves(run: RunFiles, kind: str) -> str:
    records, title = run.metrics[kind], LOOPS[kind]
    if not records:
        return f"<h2>{title}</h2>{run.missing(metrics_file(run.config, kind))}"
    window = smoothing(len(records))
    averaged = f", with the moving mean of {window} steps drawn strong" if window > 1 else ""
    bound = _max_logprob_diff(run.config)
    main = [_curve(records, label, names, bound) for label, names in _CURVES[kind].items()]
    shown = {name for names in _CURVES[kind].values() for name in names} | {"step", "wall_s"}
    others = [name for name in _union(records) if name not in shown and not name.startswith("time/")]
    more = "".join(_curve(records, name, (name,)) for name in others)
    details = (
        f'<details><summary>Other metrics ({len(others)})</summary><div class="grid">{more}</div></details>'
        if more
        else ""
    )
    note = f'<p class="note">{len(records)} steps, each as logged{averaged}.</p>'
    return f'<h2>{title}</h2>{note}<div class="grid">{"".join(main)}</div>{details}'


def _max_logprob_diff(config: Mapping[str, Any]) -> float | None:
    """Above which the run stops."""
    loop = config.get("rl", config)
    return loop.get("algo", {}).get("max_logprob_diff") if isinstance(loop, Mapping) else None


def _curve(
    records: list[dict[str, Any]], title: str, names: Iterable[str], max_logprob_diff: float | None = None
) -> str:
    """One chart of the metrics among `names` that were logged; nothing if none was."""
    present = [name for name in names if any(record.get(name) is not None for record in records)]
    if not present:
        return ""
    colours = ("rl", "sft", "c3")
    series = [
        Series(label=name, colour=colour, ys=_column(records, name))
        for name, colour in zip(present, colours, strict=False)
    ]
    bound = max_logprob_diff if "sampling/logprob_diff" in present else None
    if bound is not None:
        title = f"{title} (dashed: {bound:g}, above which the run stops)"
    log = bound is not None and all(not y <= 0 for one in series for y in one.ys)
    svg = line_chart([record["step"] for record in records], series, title, log=log, bound=bound)
    return _figure(title, series if len(series) > 1 else [], svg)


def _step_time(run: RunFiles) -> str:
    head = "<h2>Where a step's time goes</h2>"
    charts = []
    for kind, label in (("rl", "RL step"), ("sft", "SFT step")):
        records = run.metrics.get(kind, [])
        parts = [name for name in _union(records) if name.startswith("time/")]
        if not parts:
            continue
        layers = {
            name.removeprefix("time/"): [value or 0.0 for value in (r.get(name) for r in records)] for name in parts
        }
        whole = [record.get("wall_s") or 0.0 for record in records]
        layers["other"] = [max(total - sum(ys), 0.0) for total, *ys in zip(whole, *layers.values(), strict=True)]
        mean = sum(whole) / len(whole)
        series = [
            Series(
                label=f"{name} {sum(ys) / len(ys):.2f} s", colour="base" if name == "other" else PARTS[index % 7], ys=ys
            )
            for index, (name, ys) in enumerate(layers.items())
        ]
        title = f"{label}: {mean:.2f} s on average"
        charts.append(_figure(title, series, area_chart([record["step"] for record in records], series, title)))
    if not charts:
        return head + run.missing(*(metrics_file(run.config, kind) for kind in run.metrics))
    return f'{head}<div class="grid wide">{"".join(charts)}</div>'


def _wall_time(run: RunFiles) -> str:
    head = "<h2>Where the run's time went</h2>"
    wall = {name: seconds for name, seconds in (run.summary.get("wall_s") or {}).items() if seconds}
    if not wall:
        return head + run.missing("summary.json")
    total = wall.pop("total", sum(wall.values()))
    rest = total - sum(wall.values())
    parts = list(wall.items()) + ([("other", rest)] if rest > 0.005 * total else [])
    tones = ["base" if name == "other" else PARTS[index % len(PARTS)] for index, (name, _) in enumerate(parts)]
    bar = "".join(
        f'<i style="--tone:var(--{tone});--share:{seconds:.3f}" title="{escape(name)}"></i>'
        for (name, seconds), tone in zip(parts, tones, strict=True)
    )
    key = "".join(
        f'<span><i style="--tone:var(--{tone})"></i>{escape(name.replace("_", " "))} '
        f"{seconds:.1f} s, {100 * seconds / total:.0f}%</span>"
        for (name, seconds), tone in zip(parts, tones, strict=True)
    )
    return (
        f'{head}<p class="note">{total:.0f} s in all.</p><div class="bar">{bar}</div><div class="key small">{key}</div>'
    )


def _configuration(run: RunFiles) -> str:
    path = run.run_dir / "config.yaml"
    if not path.exists():
        return '<h2>Configuration</h2><p class="missing">Nothing to show: <code>config.yaml</code> is missing.</p>'
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return (
        '<h2>Configuration</h2><p class="note">As resolved: this file alone reproduces the run.</p>'
        f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"
    )


# Small parts


def _figure(title: str, key: Iterable[Series], svg: str) -> str:
    spans = "".join(f'<span><i style="--tone:var(--{one.colour})"></i>{escape(one.label)}</span>' for one in key)
    legend = f'<figcaption class="key">{spans}</figcaption>' if spans else ""
    return f"<figure><h3>{escape(title)}</h3>{legend}{svg}</figure>"


def _column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if (value := record.get(name)) is None else float(value) for record in records]


def _union(mappings: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """All keys, in the order of their first appearance."""
    return dict.fromkeys(name for mapping in mappings for name in mapping)


def _picture(path: Path) -> str:
    """An image as a data URI; a large one shrunk, so that the page stays small."""
    data, kind = path.read_bytes(), "png"
    if len(data) > 600_000:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((1600, 1600))
            out = io.BytesIO()
            image.convert("RGB").save(out, format="JPEG", quality=88)
        data, kind = out.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
