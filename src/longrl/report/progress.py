"""What a person sees while a run trains: a live table on a terminal, now and then a log line elsewhere."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

_ROWS = {
    "loss": "loss",
    "reward/mean": "reward",
    "reward/answer": "answer reward",
    "groups/informative": "informative groups",
    "eval/accuracy": "held-out accuracy",
    "response/tokens": "response tokens",
    "entropy": "entropy",
    "grad_norm": "gradient norm",
    "sampling/logprob_diff": "log-prob difference",
}
"""Metric -> label, in this order; shown where a run logs them."""
_BARS = "▁▂▃▄▅▆▇█"
_HISTORY = 32
_PART_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")


class Progress:
    """Shows a run's metrics as they come.

    with Progress("rl", total_steps=100) as progress:
        ...
        progress.update(metrics.last)
    """

    def __init__(
        self, title: str, total_steps: int, log_every: int = 10, console: Console | None = None, shown: bool = True
    ) -> None:
        """Nothing is shown before the context is entered.

        Args:
            title: What runs ("sft", "rl").
            total_steps: The last step's number.
            log_every: Steps between log lines where there is no terminal.
            console: Where to draw; the standard error stream by default.
            shown: False: nothing is, another rank shows the run.
        """
        self.title, self.total_steps, self.log_every, self.shown = title, total_steps, log_every, shown
        console = console or Console(stderr=True)
        self._history: deque[Mapping[str, Any]] = deque(maxlen=_HISTORY)
        live = shown and console.is_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=False) if live else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a step.

        Args:
            record: A line of metrics: `Metrics.last`.
        """
        self._history.append(record)
        if self._live is not None:
            self._live.update(self._table())
        elif self.shown and (record["step"] % self.log_every == 0 or record["step"] == self.total_steps):
            logger.info("%s", self._line())

    def _line(self) -> str:
        last = self._history[-1]
        values = [f"{label} {_number(last[name])}" for name, label in _ROWS.items() if name in last]
        return f"{self.title} {last['step']}/{self.total_steps}: {', '.join(values)}, {self._eta()} to go"

    def _eta(self) -> str:
        mean = sum(record["wall_s"] for record in self._history) / len(self._history)
        return clock(mean * (self.total_steps - self._history[-1]["step"]))

    def _table(self) -> RenderableType:
        last = self._history[-1]
        step = last["step"]
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total_steps, completed=step, width=30),
            Text(f"{step}/{self.total_steps}"),
            Text(f"{last['wall_s']:.2f} s a step, {self._eta()} to go", style="dim"),
        )
        body = Table.grid(padding=(0, 2))
        for name, label in _ROWS.items():
            if name in last:
                body.add_row(
                    Text(label, style="dim"), Text(_number(last[name]), justify="right"), self._sparkline(name)
                )
        return Group(head, body, self._parts(last))

    def _sparkline(self, name: str) -> Text:
        values = [value for record in self._history if (value := record.get(name)) is not None]
        if not values:
            return Text("")
        low, high = min(values), max(values)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return Text("".join(_BARS[round((value - low) * scale)] for value in values), style="cyan")

    def _parts(self, last: Mapping[str, Any]) -> Text:
        """Where the step's time went: a bar of 40 cells and its legend."""
        parts = {name.removeprefix("time/"): value for name, value in last.items() if name.startswith("time/")}
        text = Text()
        for index, (name, seconds) in enumerate(parts.items()):
            style = _PART_STYLES[index % len(_PART_STYLES)]
            text.append("█" * round(40 * seconds / max(last["wall_s"], 1e-9)), style=style)
            text.append(f" {name} {seconds:.2f} s  ", style="dim")
        return text


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def clock(seconds: float) -> str:
    """75.2 -> 1:15; 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
