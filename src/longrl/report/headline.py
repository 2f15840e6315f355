"""The head of the page: accuracy by stage, and what was claimed beside what was measured; of a training run, how far
it has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from longrl.report.progress import clock
from longrl.report.run_files import LOOPS, STAGES, RunFiles


def headline_html(run: RunFiles) -> str:
    summary = run.summary
    title = "<h1>Long-video reinforcement learning, end to end</h1>"
    if not summary:
        return title + run.missing("summary.json")
    lead = (
        '<p class="lead">Questions about real video files, answered before and after supervised fine-tuning on '
        "chains of thought (SFT) and after reinforcement learning (RL). Half of the demonstrations guess without "
        "looking, on purpose: SFT learns that too, and RL must find out what pays. What it can gain is what looking "
        "gains, which the SFT model made to answer in its careful format shows. Test videos were never trained on. "
        "Accuracies here are of four-option questions, where a guess scores 25%; &plusmn; is one standard error.</p>"
    )
    return f"{title}{lead}{_stage_cards(run)}{_checks(run)}{_facts(summary)}"


def training_html(run: RunFiles, kind: str) -> str:
    """Of a training run, finished or not."""
    records, config = run.metrics[kind], run.config
    model = escape(str((config.get("model") or {}).get("path")))
    data = escape(str((config.get("data") or {}).get("train")))
    lead = f'<p class="lead">{LOOPS[kind]} of <code>{model}</code> on <code>{data}</code>.</p>'
    facts: dict[str, Any] = {"steps": f"{records[-1]['step'] if records else 0:,} of {config.get('steps')}"}
    if records:
        seconds = [record["wall_s"] for record in records]
        facts |= {"time": clock(sum(seconds)), "seconds a step": f"{sum(seconds) / len(seconds):.2f}"}
    for label, name in (("loss", "loss"), ("reward", "reward/mean"), ("held-out accuracy", "eval/accuracy")):
        if values := [record[name] for record in records if record.get(name) is not None]:
            facts[label] = f"{values[0]:.3g} \u2192 {values[-1]:.3g}"
    return f"<h1>{escape(run.run_dir.resolve().name)}</h1>{lead}{_fact_list(facts)}"


@dataclass(frozen=True, slots=True)
class Check:
    """A figure beside what is promised of it."""

    what: str
    measured: float | None
    at_least: float | None = None
    at_most: float | None = None
    style: str = ".3f"
    why: str = ""
    """Where the bound comes from, if it was measured too."""

    @property
    def value(self) -> str:
        return "none" if self.measured is None else format(self.measured, self.style)

    @property
    def bound(self) -> str:
        limit = self.at_least if self.at_least is not None else self.at_most
        if limit is None:
            return "for comparison"
        return f"{'at most' if self.at_least is None else 'at least'} {format(limit, self.style)}{self.why}"

    @property
    def holds(self) -> bool | None:
        """None: there is no bound. A figure that was not measured does not hold."""
        if self.at_least is not None:
            return self.measured is not None and self.measured >= self.at_least
        if self.at_most is not None:
            return self.measured is not None and self.measured <= self.at_most
        return None

    def row(self) -> str:
        if self.measured is None:
            return ""
        verdict = {
            True: '<span class="holds">holds</span>',
            False: '<span class="fails">does not hold</span>',
            None: "",
        }[self.holds]
        return (
            f'<tr><td>{escape(self.what)}</td><td class="number"><b>{self.value}</b></td>'
            f'<td class="number">{escape(self.bound)}</td><td class="number">{verdict}</td></tr>'
        )


def _stage_cards(run: RunFiles) -> str:
    cards = []
    for stage, label in STAGES.items():
        accuracy = run.summary.get(f"accuracy_{stage}")
        num = run.evals.get(stage, {}).get("by_kind", {}).get("choice", {}).get("num_questions")
        error = (
            f"<small>&plusmn; {100 * standard_error(accuracy, num):.1f}</small>" if accuracy is not None and num else ""
        )
        shown = "not measured" if accuracy is None else f"{100 * accuracy:.1f}%"
        cards.append(
            f'<div class="stage" style="--tone:var(--{stage})"><b>{shown}{error}</b><span>{label}</span></div>'
        )
    return f'<div class="stages">{"".join(cards)}</div>'


def checks(summary: Mapping[str, Any]) -> list[Check]:
    """What the quickstart promises, as measured in one run.

    Args:
        summary: the content of summary.json.
    """
    base, sft, rl = (summary.get(f"accuracy_{stage}") for stage in ("base", "sft", "rl"))
    controls = dict(summary.get("controls") or {})
    order = controls.pop("rl_order", None)
    peak = summary.get("peak_rss_bytes")
    return [
        Check("Accuracy after RL", rl, at_least=0.80),
        Check("Gain of RL over SFT", None if sft is None or rl is None else rl - sft, 0.15),
        Check("Gain of RL over what SFT began with", None if base is None or rl is None else rl - base),
        Check("Control: without the video", controls.pop("rl_without_video", None), at_most=0.35),
        Check(
            "Control: frames shuffled in time, order questions",
            controls.pop("rl_order_frames_shuffled", None),
            at_most=None if order is None else order - 0.2,
            why="" if order is None else f" = {order:.3f} - 0.2",
        ),
        Check("Control: SFT model, made to answer in its careful format", controls.pop("sft_forced_careful", None)),
        *(Check(f"Control: {name.replace('_', ' ')}", value) for name, value in controls.items()),
        Check(
            "Largest log-prob difference, engine to trainer", summary.get("logprob_diff_max"), at_most=1e-5, style=".1e"
        ),
        Check("Peak memory, GB", None if peak is None else peak / 1e9, at_most=4.0, style=".2f"),
        Check(
            "Wall time without installation, s", (summary.get("wall_s") or {}).get("total"), at_most=360, style=".0f"
        ),
    ]


def _checks(run: RunFiles) -> str:
    return (
        '<div class="scroll"><table class="checks"><thead><tr><th>What</th><th class="number">measured</th>'
        '<th class="number">bound</th><th class="number"></th></tr></thead>'
        f"<tbody>{''.join(check.row() for check in checks(run.summary))}</tbody></table></div>"
    )


def _facts(summary: Mapping[str, Any]) -> str:
    seconds, hits = summary.get("video_seconds_max"), summary.get("cache_hit_rate")
    facts = {
        "longest video": None if seconds is None else clock(seconds),
        "frames a video": _grouped(summary.get("frames_per_video")),
        "prompt tokens": _grouped(summary.get("prompt_tokens")),
        "RL steps": _grouped(summary.get("rl_steps")),
        "embeddings there beforehand": None if hits is None else f"{100 * hits:.0f}%",
        "seed": summary.get("seed"),
    }
    return _fact_list(facts)


def _fact_list(facts: Mapping[str, Any]) -> str:
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value is not None
    )
    return f'<dl class="facts">{shown}</dl>'


def standard_error(accuracy: float, num_questions: int) -> float:
    """sqrt(p (1 - p) / n), each question one trial: on the safe side when several answers to each were sampled."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / num_questions)


def plain(value: float | None, style: str) -> str:
    return "&ndash;" if value is None else format(value, style)


def _grouped(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
