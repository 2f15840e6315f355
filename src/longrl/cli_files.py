"""The command line: commands about the files of data and videos, and the arguments that they share with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrl.config_files import load_arguments

cache_app = typer.Typer(no_args_is_help=True, help="The cache of video embeddings.")
video_app = typer.Typer(no_args_is_help=True, help="See a video as a model does.")
data_app = typer.Typer(no_args_is_help=True, help="Rows of examples.")

Config = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG", help="YAML files, merged left to right, and key=value overrides, applied last."),
]
Fps = Annotated[float | None, typer.Option(help="Frames to sample a second.")]
NumFrames = Annotated[int | None, typer.Option(help="Frames to sample, evenly over the span.")]
MaxPixels = Annotated[int | None, typer.Option(help="Shrink frames and images to at most this height x width.")]
Start = Annotated[str | None, typer.Option(help="Where the span starts: seconds, mm:ss or hh:mm:ss.")]
End = Annotated[str | None, typer.Option(help="Where the span ends; the end of the file if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@cache_app.command("build")
def cache_build(config: Config) -> None:
    """Embed every video that a configuration names."""
    loaded = load_arguments(config, "sft", "rl", "eval")
    from longrl.video.cache_commands import cache_build as build

    build(loaded)


@cache_app.command("verify")
def cache_verify(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Read every entry and compare its checksum."""
    from longrl.video.cache_commands import cache_verify as verify

    verify(folder)


@cache_app.command("info")
def cache_info(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Number and size of the entries."""
    from longrl.video.cache_commands import cache_info as info

    info(folder)


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="A JSONL, JSON or parquet file, or NAME@SPLIT of the Hugging Face hub.")],
    format_name: Annotated[str, typer.Option("--format", help="As data.format.")] = "auto",
    media_dir: Annotated[str | None, typer.Option(help="Where relative media paths start.")] = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    with_audio: Annotated[bool, typer.Option("--with-audio", help="As video.with_audio: hear each video.")] = False,
    sft: Annotated[bool, typer.Option("--sft", help="Rows need a response rather than an answer.")] = False,
    as_json: AsJson = False,
) -> None:
    """A verdict on every row, and on the media files that it names; fails if any row cannot be used."""
    from longrl.data.verdicts import data_check_command

    data_check_command(path, format_name, media_dir, fps, num_frames, with_audio, sft, as_json)


@data_app.command("make")
def data_make(
    task: Annotated[str, typer.Argument(help="arithmetic (text) or counting (pictures).")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    train: Annotated[int, typer.Option(min=1, help="Questions to demonstrate, and as many to reinforce.")] = 400,
    test: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 100,
    seed: int = 0,
) -> None:
    """Make a small set of questions with verifiable answers."""
    from longrl.data.synthetic.small import make_small

    for split, file in make_small(task, out, train, test, seed).items():
        typer.echo(f"{split:<10} {file}")


@video_app.command("probe")
def video_probe(file: str, as_json: AsJson = False) -> None:
    """Duration, streams, rotation, frames and key frames of a file."""
    from longrl.video.commands import probe_command

    probe_command(file, as_json)


@video_app.command("frames")
def video_frames(
    file: str,
    out: Annotated[Path, typer.Option(help="The folder to write the frames into; must be empty or absent.")],
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    as_json: AsJson = False,
    max_pixels: MaxPixels = None,
) -> None:
    """Write the frames that sampling picks, with their true times."""
    from longrl.video.commands import frames_command

    frames_command(file, fps, num_frames, start, end, out, as_json, max_pixels)
