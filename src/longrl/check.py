"""`longrl check`: what a configuration will run, and whether what it needs is there. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from longrl.config import (
    AnyConfig,
    DataRunConfig,
    LoopConfig,
    ModelConfig,
    ParallelConfig,
    QuickstartConfig,
    RlConfig,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)
from longrl.models import FAMILIES, base_path, tiny_family
from longrl.parallel.layout import require_heads, require_world
from longrl.runtime import rank_and_size


def check_command(config: AnyConfig) -> None:
    """Prints a summary of the resolved configuration.

    Raises:
        ValueError: a file or name that the run needs does not exist; names all of them.
    """
    if isinstance(config, WarmStartConfig):
        problems = list(_report_warm_start(config))
    else:
        typer.echo(f"{config.kind} run into {config.run_dir}")
        problems = list(_report_model(config.model, isinstance(config, TrainConfig | QuickstartConfig)))
        video = config.video
        _row("video", f"{video.fps:g} frames a second" if video.fps is not None else f"{video.num_frames} frames")
        if isinstance(config, QuickstartConfig):
            _report_quickstart(config)
        else:
            problems += _report_run(config)
    if problems:
        raise ValueError(f"the run cannot start: {'; '.join(problems)}")
    typer.echo("ok: the configuration is valid, and the model and files that it names exist")


def require_model(config: ModelConfig, parallel: ParallelConfig | None = None, *, trained: bool = False) -> None:
    """Looks whether there is a model, before a run directory is made for it.

    Raises:
        ValueError: there is none, its heads cannot be dealt to so many processes, or it cannot be trained as it is.
    """
    if problem := _model_problem(config.path, trained):
        raise ValueError(f"model.path: {problem}")
    if parallel and (problem := _heads_problem(config.path, parallel.sp)):
        raise ValueError(problem)


def _report_warm_start(config: WarmStartConfig) -> Iterator[str]:
    typer.echo(f"{config.kind} into {config.out}")
    problem = _model_problem(config.model)
    _row("model", config.model, problem)
    _row("steps", f"{config.read_steps} to read, {config.look_steps} to look, {config.watch_steps} to watch")
    if problem:
        yield f"model: {problem}"


def _report_model(config: ModelConfig, trained: bool) -> Iterator[str]:
    problem = _model_problem(config.path, trained)
    _row("model", f"{config.path} ({config.dtype})", problem)
    if problem:
        yield f"model.path: {problem}"
    if lora := config.lora:
        where = ", ".join(lora.targets) if lora.targets else "all linear layers of the decoder"
        _row("lora", f"rank {lora.rank}, alpha {lora.alpha:g}, {where}")


def _report_quickstart(config: QuickstartConfig) -> None:
    videos = config.videos
    _row(
        "videos",
        f"{videos.train_videos} to train, {videos.test_videos} to test, {videos.seconds:g} s each, "
        f"{videos.width} x {videos.height} at {videos.fps:g} frames a second, in {videos.dir}",
    )
    _row("sft", _steps(config.sft, None))
    _row("rl", _steps(config.rl, config.rollout))


def _report_run(config: DataRunConfig) -> Iterator[str]:
    for name, path, needed in (
        ("train", config.data.train, isinstance(config, TrainConfig)),
        ("eval", config.data.eval, not isinstance(config, TrainConfig) or _evaluates(config)),
    ):
        if path is None and not needed:
            continue
        problem = "not set, expected a JSONL file" if path is None else _file_problem(path)
        _row(f"data.{name}", path or "", problem)
        if problem:
            yield f"data.{name}: {problem}"
    yield from _report_parallel(config)
    if isinstance(config, TrainConfig):
        _row("steps", _steps(config, config.rollout if isinstance(config, RlConfig) else None))
    if isinstance(config, RlConfig):
        _row("algo", f"{config.algo.advantage}, {config.algo.loss} loss, KL {config.algo.kl}")


def _report_parallel(config: DataRunConfig) -> Iterator[str]:
    sp, (_, size) = config.parallel.sp, rank_and_size()
    if sp == size == 1:
        return
    text = f"{sp} processes share a prompt" + (" and the weights" if config.parallel.shard else "")
    if size == 1:  # checked before the run is started
        text += f"; start it with torchrun --nproc-per-node {sp}, or a multiple"
    else:
        text += f", {size} in all"
    problems = [_heads_problem(config.model.path, sp), _refusal(require_world, size, sp) if size > 1 else None]
    problems = [problem for problem in problems if problem]
    _row("parallel", text, "; ".join(problems) or None)
    yield from problems


def _heads_problem(path: str, sp: int) -> str | None:
    """None also where the heads are not known before the model is made."""
    try:
        config = json.loads((Path(base_path(path)) / "config.json").read_text(encoding="utf-8"))
        kv_heads = int(config.get("text_config", config)["num_key_value_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    problem = _refusal(require_heads, kv_heads, sp)
    return problem and f"parallel.sp: {problem}"


def _refusal(require: Callable[[int, int], None], first: int, second: int) -> str | None:
    try:
        require(first, second)
    except ValueError as error:
        return str(error)
    return None


def _evaluates(config: TrainConfig) -> bool:
    return isinstance(config, RlConfig) and config.eval_every_steps > 0


def _steps(loop: LoopConfig, rollout: RolloutConfig | None) -> str:
    if rollout is None:
        return f"{loop.steps}, each of {loop.prompts_per_step} examples"
    return (
        f"{loop.steps}, each of {loop.prompts_per_step} prompts x {rollout.group_size} rollouts, "
        f"at most {rollout.max_new_tokens} tokens each"
    )


def _model_problem(path: str, trained: bool = False) -> str | None:
    """trained: the run begins with it, rather than asks it."""
    try:
        base = base_path(path)
        if base != path and trained:
            return f"{path} holds adapters of {base}; merge them first: longrl export RUN --out DIR, then give DIR"
        family = tiny_family(base)[0] if base.startswith("tiny:") else None
    except ValueError as error:
        return str(error)
    if family is None:
        there = (Path(base) / "config.json").is_file()
        named = f"{base}, which the adapters in {path} belong to," if base != path else path
        return None if there else f"{named} is not a Hugging Face folder (no config.json)"
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
