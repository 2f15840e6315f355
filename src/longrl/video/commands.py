"""`longrl video probe` and `longrl video frames`: what is in a file, and what a model would see of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import typer

from longrl.types import Clip
from longrl.video.decode import read_frames
from longrl.video.probe import VideoInfo, probe


def probe_command(file: str, as_json: bool) -> None:
    """Prints what is in a video file, as a table for people or as one JSON object.

    Raises:
        MediaError: The file cannot be used.
    """
    info = probe(file)
    typer.echo(json.dumps(dataclasses.asdict(info)) if as_json else _table(info))


def frames_command(
    file: str,
    fps: float | None,
    num_frames: int | None,
    start: str | None,
    end: str | None,
    out: str | Path,
    as_json: bool,
    max_pixels: int | None,
) -> None:
    """Writes the sampled frames as PNG files into a new folder, all or none, and prints their true times.

    Args:
        file: A video file.
        fps: Frames a second to sample; exactly one of fps and num_frames is given.
        num_frames: Frames to sample.
        start: Start of the span: seconds, mm:ss or hh:mm:ss.
        end: End of the span, likewise.
        out: The folder to make; it may exist if it is empty.
        as_json: Print one JSON object rather than a line for each frame.
        max_pixels: Largest height x width to write; larger frames are scaled down.

    Raises:
        MediaError: The file cannot be used.
        ValueError: Wrong times or sampling, or the folder is not empty.
    """
    clip = Clip(
        path=file,
        start_s=0.0 if start is None else parse_time(start, "--start"),
        end_s=None if end is None else parse_time(end, "--end"),
        fps=fps,
        num_frames=num_frames,
        max_pixels=max_pixels,
    )
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already exists and is not an empty folder; give a new one")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".frames-") as scratch:
        folder = Path(scratch, "frames")
        folder.mkdir()
        names, times_s, size = _write(clip, folder)
        os.replace(folder, out)
    paths = [str(out / name) for name in names]
    if as_json:
        width, height = size
        report = {"file": file, "timestamps_s": times_s, "frames": paths, "width": width, "height": height}
        typer.echo(json.dumps(report))
    else:
        for path, time_s in zip(paths, times_s, strict=True):
            typer.echo(f"{time_s:10.3f} s  {path}")


def parse_time(text: str, name: str) -> float:
    """Reads "90", "1:30", "0:01:30" or "90.5" as seconds.

    Raises:
        ValueError: It is none of these; the message names the option.
    """
    parts = text.split(":")
    try:
        numbers = [float(parts[-1]), *(int(part) for part in parts[-2::-1])]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(0 <= number < 60 for number in numbers[:-1]):
        raise ValueError(f"{name}: got {text!r}, expected seconds, mm:ss or hh:mm:ss")
    return sum(number * unit for number, unit in zip(numbers, (1, 60, 3600), strict=False))


def _write(clip: Clip, folder: Path) -> tuple[list[str], list[float], tuple[int, int]]:
    """Writes the frames; returns their names, times and (width, height)."""
    names, times_s, shape = [], [], (0, 0)

    def fit(height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, math.sqrt((clip.max_pixels or math.inf) / (height * width)))
        return max(1, int(height * scale)), max(1, int(width * scale))

    for frames in read_frames(clip, size=fit):
        for pixels, time_s in zip(frames.pixels, frames.timestamps_s.tolist(), strict=True):
            name = f"frame_{len(names):06d}.png"
            (folder / name).write_bytes(_png(pixels))
            names.append(name)
            times_s.append(time_s)
        shape = frames.pixels.shape[2], frames.pixels.shape[1]
    return names, times_s, shape


def _png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3]."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))


def _table(info: VideoInfo) -> str:
    rate = "variable" if info.variable_frame_rate else "constant"
    keyframes = [f"{time_s:.2f}" for time_s in info.keyframes_s[:5]] + ["..."] * (len(info.keyframes_s) > 5)
    rows = [
        ("file", f"{info.path} ({info.container}, {info.size_bytes} bytes)"),
        ("duration", f"{info.duration_s:.3f} s, from {info.start_s:.3f} s of the file's own clock"),
        ("video", f"{info.codec}, {info.width} x {info.height}, turned by {info.rotation_deg} degrees"),
        ("frames", f"{info.num_frames}, {info.average_fps:.3f} a second, {rate}"),
        ("key frames", f"{len(info.keyframes_s)}, at {', '.join(keyframes)} s"),
    ]
    if audio := info.audio:
        span = f"{audio.start_s:.3f} s to {audio.start_s + audio.duration_s:.3f} s"
        rows.append(("audio", f"{audio.codec}, {audio.rate} Hz, {audio.channels} channels, {span}"))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)
