"""What all training loops do between steps: what is left, the run's metrics, saving when due or asked to stop."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from longrl.config import TrainConfig
from longrl.flow_config import FlowConfig
from longrl.parallel.ranks import Ranks
from longrl.report.metrics import Metrics
from longrl.report.progress import Progress
from longrl.stopping import Stopped, asked

log = logging.getLogger(__name__)
C = TypeVar("C", bound=TrainConfig | FlowConfig)


class Loop(ABC, Generic[C]):
    """A run that has `done` so many of its steps. All ranks call its methods."""

    config: C
    ranks: Ranks
    run_dir: Path
    done: int

    def steps_left(self) -> range:
        return range(self.done + 1, self.config.steps + 1)

    def metrics(self) -> Metrics:
        """The run's metrics, without those of steps that are done again; the main rank writes them."""
        run_dir = self.run_dir if self.ranks.is_main else None
        return Metrics(run_dir, self.config.runtime.tensorboard, self.done + 1)

    def progress(self, title: str) -> Progress:
        if self.done == self.config.steps and self.ranks.is_main:
            log.info("%s: all %d steps are done already, in %s", title, self.done, self.run_dir)
        return Progress(title, self.config.steps, shown=self.ranks.is_main)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is due; every 0: after the last alone."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def save_if_due(self, step: int) -> None:
        """Called after each step, by all ranks.

        Raises:
            Stopped: a rank was asked to stop before the last step; the run is saved.
        """
        stop = any(self.ranks.gather_all(asked()))
        if stop or self.is_due(step, self.config.checkpoint.every_steps):
            self._save(step, stop)
        if stop and step < self.config.steps:
            self._stop("stopped", step)

    def _stop(self, why: str, step: int) -> NoReturn:
        self.ranks.from_main(lambda: None)  # who starts the ranks may end all as soon as one leaves: not before
        raise Stopped(f"{why} after step {step} of {self.config.steps} and saved; start it again to go on")

    @abstractmethod
    def _save(self, step: int, stopping: bool) -> None:
        """Writes a checkpoint, all ranks together; stopping: the run was asked to stop, and has little time."""
