"""Sample responses: what the model saw, thought and answered, after SFT and after RL."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from longrl.report.progress import clock
from longrl.report.run_files import STAGES, RunFiles
from longrl.rewards.answer import parse_letter
from longrl.rewards.format import parse_answer, parse_thought
from longrl.types import Clip

logger = logging.getLogger(__name__)

SHOWN_STAGES = ("sft", "rl")
MOST_EXAMPLES = 6
NUM_FRAMES = 8
FRAME_WIDTH_PX = 200

_OPTION = re.compile(r"[A-Z]\. ")


def samples_html(run: RunFiles) -> str:
    """The section: a few test questions, each with a strip of frames and the responses of both stages."""
    head = "<h2>Sample responses</h2>"
    by_stage = {stage: _examples(run.evals[stage]) for stage in SHOWN_STAGES if stage in run.evals}
    if not any(by_stage.values()):
        return head + run.missing(*(f"eval/{stage}.json" for stage in SHOWN_STAGES))
    chosen = _choose(list(by_stage[[stage for stage in by_stage if by_stage[stage]][-1]].values()))
    note = (
        '<p class="note">Chosen by place, not by outcome: the first question of each category in the test set, then '
        "the first that the last stage mostly gets wrong; of different videos where there are any. Of several sampled "
        "responses the first is shown; the truth is outlined.</p>"
    )
    absent = [f"eval/{stage}.json" for stage in SHOWN_STAGES if stage not in run.evals]
    cards = "".join(_card(run.run_dir, example, by_stage) for example in chosen)
    return f"{head}{note}{run.missing(*absent) if absent else ''}{cards}"


def _examples(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {example["id"]: example for example in content.get("examples", ())}


def _choose(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chosen: list[Mapping[str, Any]] = []
    for category in list(dict.fromkeys(example["category"] for example in examples))[: MOST_EXAMPLES - 1]:
        seen = {example["video"] for example in chosen}
        of_category = [example for example in examples if example["category"] == category]
        chosen.append(next((example for example in of_category if example["video"] not in seen), of_category[0]))
    failed = (example for example in examples if example not in chosen and _share_right(example) < 0.5)
    return chosen + [example for example in [next(failed, None)] if example is not None]


def _share_right(example: Mapping[str, Any]) -> float:
    responses = example["responses"]
    return sum(response["correct"] for response in responses) / max(len(responses), 1)


def _card(run_dir: Path, example: Mapping[str, Any], by_stage: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    answers = "".join(
        _stage(stage, examples[example["id"]]) for stage, examples in by_stage.items() if example["id"] in examples
    )
    about = " · ".join(escape(str(part)) for part in (example["category"], example["kind"], example["id"]))
    return (
        f'<article class="sample"><div class="small">{about}</div>'
        f"{_question(example['question'], str(example['answer']))}{_strip(run_dir, example['video'])}"
        f'<div class="answers">{answers}</div></article>'
    )


def _question(text: str, answer: str) -> str:
    """The question, its options beneath ("A. red circle" lines) or else the truth in words."""
    lines = text.splitlines()
    options = [line for line in lines if _OPTION.match(line)]
    asked = "\n".join(line for line in lines if line not in options)
    marked = "".join(
        f"<li{' class=truth' if option[0] == parse_letter(answer) else ''}>{escape(option)}</li>" for option in options
    )
    beneath = marked or f'<li class="truth">{escape(answer)}</li>'
    return f'<div class="question">{escape(asked)}</div><ul class="options">{beneath}</ul>'


def _stage(stage: str, example: Mapping[str, Any]) -> str:
    responses = example["responses"]
    if not responses:
        said = '<p class="note">No response was recorded.</p>'
        return f'<div style="--tone:var(--{stage})"><h3>{STAGES[stage]}</h3>{said}</div>'
    marks = "".join(
        f'<i class="{"right" if response["correct"] else "wrong"}">{"●" if response["correct"] else "○"}</i>'
        for response in responses
    )
    num_right = sum(bool(response["correct"]) for response in responses)
    others = "".join(map(_response, responses[1:]))
    more = f"<details><summary>{len(responses) - 1} more responses</summary>{others}</details>" if others else ""
    return (
        f'<div style="--tone:var(--{stage})"><header><h3>{STAGES[stage]}</h3>'
        f'<span class="dots">{marks} {num_right} of {len(responses)} right</span></header>'
        f"{_response(responses[0])}{more}</div>"
    )


def _response(response: Mapping[str, Any]) -> str:
    """Thought, answer and reward; a response that is not in the format is shown as it is."""
    thought, answer = parse_thought(response["text"]), parse_answer(response["text"])
    reward = "not scored" if response["reward"] is None else f"reward {response['reward']:.2f}"
    tone = "right" if response["correct"] else "wrong"
    if thought is None or answer is None:
        said = f'<div class="raw">{escape(response["text"]) or "(empty)"}</div>'
        verdict = f'<span class="answer {tone}">not in the format</span>'
    else:
        said = f'<div class="thought">{escape(thought)}</div>'
        verdict = f'<span class="answer {tone}">{escape(answer) or "(empty)"}</span>'
    return f'<div class="response">{said}<div class="verdict">{verdict}<span class="small">{reward}</span></div></div>'


def _strip(run_dir: Path, video: str | None) -> str:
    """Frames spread over the whole video, with their times; a line of text if the video cannot be read."""
    if video is None:
        return '<p class="missing">A question without a video.</p>'
    path = Path(video) if Path(video).exists() else run_dir / video
    try:
        frames = "".join(
            f'<div><img alt="frame at {clock(time_s)}" src="{uri}"><span>{clock(time_s)}</span></div>'
            for uri, time_s in _frames(path)
        )
    except (OSError, ValueError) as error:  # the page is worth having without this strip
        logger.warning("report: no frames of %s: %s", video, error)
        return f'<p class="missing">No frames: {escape(str(error))}</p>'
    return f'<div class="strip">{frames}</div>'


def _frames(path: Path) -> Iterator[tuple[str, float]]:
    from PIL import Image

    from longrl.video.decode import read_frames
    from longrl.video.probe import probe

    def size(height: int, width: int) -> tuple[int, int]:
        scale = min(FRAME_WIDTH_PX / width, 1.0)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    # The middles of equal parts: the very first and last frame of a video seldom show much.
    margin_s = probe(str(path)).duration_s / (2 * NUM_FRAMES)
    end_s = margin_s * (2 * NUM_FRAMES - 1)
    for frames in read_frames(Clip(path=str(path), start_s=margin_s, end_s=end_s, num_frames=NUM_FRAMES), size=size):
        for pixels, time_s in zip(frames.pixels, frames.timestamps_s, strict=True):
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, format="JPEG", quality=82)
            yield f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", float(time_s)
