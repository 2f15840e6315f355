"""Where rows come from: JSON lines, a JSON list, parquet, or a dataset of the Hugging Face hub as `NAME@SPLIT`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longrl.data.adapters.row import RowError, short

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH = 256
"""Rows of a table that are Python objects at once."""

Rows = Iterator[tuple[str, int, dict[str, Any] | RowError]]
"""Where it is, its number from 1, and the row or what is wrong with it."""


def missing(path: str) -> str | None:
    """Why there are no rows there; None: there are, or the hub may have them."""
    if Path(path).is_file():
        return None
    name, at, _ = path.rpartition("@")
    if at and Path(name).is_file():
        return f"{path}: a file has no splits; write {name}"
    if at and (Path(name).is_dir() or _HUB.fullmatch(name)):
        return None
    if Path(path).is_dir():
        return f"{path} is a folder; name its split ({path}@train), or a file in it"
    if Path(path).exists():
        return f"{path} is no regular file but a device or a pipe; write its rows to a file"
    return f"{path} does not exist" + ("; a dataset of the hub is written NAME@SPLIT" if _HUB.fullmatch(path) else "")


def read_rows(path: str) -> tuple[Path | None, Rows]:
    """Returns the folder that relative media paths start at (None: a dataset of the hub), and the rows.

    Raises:
        ValueError: there are none, or they cannot be read at all; a bad row among others comes as a RowError.
        RuntimeError: a package is missing.
    """
    file = Path(path)
    if not file.is_file() and "@" in path and missing(path) is None:
        name, _, split = path.rpartition("@")
        folder = Path(name) if Path(name).is_dir() else None
        return folder, _numbered(f"{path} row ", _hub(name, split, path))
    if not file.is_file() and (problem := missing(path)):
        raise ValueError(problem)
    try:
        if file.suffix == ".parquet":
            return file.parent, _numbered(f"{path} row ", _parquet(file))
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the examples: {error.strerror}") from error
    if b"\0" in content[:4096]:
        raise ValueError(f"{path}: not a text; expected a JSONL file, a JSON list (.json) or a table (.parquet)")
    if file.suffix == ".json" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return file.parent, _numbered(f"{path} row ", _list(path, content))
    return file.parent, _lines(path, content)


def _numbered(prefix: str, rows: Iterator[Any]) -> Rows:
    for number, row in enumerate(rows, start=1):
        yield f"{prefix}{number}", number, _object(row, f"{prefix}{number}")


def _object(row: Any, where: str) -> dict[str, Any] | RowError:
    if isinstance(row, dict):
        return row
    return RowError(f'{where}: got {short(row)}, expected a JSON object such as {{"id": ...}}')


def _lines(path: str, content: bytes) -> Rows:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _object(json.loads(line), where)
        except json.JSONDecodeError as error:
            row = RowError(f"{where}: malformed JSON at column {error.colno}: {error.msg}; expected one object a line")
        except UnicodeDecodeError as error:
            row = RowError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
        yield where, number, row


def _list(path: str, content: bytes) -> Iterator[Any]:
    try:
        return iter(json.loads(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RuntimeError(f"{file}: parquet needs pyarrow; pip install 'longrl[data]'") from error
    try:
        for batch in ParquetFile(file).iter_batches(_BATCH):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{file}: not a whole parquet file ({f'{error}'.rstrip('.')}); download or write it again"
        ) from error


def _hub(name: str, split: str, path: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RuntimeError(f"{path}: a dataset of the hub needs datasets; pip install 'longrl[data]'") from error
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of its tries; that none came through is raised
    try:
        table = datasets.load_dataset(name, split=split)
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise ValueError(f"{path}: {error}") from error
    # as Arrow: images and videos stay the bytes and paths they are
    batches: Any = table.with_format("arrow").iter(_BATCH)
    for batch in batches:
        yield from batch.to_pylist()
