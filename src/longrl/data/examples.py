"""Reads the rows of a dataset, of whatever format: one `Example` each.

    {"id": "7", "video": "clips/a.mp4", "question": "what comes first?", "options": ["a cat", "a dog"], "answer": "B"}

is a row of our own format; docs/data.md has all of them. Sampling (fps, num_frames) is the row's, else that of the
configuration. A row that cannot be used is an error that names file, line and id, never a default.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from longrl.config import CacheConfig, DataConfig, VideoConfig
from longrl.data.adapters.build import build
from longrl.data.adapters.formats import FORMATS, detect, name_of
from longrl.data.adapters.media import MediaReader
from longrl.data.adapters.row import Row, RowError
from longrl.data.rows import read_rows
from longrl.types import Clip, Example, MediaError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A row, and what came of it."""

    where: str
    id: str | None
    """None: it has none that can be read."""
    example: Example | RowError


class Skips:
    """What a run does about unusable media (`data.on_error`, `data.max_skips`): raise, or skip, name and count."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.names: dict[str, str] = {}
        """What was skipped -> why."""

    def record(self, name: str, error: MediaError) -> None:
        """Lets the caller go on without `name`, or ends the run. The same name counts once.

        Raises:
            MediaError: The given one, with how to go on without, if nothing may be skipped.
            ValueError: Too much was skipped.
        """
        if self.data.on_error == "raise":
            mend = "set data.on_error to skip"
            raise error if mend in str(error) else MediaError(f"{error}; or {mend}") from error
        if name in self.names:
            return
        self.names[name] = str(error)
        log.warning("skipped %s: %s", name, error)
        if len(self.names) > self.data.max_skips:
            raise ValueError(
                f"{len(self.names)} skipped for unusable media ({', '.join(self.names)}), data.max_skips allows only "
                f"{self.data.max_skips}; mend the files named above or raise data.max_skips"
            ) from error


def load_examples(
    path: str | Path,
    data: DataConfig,
    video: VideoConfig,
    skips: Skips | None = None,
    *,
    cache: CacheConfig | None = None,
    keep_skipped: bool = False,
    demonstrations: bool = False,
) -> list[Example]:
    """Reads all examples, in their order.

    Args:
        path: JSON lines, a JSON list, parquet, or NAME@SPLIT of the hub.
        data: Its format, system prompt, and what a missing media file does.
        video: How to sample where a row does not say.
        skips: Where skipped rows are counted; None: a count of this file alone.
        cache: Media in the rows are written to files in its folder.
        keep_skipped: Return skipped rows too: evaluation counts them as wrong instead of leaving them out.
        demonstrations: Rows need a response, and no answer.

    Raises:
        ValueError: A row cannot be used; names file, line, id and what to mend.
        MediaError: A media file is missing and `data.on_error` is `raise`.
    """
    skips = Skips(data) if skips is None else skips
    examples: list[Example] = []
    count = 0
    for parsed in parse(path, data, video, media_folder(cache or CacheConfig()), demonstrations=demonstrations):
        count += 1
        example = parsed.example
        if isinstance(example, RowError):
            raise example
        try:
            for clip in example.clips:
                check_exists(clip.path, clip.kind, parsed.where)
        except MediaError as error:
            skips.record(example.id, error)
            if not keep_skipped:
                continue
        examples.append(example)
    if not examples:
        raise ValueError(f"{path}: no usable example in {count} rows; expected at least one JSON object a line")
    return examples


def _with_sound(example: Example) -> Example:
    """The same with each video's own sound behind it."""

    def heard(part: str | Clip) -> tuple[str | Clip, ...]:
        if not isinstance(part, Clip) or part.kind != "video":
            return (part,)
        sound = Clip(path=part.path, kind="audio", start_s=part.start_s, end_s=part.end_s, with_video=True)
        return part, sound

    messages = (
        replace(message, content=tuple(one for part in message.content for one in heard(part)))
        for message in example.messages
    )
    return replace(example, messages=tuple(messages))


def media_folder(cache: CacheConfig) -> Path:
    """Where media that came as bytes are."""
    return Path(cache.dir) / "media"


def parse(
    path: str | Path, data: DataConfig, video: VideoConfig, store: Path, *, demonstrations: bool = False
) -> Iterator[Parsed]:
    """Every row in turn, good or bad; media files are not looked at.

    Args:
        store: The folder for media that rows hold as bytes.

    Raises:
        ValueError: The rows cannot be read at all, or their format is not known.
    """
    folder, rows = read_rows(str(path))
    media = MediaReader(folder if data.media_dir is None else Path(data.media_dir), store, video)
    name = None if data.format == "auto" else data.format
    seen: dict[str, str] = {}
    for where, number, columns in rows:
        if isinstance(columns, RowError):
            yield Parsed(where=where, id=None, example=columns)
            continue
        try:
            name = name or detect(columns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; or name it in data.format") from error
        yield _parsed(Row(columns, where, number), name, media, data, seen, demonstrations)


def _parsed(
    row: Row, name: str, media: MediaReader, data: DataConfig, seen: dict[str, str], demonstrations: bool
) -> Parsed:
    where, example_id = row.where, None
    try:
        example_id = name_of(row, name)
        row.where += f" (id {example_id!r})"
        if example_id in seen:
            if name == "own":
                raise row.error(f"{seen[example_id]} has the same id; ids must be unique")
            example_id += f"#{row.number}"  # not ours to mend
        seen[example_id] = f"line {row.number}"
        example = build(FORMATS[name](row, media), example_id, row, data.system_prompt, data.kind)
        if media.video.with_audio:
            example = _with_sound(example)
        if demonstrations and example.response is None:
            raise row.error("response is missing; supervised fine-tuning needs one", "no_response")
        if not demonstrations and example.answer is None:
            raise row.error("answer is missing, expected a text that is not empty", "no_answer")
    except RowError as error:
        return Parsed(where=where, id=example_id, example=error)
    return Parsed(where=row.where, id=example_id, example=example)


def check_exists(path: str, kind: str, where: str) -> None:
    """Raises MediaError if there is no such file."""
    try:
        found = Path(path).is_file()
        reason = "not a local file; download it" if "://" in path else "no such file"
    except (OSError, ValueError) as error:
        found, reason = False, getattr(error, "strerror", None) or str(error)
    if not found:
        raise MediaError(f"{where}: {kind} {path}: {reason}; mend the row, or set data.on_error to skip")
