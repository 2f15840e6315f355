"""Numbers of a run, step by step: one JSON line each in metrics.jsonl, and TensorBoard scalars beside it.

    with Metrics(run_dir, tensorboard=True, resume_from=1) as metrics:
        for step in range(1, 101):
            with metrics.step(step):
                with metrics.time("prefill"):      # adds to time/prefill, as often as it is entered
                    ...
                metrics.log("loss", loss)
            progress.update(metrics.last)

gives lines such as {"step": 1, "wall_s": 1.92, "loss": 0.31, "time/prefill": 0.44}. wall_s is the whole step's.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

from longrl.files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Writes a run's metrics. A line is written, and flushed, when its step is complete; a failed step leaves none.

    Attributes:
        last: The line of the last complete step, {} before the first.
    """

    def __init__(self, run_dir: Path | None, tensorboard: bool = True, resume_from: int = 0) -> None:
        """Opens the files.

        Args:
            run_dir: Where metrics.jsonl and the folder tensorboard/ go; created when missing. None: nothing is written,
                another rank does.
            tensorboard: Write TensorBoard event files too.
            resume_from: The first step that this process will run. Lines of this step and later ones, left by a process
                that went further than its last checkpoint, are dropped; 0 drops all.

        Raises:
            OSError: The folder cannot be written.
        """
        self.last: dict[str, Any] = {}
        self._record: dict[str, Any] | None = None
        self._writer: SummaryWriter | None = None
        self._file: TextIO | None = None
        if run_dir is None:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        _drop_lines(path, resume_from)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_from or None)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Everything logged and timed inside belongs to this step."""
        assert self._record is None, f"step {number} begins inside step {self._record}"
        self._record = {"step": number, "wall_s": 0.0}
        began = time.perf_counter()
        try:
            yield
            self._record["wall_s"] = round(time.perf_counter() - began, 6)
            self._write(self._record)
            self.last = self._record
        finally:
            self._record = None

    def log(self, name: str, value: SupportsFloat | None) -> None:
        """Record a number (or a one-element tensor) of the current step; None: there is none this step."""
        assert self._record is not None, f"{name} was logged outside a step"
        assert name not in self._record, f"{name} was logged twice in step {self._record['step']}"
        self._record[name] = value if value is None or type(value) is int else float(value)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `time/part` of the current step."""
        record = self._record
        assert record is not None, f"{part} was timed outside a step"
        began = time.perf_counter()
        try:
            yield
        finally:
            name = f"time/{part}"
            record[name] = round(record.get(name, 0.0) + time.perf_counter() - began, 6)

    def _write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                logger.warning("step %d: %s is %s; written as null", record["step"], name, value)
                record[name] = None
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                if value is not None and name != "step":
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a line cut short by a crash is left out with a warning.

    Raises:
        OSError: The file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError(f"step is {record['step']!r}")
            records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s, line %d is left out: not a line of metrics (%s)", path, number, error)
    return records


def _drop_lines(path: Path, resume_from: int) -> None:
    """Keep the lines of steps before `resume_from`, as they are; all or nothing."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] < resume_from]
    write_whole(path, "".join(kept))
