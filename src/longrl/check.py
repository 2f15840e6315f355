"""`longrl check`: what a configuration will run, and whether what it needs is there. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import typer

from longrl.config import AnyConfig, QuickstartConfig, RlConfig, RunConfig, SftConfig, TrainConfig
from longrl.models import FAMILIES


def check_command(config: AnyConfig) -> None:
    """Prints a summary of the resolved configuration.

    Raises:
        ValueError: a file or name that the run needs does not exist; names all of them.
    """
    typer.echo(f"{config.kind} run into {config.run_dir}")
    if isinstance(config, QuickstartConfig):
        videos = config.videos
        typer.echo(
            f"  videos    {videos.train_videos} to train, {videos.test_videos} to test, {videos.seconds:g} s each, "
            f"{videos.width} x {videos.height} at {videos.fps:g} frames a second, in {videos.dir}"
        )
        problems = []
        for name, part in (("sft", config.sft), ("rl", config.rl)):
            typer.echo(f"{name} run into {part.run_dir}")
            problems += [f"{name}.{problem}" for problem in _report(part, made_by=config.run_dir)]
    else:
        problems = list(_report(config))
    if problems:
        raise ValueError(f"the run cannot start: {'; '.join(problems)}")
    typer.echo("ok: everything the run needs is there")


def _report(config: RunConfig, made_by: str | None = None) -> Iterator[str]:
    """Prints a summary of one run and yields what is missing.

    Args:
        config: of the run.
        made_by: the directory of a run around this one, which makes the data, and the models that lie in it.
    """
    made = made_by is not None and Path(config.model.path).is_relative_to(made_by)
    problem = None if made else _model_problem(config.model.path)
    _row("model", f"{config.model.path} ({config.model.dtype})", problem)
    if problem:
        yield f"model.path: {problem}"
    video = config.video
    _row("video", f"{video.fps:g} frames a second" if video.fps is not None else f"{video.num_frames} frames")
    for name, path, needed in (
        ("train", config.data.train, isinstance(config, TrainConfig)),
        ("eval", config.data.eval, not isinstance(config, TrainConfig)),
    ):
        if path is None and (made_by or not needed):
            continue
        problem = "not set, expected a JSONL file" if path is None else _file_problem(path)
        _row(f"data.{name}", path or "", problem)
        if problem:
            yield f"data.{name}: {problem}"
    if isinstance(config, SftConfig):
        _row("steps", f"{config.steps} of {config.prompts_per_step} examples")
    elif isinstance(config, RlConfig):
        rollouts = f"{config.prompts_per_step} prompts x {config.rollout.group_size} rollouts"
        _row("steps", f"{config.steps} of {rollouts}, at most {config.rollout.max_new_tokens} tokens each")
        _row("algo", f"{config.algo.advantage}, {config.algo.loss} loss, KL {config.algo.kl}")


def _model_problem(path: str) -> str | None:
    if not path.startswith("tiny:"):
        return (
            None if (Path(path) / "config.json").is_file() else f"{path} is not a Hugging Face folder (no config.json)"
        )
    family = path.removeprefix("tiny:")
    if family in FAMILIES:
        return None
    nearest = difflib.get_close_matches(family, FAMILIES, n=1)
    return f"no model family {family!r}; " + (
        f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(FAMILIES)}"
    )


def _file_problem(path: str) -> str | None:
    return None if Path(path).is_file() else f"{path} does not exist"


def _row(name: str, value: str, problem: str | None = None) -> None:
    typer.echo(f"  {name:<11}{value}" + (f"  << {problem}" if problem else ""))
