"""One row of a dataset while it is read: columns by type, and errors that say where."""

from __future__ import annotations

import math
from typing import Any

VERDICTS = (
    "ok",
    "bad_row",
    "no_answer",
    "no_response",
    "unknown_kind",
    "media_count",
    "missing_media",
    "unreadable_media",
)
"""What `longrl data check` may say of a row."""


class RowError(ValueError):
    """A row that cannot be used, whatever its media files are."""

    def __init__(self, message: str, verdict: str = "bad_row") -> None:
        assert verdict in VERDICTS, verdict
        super().__init__(message)
        self.verdict = verdict


class Row:
    """The columns of a row that have a value (tables fill the others in with None), and which of them were read."""

    def __init__(self, columns: dict[str, Any], where: str, number: int) -> None:
        """
        Args:
            where: file and line, for messages.
            number: of the row in its file, from 1.
        """
        self.columns = {name: value for name, value in columns.items() if value is not None}
        self.where, self.number = where, number
        self._read: set[str] = set()

    @property
    def extra(self) -> dict[str, Any]:
        """Columns that nobody has read."""
        return {name: value for name, value in self.columns.items() if name not in self._read}

    def get(self, *names: str) -> Any:
        """The first of these columns that has a value; None if none has."""
        self._read.update(names)
        return next((self.columns[name] for name in names if name in self.columns), None)

    def text(self, name: str, default: str | None = None) -> str:
        got = self.get(name)
        if got is None and default is not None:
            return default
        if not isinstance(got, str) or not got.strip():
            raise self.wrong(name, got, "a text that is not empty")
        return got

    def wrong(self, name: str, got: Any, expected: str, verdict: str = "bad_row") -> RowError:
        return self.error(f"{name} is {'missing' if got is None else short(got)}, expected {expected}", verdict)

    def error(self, message: str, verdict: str = "bad_row") -> RowError:
        return RowError(f"{self.where}: {message}", verdict)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: Any) -> str:
    """A value as one line of an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
