"""`longrl generate` and `longrl score`: ask a model about videos, images and sound; score a given response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from longrl import Audio, Image, Video
from longrl.types import Clip
from longrl.video.commands import parse_time


def generate_command(
    model: str,
    clips: Sequence[Clip],
    prompt: str,
    n: int,
    think: bool,
    sampling: dict[str, Any],
    seed: int,
    stream: bool,
    as_json: bool,
    about: dict[str, Any],
) -> None:
    """Prints sampled responses; with as_json one object with text, thought, answer and finish_reason of each, with
    stream a single response while it is written.

    Args:
        sampling: fields of RolloutConfig.
        about: for `longrl.load`.
    """
    if stream and (as_json or n > 1):
        raise ValueError("--stream shows one response as it is written; leave out --json and --n")
    if (top_p := sampling.get("top_p", 1.0)) <= 0:
        raise ValueError(f"--top-p is {top_p:g}, expected more than 0, at most 1")
    loaded = _load(model, clips, prompt, about)
    said = (lambda _, text: typer.echo(text, nl=False)) if stream else None
    replies = loaded.generate_contents([*clips, prompt], n=n, think=think, seed=seed, on_text=said, **sampling)
    if as_json:
        shown = [asdict(one) for one in replies]
        for one in shown:
            del one["prompt_tokens"]  # the same of all
        typer.echo(json.dumps({"prompt_tokens": replies[0].prompt_tokens, "responses": shown}))
    elif stream:
        typer.echo()
    else:
        for one in replies:
            typer.echo(one.text)


def score_command(
    model: str, clips: Sequence[Clip], prompt: str, response: str, think: bool, as_json: bool, about: dict[str, Any]
) -> None:
    """Prints the log-prob of each token of a response, and their sum; with as_json one object."""
    loaded = _load(model, clips, prompt, about)
    score = loaded.score([*clips, prompt], response, think=think)
    if as_json:
        typer.echo(json.dumps(asdict(score) | {"logprob": sum(score.logprobs)}))
        return
    for token, logprob in zip(score.token_ids, score.logprobs, strict=True):
        typer.echo(f"{logprob:10.4f}  {loaded.policy.family.tokenizer.decode([token])!r}")
    typer.echo(f"{sum(score.logprobs):10.4f}  in all")


def clips_of(
    videos: Sequence[str],
    images: Sequence[str],
    sounds: Sequence[str],
    fps: float | None,
    num_frames: int | None,
    max_pixels: int | None,
    start: str | None,
    end: str | None,
    with_audio: bool,
) -> list[Clip]:
    """The media of a command, in the order video, image, sound.

    Args:
        max_pixels: of a video's frame, and of an image.
        with_audio: each video with its own sound.

    Raises:
        ValueError: options that belong to a video or sound without one, or that contradict each other.
    """
    if not videos and (fps, num_frames) != (None, None):
        raise ValueError("--fps and --num-frames say how to look at a video; give --video too")
    if not videos and not images and max_pixels is not None:
        raise ValueError("--max-pixels says how large pictures are shown; give --video or --image too")
    if not videos and with_audio:
        raise ValueError("--with-audio means a video's own sound; give --video too, or --audio for sound by itself")
    if not videos and not sounds and (start, end) != (None, None):
        raise ValueError("--start and --end name a span; give --video or --audio too")
    span: dict[str, Any] = {
        "start_s": 0.0 if start is None else parse_time(start, "--start"),
        "end_s": None if end is None else parse_time(end, "--end"),
    }
    seen: list[Clip] = []
    for path in videos:
        seen.append(Video(path, fps=fps, num_frames=num_frames, max_pixels=max_pixels, **span))
        if with_audio:
            seen.append(Audio(path, **span, with_video=True))
    return [
        *seen,
        *(Image(path, max_pixels=max_pixels) for path in images),
        *(Audio(path, **span) for path in sounds),
    ]


def _load(model: str, clips: Sequence[Clip], prompt: str, about: dict[str, Any]):
    from longrl import load
    from longrl.check import require_model
    from longrl.config import ModelConfig
    from longrl.video.audio import count_samples
    from longrl.video.decode import count_frames
    from longrl.video.image import image_size

    if not prompt.strip():
        raise ValueError("the prompt is empty; write the question")
    for clip in clips:  # a file that cannot be used is known before a large model is read
        if clip.kind == "video":
            count_frames(clip)
        elif clip.kind == "image":
            image_size(clip.path)
        else:
            count_samples(clip.path, clip.start_s, clip.end_s)
    require_model(ModelConfig(path=model))
    return load(model, **about)
