"""Answers that were paid for, and what was paid, in one SQLite file that the processes of a machine share."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrl.rewards.limits import CallError

log = logging.getLogger(__name__)

FILE_NAME = "answers.sqlite"

_PATIENCE_S = 60.0
"""How long a process waits while others have the file."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 0), usd REAL NOT NULL);
INSERT OR IGNORE INTO spent VALUES (0, 0.0);
"""


class Store:
    """`spent_usd` counts calls under way with the most they may cost, and so do those that a crash cut off."""

    def __init__(self, folder: Path, budget_usd: float | None = None) -> None:
        """
        Raises:
            OSError: the folder cannot be made.
            RuntimeError: the file in it cannot be used.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.budget_usd = folder / FILE_NAME, budget_usd
        self._lock = threading.Lock()
        self._warned = False
        try:
            self._db = self._open()
        except sqlite3.Error as error:
            raise RuntimeError(f"{self.path}: {error}; give another folder, or delete the file") from error

    def get(self, key: str) -> Any | None:
        """The answer to a question; None if there is none."""
        row = self._run("SELECT value FROM answers WHERE key = ?", key).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keeps an answer, if it can: one that it cannot is in use all the same, and `_try` warns.

        Args:
            key: of the question.
            value: what JSON can hold, but not None.
        """
        self._try("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, json.dumps(value))

    @property
    def spent_usd(self) -> float:
        return self._run("SELECT usd FROM spent").fetchone()[0]

    @contextmanager
    def money(self, most_usd: float, used_usd: Callable[[], float]) -> Iterator[None]:
        """Sets money aside for a call.

        Args:
            most_usd: that it may cost.
            used_usd: asked when it has ended.

        Raises:
            CallError: the budget does not allow it.
        """
        if not most_usd:
            yield
            return
        cap = float("inf") if self.budget_usd is None else self.budget_usd
        if not self._run("UPDATE spent SET usd = usd + ? WHERE usd + ? <= ?", most_usd, most_usd, cap).rowcount:
            raise CallError(
                f"budget_usd is {cap:g}, of which {self.spent_usd:.6g} is spent or set aside; raise it", again=False
            )
        try:
            yield
        finally:
            self._try("UPDATE spent SET usd = MAX(usd + ?, 0.0)", used_usd() - most_usd)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                # A commit is one write without a sync: a power cut may lose the last answers, never the file.
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.executescript(_SCHEMA)
            except sqlite3.OperationalError as error:
                # SQLite does not wait for others to change the journal's mode, as ranks that begin together do.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                return db

    def _try(self, statement: str, *values: Any) -> None:
        """After a call, which has been paid: a full disk is to cost no answer, only a warning, once."""
        try:
            self._run(statement, *values)
        except sqlite3.Error as error:
            if not self._warned:
                log.warning(
                    "%s: %s; answers that are not kept are paid again, and calls count with the most they may cost; "
                    "make room (said once)",
                    self.path,
                    error,
                )
            self._warned = True

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        with self._lock:
            return self._db.execute(statement, values)
