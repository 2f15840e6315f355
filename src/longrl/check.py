"""`longrl check`: what a configuration will run, and whether what it needs is there. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from longrl.algo.advantages import ADVANTAGES
from longrl.algo_config import LOSS_NAMES
from longrl.check_flow import flow_rows
from longrl.config import (
    AlgoConfig,
    AnswerConfig,
    AnyConfig,
    DataRunConfig,
    EvalRunConfig,
    JudgedConfig,
    LoopConfig,
    ModelConfig,
    ParallelConfig,
    QuickstartConfig,
    RlConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
    WarmStartConfig,
)
from longrl.data.examples import load_examples
from longrl.data.rows import missing
from longrl.evals.controls import require_control
from longrl.flow_config import FlowConfig
from longrl.judge_config import key_problem
from longrl.models import FAMILIES, base_path, require_folder, tiny_family
from longrl.parallel.layout import require_heads, require_world
from longrl.plan.devices import find_device
from longrl.plan.plan import make_plan
from longrl.plan.shapes import ModelShape, known_source, require_clips, shape_of
from longrl.plan.text import plan_lines, refusal
from longrl.registry import require_name
from longrl.rewards.compose import REWARDS, bound, require_truth
from longrl.rewards.maths import require_math_verify
from longrl.rollout.vllm_rules import choose_engine, with_engine
from longrl.runtime import CHECKPOINTS, rank_and_size
from longrl.scoring_config import REWARD_NAMES, ScoringConfig, require_used, require_weights, rewards_of, with_answer

BF16_DIFF = 0.5
"""For algo.max_logprob_diff in bfloat16: above what rounding does (docs/numerics.md), below what a fault does."""


def check_command(config: AnyConfig | FlowConfig, device: str | None = None, processes: int | None = None) -> None:
    """Prints a summary of the resolved configuration, and the plan of a run on given data.

    Args:
        device: that the run is planned for: a name in plan/devices.py; None: this machine's CPU.
        processes: that it is planned for; None: those that torchrun has started, or as many as share a prompt.

    Raises:
        ValueError: there is no such device, or no plan of this kind; a file or name that the run needs does not exist,
            rows that it would refuse, numbers that do not go together, or a plan that does not fit the device, all of
            which are named.
    """
    find_device(device or "CPU")
    if not isinstance(config, DataRunConfig):
        for option, value in (("--device", device), ("--processes", processes)):
            if value is not None:
                raise ValueError(f"{option} {value}: runs of kind {config.kind} are not planned; leave {option} out")
    if isinstance(config, WarmStartConfig):
        problems = list(_report_warm_start(config))
    elif isinstance(config, FlowConfig):
        typer.echo(f"{config.kind} run into {config.run_dir}")
        problems = []
        for name, value, problem in flow_rows(config):
            _row(name, value, problem)
            problems += [f"{name}: {problem}"] if problem else []
    else:
        typer.echo(f"{config.kind} run into {config.run_dir}")
        problems = list(_report_model(config.model, isinstance(config, TrainConfig | QuickstartConfig)))
        problems += _report_video(config)
        if isinstance(config, QuickstartConfig):
            problems += _report_quickstart(config)
            problems += _report_rewards(config)
        else:
            problems += _report_run(config, processes)
            problems += _report_plan(config, device or "CPU", processes)
    if problems:
        raise ValueError(f"the run cannot start: {'; '.join(problems)}")
    source = None if isinstance(config, WarmStartConfig | FlowConfig) else known_source(config.model.path)
    if source is not None:
        typer.echo(f"ok: the configuration is valid and fits; the model has yet to be downloaded from {source}")
    else:
        typer.echo("ok: the configuration is valid, and the model and files that it names exist")


def require_model(config: ModelConfig, parallel: ParallelConfig | None = None, *, trained: bool = False) -> None:
    """Looks whether there is a model, before a run directory is made for it.

    Raises:
        ValueError: there is none, its heads cannot be dealt to so many processes, or it cannot be trained as it is.
    """
    if problem := _model_problem(config.path, trained):
        raise ValueError(f"model.path: {problem}")
    if parallel and (problem := _heads_problem(config.path, parallel)):
        raise ValueError(problem)


def require_files(config: DataRunConfig) -> None:
    """
    Raises:
        ValueError: a file that the run reads is not there.
    """
    if problems := [f"data.{name}: {problem}" for name, _, problem in _files(config) if problem]:
        raise ValueError("; ".join(problems))


def _report_warm_start(config: WarmStartConfig) -> Iterator[str]:
    typer.echo(f"{config.kind} into {config.out}")
    problem = _model_problem(config.model)
    _row("model", config.model, problem)
    _row("steps", f"{config.read_steps} to read, {config.look_steps} to look, {config.watch_steps} to watch")
    if problem:
        yield f"model: {problem}"


def _report_model(config: ModelConfig, trained: bool) -> Iterator[str]:
    problem = None if known_source(config.path) else _model_problem(config.path, trained)
    _row("model", f"{config.path} ({config.dtype})", problem)
    if problem:
        yield f"model.path: {problem}"
    if lora := config.lora:
        where = ", ".join(lora.targets) if lora.targets else "all linear layers of the decoder"
        _row("lora", f"rank {lora.rank}, alpha {lora.alpha:g}, {where}")


def _report_video(config: DataRunConfig | QuickstartConfig) -> Iterator[str]:
    # others may have no videos at all: see _require_rows
    video, shape = config.video, _shape(config.model.path) if isinstance(config, QuickstartConfig) else None
    problem = _refusal(shape.vision.require_pixels, video.max_pixels) if shape and shape.vision else None
    _row("video", f"{video.fps:g} frames a second" if video.fps is not None else f"{video.num_frames} frames", problem)
    if problem:
        yield f"video: {problem}"


def _report_quickstart(config: QuickstartConfig) -> Iterator[str]:
    videos = config.videos
    _row(
        "videos",
        f"{videos.train_videos} to train, {videos.test_videos} to test, {videos.seconds:g} s each, "
        f"{videos.width} x {videos.height} at {videos.fps:g} frames a second, in {videos.dir}",
    )
    _row("sft", _steps(config.sft, None))
    _row("rl", _steps(config.rl, config.rollout))
    yield from _report_algo(config.rl.algo, "rl.algo")


def _report_run(config: DataRunConfig, processes: int | None) -> Iterator[str]:
    for name, path, problem in _files(config):
        if problem is None and path and _reads(config, name) and Path(path).is_file():
            problem = _refusal(_require_rows, config, name, path)
        why = "eval_every_steps is 0" if isinstance(config, RlConfig) else "its kind has no use for it"
        unread = "" if _reads(config, name) else f" (this run does not read it: {why})"
        _row(f"data.{name}", f"{path or ''}{unread}", problem)
        if problem:
            yield f"data.{name}: {problem}"
    if isinstance(config, TrainConfig):
        _row("steps", _steps(config, config.rollout if isinstance(config, RlConfig) else None))
        every = config.checkpoint.every_steps
        never = "only after the last step: a run that ends before starts over; set checkpoint.every_steps"
        _row("saved", f"every {every} steps, the newest {config.checkpoint.keep} stay" if every else never)
    if isinstance(config, JudgedConfig):
        yield from _report_rewards(config)
        yield from _report_judge(config, _size(config, processes))
    if isinstance(config, RlConfig):
        yield from _report_algo(config.algo, "algo")
        if "bfloat16" in (config.model.dtype, config.model.compute_dtype) and config.algo.max_logprob_diff < BF16_DIFF:
            stops = (
                f"a run stops where they differ by more than algo.max_logprob_diff, {config.algo.max_logprob_diff:g}"
            )
            _row(
                "", f"in bfloat16 engine and trainer log-probs round differently, and {stops}: set it to {BF16_DIFF:g}"
            )
        yield from _report_engine(config, _size(config, processes))


def _report_algo(algo: AlgoConfig, key: str) -> Iterator[str]:
    """Nothing is imported: a run does that before it loads anything."""
    found = (
        (f"{key}.advantage", _refusal(require_name, algo.advantage, ADVANTAGES, "advantage")),
        (f"{key}.loss", _refusal(require_name, algo.loss, LOSS_NAMES, "loss")),
    )
    problems = [f"{name}: {problem}" for name, problem in found if problem]
    _row("algo", f"{algo.advantage}, {algo.loss} loss, KL {algo.kl}", "; ".join(problems) or None)
    yield from problems


def _report_engine(config: RlConfig, size: int) -> Iterator[str]:
    """Servers are not asked: a run does that before its first step."""
    if config.rollout.server:
        missing = None if find_spec("httpx2") else "the package httpx2 is not installed: pip install 'longrl[server]'"
        _row("engine", f"of servers: {', '.join(config.rollout.server.urls)}", missing)
        if missing:
            yield f"rollout.server: {missing}"
        return
    try:
        _row("engine", ": ".join(choose_engine(config, size)))
    except (ValueError, RuntimeError) as error:
        _row("engine", config.rollout.engine, str(error))
        yield str(error)


def _files(config: DataRunConfig) -> Iterator[tuple[str, str | None, str | None]]:
    """Which, where, and what is wrong with it."""
    for name, path in (("train", config.data.train), ("eval", config.data.eval)):
        if path is not None:
            yield name, path, missing(path)
        elif _reads(config, name):
            yield name, None, "not set, expected a file of rows"


def _reads(config: DataRunConfig, name: str) -> bool:
    """Whether the run reads `data.train`, or `data.eval`."""
    if name == "train":
        return isinstance(config, TrainConfig)
    return not isinstance(config, TrainConfig) or (isinstance(config, RlConfig) and config.eval_every_steps > 0)


def _require_rows(config: DataRunConfig, name: str, path: str) -> None:
    """As the run, when it reads them; media in them are written to the cache, as by the run."""
    examples = load_examples(
        path,
        config.data,
        config.video,
        cache=config.cache,
        keep_skipped=name == "eval",
        demonstrations=isinstance(config, SftConfig),
    )
    if isinstance(config, JudgedConfig):
        weights = with_answer(config.rewards) if name == "eval" else config.rewards
        said = {*config.rewards, *config.scoring.by_kind.values()}
        for example in examples:
            for reward in rewards_of(example.kind, weights, config.scoring):
                if reward in REWARDS and reward not in said:
                    _require_reward(reward, config.scoring)
                    said.add(reward)
                require_truth(reward, example)
    if isinstance(config, EvalRunConfig) and config.control:
        require_control(config.control, examples)
    if shape := _shape(config.model.path):
        require_clips(shape, config.model.path, examples)


def _report_rewards(config: AnswerConfig) -> Iterator[str]:
    """One's own are not imported: a run does that before it loads anything."""
    named = [(name, f"weight {weight:g}") for name, weight in config.rewards.items()]
    named += [(name, f"of kind {kind}") for kind, name in config.scoring.by_kind.items()]
    problems = {name: _refusal(_require_reward, name, config.scoring) for name, _ in named}
    for name, use in named:
        _row("reward", f"{name}, {use}", problems[name])
    yield from filter(None, problems.values())
    evaluates = isinstance(config, DataRunConfig) and _reads(config, "eval")
    used = (with_answer(config.rewards) if evaluates else config.rewards, config.scoring)
    for require, given in ((require_weights, (config.rewards,)), (require_used, used)):
        if problem := _refusal(require, *given):
            _row("reward", "", problem)
            yield problem


def _require_reward(name: str, scoring: ScoringConfig) -> None:
    require_name(name, REWARD_NAMES, "reward")
    if name in REWARDS:
        bound(name, scoring.options.get(name, {}), REWARDS)
    if name == "math":
        require_math_verify()


def _report_judge(config: JudgedConfig, size: int) -> Iterator[str]:
    """Nothing is asked: a run does that before it loads anything."""
    if config.judge is None:
        return
    for name, model in config.judge.models.items():
        problem = key_problem(model.key_env)
        _row("judge", f"{name}: {model.model} at {model.base_url}", problem)
        if problem:
            yield f"judge.models.{name}: {problem}"
    judging = size if config.parallel.sp == "auto" else max(1, size // config.parallel.sp)
    yield from filter(None, [_refusal(config.judge.limits.divided, judging, "judge.limits")])
    if find_spec("openai") is None:
        yield "judge: the package openai is not installed: pip install 'longrl[judge]'"


def _report_plan(config: DataRunConfig, device: str, processes: int | None) -> Iterator[str]:
    """Prints it in full, or yields what does not go together."""
    sp, size = 1 if config.parallel.sp == "auto" else config.parallel.sp, _size(config, processes)
    if config.parallel.sp == "auto" and processes is None and size == 1:
        size = _enough(config, device)
    problems = [_heads_problem(config.model.path, config.parallel), _refusal(require_world, size, sp)]
    problems = [problem for problem in problems if problem]
    if sp > 1 or size > 1:
        _row("parallel", f"start it with torchrun --nproc-per-node {size}", "; ".join(problems) or None)
    yield from problems
    if problems or shape_of(config.model.path) is None:
        return
    if isinstance(config, RlConfig) and config.rollout.engine == "auto":
        config = with_engine(config, choose_engine(config, size)[0])
    plan = make_plan(config, device, size)
    for line in plan_lines(plan):
        typer.echo(f"  {line}")
    if not plan.fits:
        yield refusal(plan)


def _size(config: DataRunConfig, processes: int | None) -> int:
    """Processes: as asked, those that torchrun has started, or as many as share a prompt."""
    sp, (_, size) = config.parallel.sp, rank_and_size()
    return processes or (size if size > 1 or sp == "auto" else sp)


def _enough(config: DataRunConfig, device: str) -> int:
    """Processes, of which `sp: auto` can make a layout for the longest prompt; 1 if eight are too few."""
    if shape_of(config.model.path) is None:
        return 1
    return next((size for size in (1, 2, 4, 8) if make_plan(config, device, size).fits), 1)


def _heads_problem(path: str, parallel: ParallelConfig) -> str | None:
    if parallel.sp == "auto":  # chooses what goes
        return None
    shape = _shape(path)
    problem = shape and _refusal(require_heads, shape.kv_heads, parallel.sp, parallel.ring)
    return f"parallel.sp: {problem}" if problem else None


def _shape(path: str) -> ModelShape | None:
    """None also where there is no model, or none whose sizes can be read, which is another problem."""
    try:
        return shape_of(path)
    except ValueError:
        return None


def _refusal(require: Callable[..., object], *args: Any) -> str | None:
    try:
        require(*args)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


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
            merge = "longrl export RUN --merge-lora --out DIR"
            return f"{path} holds adapters of {base}; merge them first: {merge}, then give DIR"
        family = tiny_family(base)[0] if base.startswith("tiny:") else None
    except ValueError as error:
        return str(error)
    if family is None:
        there = (Path(base) / "config.json").is_file()
        named = f"{base}, which the adapters in {path} belong to," if base != path else path
        source = known_source(base)
        mend = f"; download {source}" if source else _model_inside(base)
        if not there:
            return f"{named} is not a Hugging Face folder (no config.json){mend}"
        return _refusal(require_folder, Path(base))
    if family in FAMILIES:
        return None
    nearest = difflib.get_close_matches(family, FAMILIES, n=1)
    return f"no model family {family!r}; " + (
        f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(FAMILIES)}"
    )


def _model_inside(path: str) -> str:
    """Names the model in a checkpoint, or the last of a run or of each run in a folder."""
    for pattern in ("model", f"{CHECKPOINTS}/step_*/model", f"*/{CHECKPOINTS}/step_*/model"):
        if found := {folder.parents[1]: str(folder) for folder in sorted(Path(path).glob(pattern))}:
            return f"; did you mean {' or '.join(found.values())}?"
    return ""


def _row(name: str, value: str, problem: str | None = None) -> None:
    typer.echo(f"  {name:<11}{value}" + (f"  << {problem}" if problem else ""))
