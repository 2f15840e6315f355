"""The command line: one line per command.

What a command does is imported once its configuration is known to be good: help and mistakes are answered at once.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from longrl.cli_files import AsJson, Config, End, Fps, MaxPixels, NumFrames, Start, cache_app, data_app, video_app
from longrl.config_files import load_arguments
from longrl.errors import run_guarded
from longrl.runtime import set_up_logging
from longrl.stopping import listen

# Before torch is imported. Waiting threads spin for some microseconds, then sleep. Those that spin on, as they do by
# default, take a core from whoever has work (beside another program a run took 150 times as long); those that sleep at
# once make decoding, which waits often, half as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

app = typer.Typer(
    help="Reinforcement learning of vision-language models on long videos. Any command takes --traceback (or "
    "LONGRL_TRACEBACK=1 in the environment) to show where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""typer has click inside, or beside it, by its release."""
bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
launch_app = typer.Typer(no_args_is_help=True, help="Start a run on several machines.")
app.add_typer(launch_app, name="launch")
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")
app.add_typer(video_app, name="video")


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("longrl"))
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print it.")] = False,
) -> None: ...


@app.command()
def quickstart(config: Config) -> None:
    """Make long videos, train on them, evaluate, report."""
    loaded = load_arguments(config, "quickstart")
    from longrl.quickstart import run_quickstart

    run_quickstart(loaded)


@app.command("warm-start")
def warm_start(config: Config) -> None:
    """Pre-train the tiny model that the quickstart starts from."""
    from longrl.warm_start import warm_start as train

    train(load_arguments(config, "warm_start"))


@app.command()
def sft(config: Config) -> None:
    """Supervised fine-tuning on demonstrated reasoning."""
    listen()
    loaded = load_arguments(config, "sft")
    from longrl.parallel.ranks import start_ranks
    from longrl.plan.plan import degree_rule
    from longrl.train_sft import train_sft

    with start_ranks(loaded.parallel, partial(degree_rule, loaded)) as ranks:
        _say_done(loaded.run_dir, train_sft(loaded, ranks), ranks.is_main)


@app.command()
def rl(config: Config) -> None:
    """Reinforcement learning."""
    listen()
    loaded = load_arguments(config, "rl")
    from longrl.parallel.ranks import start_ranks
    from longrl.plan.plan import degree_rule
    from longrl.train_rl import train_rl

    with start_ranks(loaded.parallel, partial(degree_rule, loaded)) as ranks:
        _say_done(loaded.run_dir, train_rl(loaded, ranks), ranks.is_main)


def _say_done(run_dir: str, model: Path, is_main: bool) -> None:
    if is_main:
        typer.echo(f"{run_dir}: done; the model is {model}, longrl report {run_dir} draws the metrics")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory of sft, rl, flow or quickstart.")]) -> None:
    """Draw a run's metrics into its report.html, at any time."""
    from longrl.report.html import report_command

    report_command(run)


@app.command("rollout-server")
def rollout_server(
    config: Config,
    host: Annotated[
        str, typer.Option(help="Where to listen; other machines reach 0.0.0.0, and need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8100,
) -> None:
    """Draw rollouts for runs that name this server in `rollout.server`."""
    loaded = load_arguments(config, "rl")
    from longrl.rollout.server import serve

    serve(loaded, host, port)


@app.command()
def flow(config: Config) -> None:
    """Reinforcement learning of image and video generators."""
    listen()
    loaded = load_arguments(config, "flow")
    from longrl.config import ParallelConfig
    from longrl.parallel.ranks import start_ranks
    from longrl.train_flow import train_flow

    with start_ranks(ParallelConfig(timeout_s=loaded.processes.timeout_s)) as ranks:
        _say_done(loaded.run_dir, train_flow(loaded, ranks), ranks.is_main)


@app.command("eval")
def evaluate(config: Config) -> None:
    """Accuracy of a model on held-out questions."""
    loaded = load_arguments(config, "eval")
    from longrl.evals.runner import run_eval
    from longrl.parallel.ranks import start_ranks
    from longrl.plan.plan import degree_rule

    with start_ranks(loaded.parallel, partial(degree_rule, loaded)) as ranks:
        run_eval(loaded, ranks)


@app.command("filter")
def filter_questions(
    config: Config,
    out: Annotated[Path, typer.Option(help="The JSONL file to write, in the folder of data.eval.")],
) -> None:
    """Keep the questions that a model gets right at times."""
    loaded = load_arguments(config, "eval")
    from longrl.evals.difficulty import filter_command
    from longrl.parallel.ranks import start_ranks
    from longrl.plan.plan import degree_rule

    with start_ranks(loaded.parallel, partial(degree_rule, loaded)) as ranks:
        filter_command(loaded, out, ranks)


@app.command()
def check(
    config: Config,
    device: Annotated[
        str | None, typer.Option(help="Plan for it: A100-80G, H100, H200, or CPU, this machine's.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Of the run; as many as share a prompt.")] = None,
) -> None:
    """Validate a configuration; plan memory and time of sft, rl and eval."""
    loaded = load_arguments(config)
    from longrl.check import check_command

    check_command(loaded, device, processes)


Model = Annotated[str, typer.Option(help="A Hugging Face folder, one of adapters, or tiny:FAMILY.")]
Question = Annotated[str, typer.Option("--prompt", help="The question.")]
Videos = Annotated[list[str] | None, typer.Option("--video", help="A video to ask about; may be repeated.")]
Images = Annotated[list[str] | None, typer.Option("--image", help="An image to ask about; may be repeated.")]
Sounds = Annotated[list[str] | None, typer.Option("--audio", help="A sound file to ask about; may be repeated.")]
WithAudio = Annotated[bool, typer.Option("--with-audio", help="Hear each video's own sound too.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Ask for a thought before the answer.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")]
CacheDir = Annotated[str, typer.Option("--cache", help="Where embeddings of media are kept.")]


@app.command()
def generate(
    model: Model,
    prompt: Question,
    video: Videos = None,
    image: Images = None,
    audio: Sounds = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    max_pixels: MaxPixels = None,
    start: Start = None,
    end: End = None,
    with_audio: WithAudio = False,
    think: Think = False,
    n: Annotated[int, typer.Option(min=1, help="How many answers.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(max=1, help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    seed: int = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Show the response while it is written.")] = False,
    dtype: Dtype = "float32",
    cache: CacheDir = "runs/cache",
    as_json: AsJson = False,
) -> None:
    """Ask a model about videos, images, sound, or text alone."""
    from longrl.generate import clips_of, generate_command

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    clips = clips_of(video or [], image or [], audio or [], fps, num_frames, max_pixels, start, end, with_audio)
    about = {"dtype": dtype, "cache_dir": cache}
    generate_command(model, clips, prompt, n, think, sampling, seed, stream, as_json, about)


@app.command()
def score(
    model: Model,
    prompt: Question,
    response: Annotated[str, typer.Option(help="What is to be scored.")],
    video: Videos = None,
    image: Images = None,
    audio: Sounds = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    max_pixels: MaxPixels = None,
    start: Start = None,
    end: End = None,
    with_audio: WithAudio = False,
    think: Think = False,
    dtype: Dtype = "float32",
    cache: CacheDir = "runs/cache",
    as_json: AsJson = False,
) -> None:
    """Log-prob of each token of a given response."""
    from longrl.generate import clips_of, score_command

    clips = clips_of(video or [], image or [], audio or [], fps, num_frames, max_pixels, start, end, with_audio)
    score_command(model, clips, prompt, response, think, as_json, {"dtype": dtype, "cache_dir": cache})


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="A Hugging Face folder, or tiny:FAMILY.")],
    sp: Annotated[int, typer.Option(min=1, help="Also split a prompt over so many processes, started here.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp64, fp32 or bf16.")] = "fp32",
) -> None:
    """Does a model compute here what the slow way computes?"""
    from longrl.verify import verify_command

    verify_command(model, sp, dtype)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the latest if not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write, empty or absent; RUN/export/step_N if not given.")
    ] = None,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Merge adapters into their base.")] = False,
) -> None:
    """Copy a checkpoint's model out as a Hugging Face folder."""
    from longrl.export import export_command

    export_command(run, step, out, merge_lora)


Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
ProcessesPerNode = Annotated[int, typer.Option(min=1, help="One a GPU; all nodes alike.")]


@launch_app.command("slurm")
def launch_slurm(
    config: Config,
    nodes: Nodes = 1,
    processes_per_node: ProcessesPerNode = 1,
    cpus_per_process: Annotated[int | None, typer.Option(min=1, help="Cores; Slurm's choice if not given.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of a job, as sbatch takes it.")] = None,
    stop_before: Annotated[
        int, typer.Option(min=1, max=65535, help="Seconds before the limit to save and stop; more than a step takes.")
    ] = 600,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it, too.")] = False,
) -> None:
    """Write a batch script for Slurm, in which a run is queued again until it is done."""
    loaded = load_arguments(config, "sft", "rl", "eval", "flow")
    from longrl.launch.slurm import launch_slurm as launch
    from longrl.launch.work import make_work

    launch(make_work(loaded, config, nodes, processes_per_node), time, stop_before, cpus_per_process, submit)


@launch_app.command("ray")
def launch_ray(
    config: Config,
    nodes: Nodes = 1,
    processes_per_node: ProcessesPerNode = 1,
    cpus_per_process: Annotated[int, typer.Option(min=1, help="Cores.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of the cluster; that of this machine if not given.")] = None,
) -> None:
    """Run on a Ray cluster, which starts and places the processes."""
    loaded = load_arguments(config, "sft", "rl", "eval", "flow")
    from longrl.launch.ray import launch_ray as launch
    from longrl.launch.work import make_work

    launch(make_work(loaded, config, nodes, processes_per_node), address, cpus_per_process)


@bench_app.command("step")
def bench_step(
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 4096,
    group_size: Annotated[int, typer.Option(min=1, help="Responses.")] = 8,
    response_tokens: Annotated[int, typer.Option(min=1)] = 64,
    video_tokens: Annotated[int, typer.Option(min=0, help="Of the prompt; synthetic frames are encoded.")] = 0,
    sp: Annotated[int, typer.Option(min=1, help="Processes, started here.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each path; fewer of one that takes a minute.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of all processes; all if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """A training step: the prompt once, or once a response."""
    from longrl.bench.work import Work

    work = Work(
        prompt_tokens=prompt_tokens,
        group_size=group_size,
        response_tokens=response_tokens,
        video_tokens=video_tokens,
        sp=sp,
    )
    from longrl.bench.table import bench_step as measure_and_print

    measure_and_print(work, repeats, threads or os.cpu_count() or 1, as_json)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the command line is wrong.
        SystemExit: the command has a status.
    """
    try:
        status = app(arguments, prog_name="longrl", standalone_mode=False)
    except _UsageError as error:
        if (message := error.format_message()).startswith("Usage:"):  # no arguments at all: the help
            sys.stderr.write(f"{message}\n")
            raise SystemExit(2) from None
        raise ValueError(
            f"{message.rstrip('.')}; see {error.ctx.command_path if error.ctx else 'longrl'} --help"
        ) from None
    if status:
        raise SystemExit(status)


def main() -> None:
    """Entry point of the `longrl` command."""
    show_traceback = "--traceback" in sys.argv or os.environ.get("LONGRL_TRACEBACK") == "1"
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    set_up_logging()
    sys.exit(run_guarded(lambda: run(arguments), show_traceback))
