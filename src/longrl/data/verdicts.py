"""`longrl data check`: what a run would say of every row, and of the media files that it names."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from longrl.config import DataConfig, VideoConfig
from longrl.config_files import build_section
from longrl.data.adapters.formats import FORMATS
from longrl.data.adapters.row import VERDICTS, RowError
from longrl.data.examples import check_exists, parse
from longrl.types import Clip, MediaError


def check_rows(
    path: str, data: DataConfig, video: VideoConfig, *, demonstrations: bool = False
) -> list[dict[str, Any]]:
    """A record for each row: where, id, verdict, message (None if ok).

    Args:
        video: How to sample where a row does not say.
        demonstrations: Rows are for supervised fine-tuning: they need a response, not an answer.

    Raises:
        ValueError: There are no rows, or they cannot be read at all.
    """
    found: list[dict[str, Any]] = []
    looked: dict[Clip, tuple[str, str | None]] = {}
    with tempfile.TemporaryDirectory(prefix="longrl-media-") as store:
        for parsed in parse(path, data, video, Path(store), demonstrations=demonstrations):
            verdict, message = "ok", None
            if isinstance(parsed.example, RowError):
                verdict, message = parsed.example.verdict, str(parsed.example)
            else:
                for clip in parsed.example.clips:
                    if clip not in looked:
                        looked[clip] = _look(clip)
                    if looked[clip][1] is not None:
                        verdict, message = looked[clip][0], f"{parsed.where}: {looked[clip][1]}"
                        break
            found.append({"where": parsed.where, "id": parsed.id, "verdict": verdict, "message": message})
    if not found:
        raise ValueError(f"{path}: there are no rows")
    return found


def _look(clip: Clip) -> tuple[str, str | None]:
    """A verdict on a file and its span, and what is wrong with it."""
    try:
        check_exists(clip.path, clip.kind, "")
    except MediaError:
        mend = "; download it" if "://" in clip.path else ""
        return "missing_media", f"{clip.kind} {clip.path}: no such local file{mend}"
    try:
        _read(clip)
    except MediaError as error:
        return "unreadable_media", str(error)
    except ValueError as error:  # more frames than may be sampled
        return "bad_row", str(error)
    return "ok", None


def _read(clip: Clip) -> None:
    """Raises what encoding would raise, but for damage in the middle of a video: that is found by decoding it."""
    if clip.kind == "image":
        from longrl.video.image import read_image

        read_image(clip.path)
    elif clip.kind == "audio":
        from longrl.video.audio import read_audio

        read_audio(clip.path, clip.start_s, clip.end_s)
    else:
        from longrl.video.decode import select_frames
        from longrl.video.probe import probe

        select_frames(clip)
        probe(clip.path)  # decodes a frame


def data_check_command(
    path: str,
    format_name: str,
    media_dir: str | None,
    fps: float | None,
    num_frames: int | None,
    with_audio: bool,
    demonstrations: bool,
    as_json: bool,
) -> None:
    """Prints the rows that cannot be used and a count of verdicts, or one JSON object with all rows.

    Raises:
        ValueError: A row cannot be used, or none can be read.
    """
    if format_name not in ("auto", *FORMATS):
        raise ValueError(f"--format: got {format_name!r}, expected one of auto, {', '.join(FORMATS)}")
    if fps is not None and num_frames is not None:
        raise ValueError(f"--fps {fps:g} and --num-frames {num_frames}: give one of them")
    if num_frames is None:
        video = build_section(VideoConfig, {} if fps is None else {"fps": fps}, "--fps")
    else:
        video = build_section(VideoConfig, {"fps": None, "num_frames": num_frames}, "--num-frames")
    video = video.model_copy(update={"with_audio": with_audio})
    data = DataConfig.model_validate({"format": format_name, "media_dir": media_dir})
    rows = check_rows(path, data, video, demonstrations=demonstrations)
    counts = Counter(row["verdict"] for row in rows)
    failed = len(rows) - counts["ok"]
    if as_json:
        typer.echo(json.dumps({"path": path, "rows": len(rows), "failed": failed, "counts": counts, "verdicts": rows}))
    else:
        for row in rows:
            if row["message"] is not None:
                typer.echo(f"{row['verdict']:<16}  {' '.join(row['message'].split())}")
        named = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
        typer.echo(f"{path}: {len(rows)} rows: {', '.join(named)}")
    if failed:
        raise ValueError(f"{path}: {failed} of {len(rows)} rows cannot be used")
