"""What both training loops stand on: the run directory, the model as it was last saved, and saving it again."""

from __future__ import annotations

from pathlib import Path

from longrl.check import require_model
from longrl.checkpoint import FOLDER, Checkpoints, pack_optimizer, unpack_optimizer
from longrl.config import TrainConfig
from longrl.data.examples import Skips
from longrl.data.prompts import PromptBuilder
from longrl.models import load_family
from longrl.optim import Optimizer
from longrl.policy import Policy
from longrl.report.metrics import Metrics
from longrl.runtime import start_run


class Training:
    """A run taken up where its directory left off, or begun."""

    def __init__(self, config: TrainConfig, skips: Skips) -> None:
        """Loads the model: whoever calls has checked the data and all names of the configuration.

        Args:
            config: of the run.
            skips: what reading the data skipped; what the run had skipped when it was saved is added.
        """
        self.config, self.skips = config, skips
        require_model(config.model)
        self.run_dir = start_run(config)
        self.checkpoints = Checkpoints(self.run_dir / FOLDER, config.checkpoint.keep)
        latest = self.checkpoints.latest()
        family = load_family(config.model.at(latest.model_path) if latest else config.model, config.runtime.seed)
        self.policy = Policy(family, recompute=config.model.recompute)
        self.optimizer = Optimizer(self.policy.trunk.parameters(), config.optim, config.steps)
        self.build = PromptBuilder(family, config.cache, skips)
        self.done = 0
        if latest:
            unpack_optimizer(self.optimizer.adamw, latest.tensors())
            skips.names.update(latest.state["skipped"])
            self.done = self.policy.version = latest.step

    def steps_left(self) -> range:
        return range(self.done + 1, self.config.steps + 1)

    def metrics(self) -> Metrics:
        """The run's metrics, without those of steps that are done again."""
        return Metrics(self.run_dir, self.config.runtime.tensorboard, self.done + 1)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is due; every 0: after the last alone."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def save_if_due(self, step: int) -> None:
        if self.is_due(step, self.config.checkpoint.every_steps):
            self.checkpoints.save(
                step, self.policy.family.save, pack_optimizer(self.optimizer.adamw), {"skipped": self.skips.names}
            )

    def last_model(self) -> Path:
        """The Hugging Face folder of the last checkpoint."""
        last = self.checkpoints.latest()
        assert last is not None
        return last.model_path
