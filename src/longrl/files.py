"""Text files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, so that nobody ever reads half of it, not after a crash either.

    Raises:
        OSError: the file cannot be written; carries the path. What was there before is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a failed write does not say where
        raise
    finally:
        beside.unlink(missing_ok=True)
