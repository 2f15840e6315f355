"""`longrl generate`: ask a model about a video, an hour of it or a span."""

from __future__ import annotations

import json
from typing import Any

import typer

from longrl.config import ModelConfig, RolloutConfig
from longrl.models import load_family
from longrl.policy import Policy
from longrl.rewards.format import parse_answer, parse_thought
from longrl.rollout.native import NativeEngine
from longrl.types import Clip, Example, Message
from longrl.video.commands import parse_time
from longrl.video.decode import count_frames
from longrl.video.encode import embed


def generate_command(
    model: str,
    video: str | None,
    prompt: str,
    fps: float | None,
    num_frames: int | None,
    start: str | None,
    end: str | None,
    sampling: dict[str, Any],
    seed: int,
    as_json: bool,
) -> None:
    """Prints sampled responses; with as_json one object with text, thought and answer of each.

    Args:
        sampling: fields of RolloutConfig; group_size is the number of responses.
    """
    import torch

    if not prompt.strip():
        raise ValueError("the prompt is empty; write the question")
    if video is None and (fps, num_frames, start, end) != (None,) * 4:
        raise ValueError("--fps, --num-frames, --start and --end say how to look at a video; give --video too")
    config = RolloutConfig(**sampling)
    clips = () if video is None else (_clip(video, fps, num_frames, start, end),)
    for clip in clips:
        count_frames(clip)  # a video that cannot be used is known before a large model is read
    policy = Policy(load_family(ModelConfig(path=model), seed))
    example = Example(id="prompt", messages=(Message(role="user", content=(*clips, prompt)),), answer=None, kind="open")
    media = tuple(embed(clip, policy.family, None) for clip in clips)
    with torch.no_grad():
        ((groups, _),) = NativeEngine(policy, config).rollout([example], [policy.family.prompt(example, media)], [seed])
    rollouts = groups[0].rollouts
    if as_json:
        responses = [
            {"text": one.text, "thought": parse_thought(one.text), "answer": parse_answer(one.text)} for one in rollouts
        ]
        typer.echo(json.dumps({"prompt_tokens": len(groups[0].prompt), "responses": responses}))
    else:
        for one in rollouts:
            typer.echo(one.text)


def _clip(video: str, fps: float | None, num_frames: int | None, start: str | None, end: str | None) -> Clip:
    if fps is None and num_frames is None:
        fps = 1.0
    return Clip(
        path=video,
        start_s=0.0 if start is None else parse_time(start, "--start"),
        end_s=None if end is None else parse_time(end, "--end"),
        fps=fps,
        num_frames=num_frames,
    )
