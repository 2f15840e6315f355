"""What the loops of text stand on: the run directory, the model as it was last saved, and saving it again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longrl.check import require_model
from longrl.checkpoint import Checkpoints, pack_optimizer, read_optimizer
from longrl.config import TrainConfig
from longrl.data.examples import Skips
from longrl.data.order import shuffled_blocks, step_examples
from longrl.data.prompts import PromptBuilder, prompt_limit
from longrl.loop import Loop
from longrl.models import adapters
from longrl.models.streams import cohorts, num_tokens
from longrl.optim import Optimizer
from longrl.parallel import tensor_files
from longrl.parallel.gradients import sum_gradients
from longrl.parallel.ranks import ALONE, Ranks
from longrl.parallel.shard import whole
from longrl.policy import load_policy
from longrl.rewards.compose import JudgeLostError
from longrl.rollout.client import ServerLostError, ServerRefusedError
from longrl.runtime import CHECKPOINTS, seed_for, start_run
from longrl.types import Example, Prompt

T = TypeVar("T")

ROLLOUTS = "rollouts.json"
"""Beside the optimizer state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What this rank does of a step in one layout of the processes: whole cohorts. Of one process, all of it."""

    ranks: Ranks
    """The layout."""
    epochs: list[int]
    """Of each example: a step across the end of an epoch can hold one twice."""
    examples: list[Example]
    prompts: list[Prompt]

    def seeds(self, seed: int, name: str, step: int) -> list[int]:
        """Of each example's noise."""
        return [
            seed_for(seed, name, step, e, example.id) for e, example in zip(self.epochs, self.examples, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step, or what is drawn in it to take the place of others."""

    shares: list[Share]
    """One after the other, the same layouts on all ranks; more than one where `parallel.sp` is auto."""
    ids: list[str]
    """Of all examples, on all ranks."""

    def gather(self, values: Sequence[T]) -> list[T]:
        """What each share came to: on this rank -> on all, once for the ranks that share prompts."""
        return [part for share, value in zip(self.shares, values, strict=True) for part in share.ranks.gather(value)]


class Training(Loop[TrainConfig]):
    """A run taken up where its directory left off, or begun."""

    def __init__(
        self, config: TrainConfig, skips: Skips, ranks: Ranks = ALONE, asked: TrainConfig | None = None
    ) -> None:
        """Loads the model: whoever calls has checked the data and all names of the configuration.

        Args:
            config: of the run.
            skips: what reading the data skipped; what the run had skipped when it was saved is added.
            ranks: all of them do this, and call every method that follows.
            asked: what the run directory keeps, if it is not `config`, in which something was settled for this machine.
        """
        self.config, self.skips, self.ranks = config, skips, ranks
        require_model(config.model, config.parallel, trained=True)
        limit = prompt_limit(config, config.data, ranks)  # before there is a run, or a model that has no room
        self.run_dir = start_run(asked or config, is_main=ranks.is_main)
        self.checkpoints = Checkpoints(self.run_dir / CHECKPOINTS, config.checkpoint.keep)
        latest = ranks.from_main(self.checkpoints.latest)
        self.policy = load_policy(config.model.at(latest.model_path) if latest else config.model, config, ranks)
        self.optimizer = Optimizer(
            self.policy.trunk.parameters(), config.optim, config.steps, encoder=self.policy.encoder
        )
        self.build = PromptBuilder(self.policy.family, config.cache, skips, ranks, *limit)
        self.done, self.sharded = 0, config.parallel.shard
        self.rollouts: str | None = None
        """Of the step that follows what is done, where they were drawn before it: see rollout/ahead.py."""
        self.pending: Callable[[bool], str | None] | None = None
        """Gives them, when a checkpoint is written; told whether the run stops then."""
        self._passing: set[str] = set()
        """Keys of a step's embeddings that no other step can use."""
        if latest:
            self.policy.initial_encoder_id = None
            read_optimizer(self.optimizer.adamw, latest.trainer_path)
            skips.names.update(latest.state["skipped"])
            self.done = self.policy.version = latest.step
            if (path := latest.trainer_path / ROLLOUTS).exists():
                self.rollouts = path.read_text()
        self._saved = self.done

    def draw(self, examples: Sequence[Example], step: int) -> Batch:
        """This rank's shares of a step, its media embedded."""
        self._passing = set()
        return self._batch(self._step_examples(examples, step))

    def refill(self, examples: Sequence[Example], step: int, start: int, count: int) -> Batch | None:
        """As draw, of `count` more examples, or fewer, none of which the step has drawn; None: there are no others.

        Args:
            start: how many more were drawn before.
        """
        taken = {example.id for _, example in self._step_examples(examples, step)}
        others = [example for example in examples if example.id not in taken]
        share, seed = self.config.data.share_media, seed_for(self.config.runtime.seed, "refill", step)
        drawn = shuffled_blocks(others, share, seed)[start : start + count]
        return self._batch([(0, others[i]) for i in drawn]) if drawn else None

    def _step_examples(self, examples: Sequence[Example], step: int) -> list[tuple[int, Example]]:
        config = self.config
        return step_examples(examples, step, config.prompts_per_step, config.data.share_media, config.runtime.seed)

    def _batch(self, drawn: Sequence[tuple[int, Example]]) -> Batch:
        self.build.prepare([example for _, example in drawn])
        kept, prompts = self.build([example for _, example in drawn])
        if self.policy.embeds_pass:
            self._passing |= {media.key for prompt in prompts for media in prompt.media}
        together = cohorts(prompts)
        tokens = [num_tokens([prompts[i] for i in members]) for members in together]
        lengths = [max(len(prompts[i]) for i in members) for members in together]
        shares = []
        for ranks, mine in self.ranks.deal(tokens, lengths):
            indices = sorted(i for k in mine for i in together[k])
            epochs, chosen = zip(*(drawn[kept[i]] for i in indices), strict=True) if indices else ((), ())
            ours = [prompts[i] for i in indices]
            shares.append(Share(ranks=ranks, epochs=list(epochs), examples=list(chosen), prompts=ours))
        return Batch(shares=shares, ids=[drawn[i][1].id for i in kept])

    def update(self, step: int, count: int, ids: Sequence[str]) -> tuple[float, float]:
        """Adds up the gradients of all ranks and takes the optimizer step (optim.py): the same on each.

        Args:
            count: what the gradient is divided by, of all ranks together.
        """
        self.policy.reshard()
        if self.ranks.size > 1:
            # those of a sharded weight are summed over sp already
            sum_gradients(self.optimizer.parameters, self.ranks.dp if self.sharded else self.ranks.everyone)
            sum_gradients(self.optimizer.encoder, self.ranks.everyone)
        norm, lr = self.optimizer.step(step, count, ids)
        self.build.cache.remove(self._passing)
        self.policy.version = step
        return norm, lr

    @contextmanager
    def kept(self, step: int) -> Iterator[None]:
        """Inside, after the steps up to this one, servers are asked for rollouts, and judges. All ranks do so, and lose
        them alike.

        Raises:
            Stopped: a server or the judge was lost; the run is saved.
            ServerRefusedError: one does not do what it is asked; the run is saved.
        """
        try:
            yield
        except (JudgeLostError, ServerLostError, ServerRefusedError) as error:
            if step > self._saved:
                self._write(step)
            if step == 0 or isinstance(error, ServerRefusedError):
                raise
            self._stop(f"{error}; stopped", step)

    def _save(self, step: int, stopping: bool) -> None:
        with self.kept(step):
            rollouts = self.pending(stopping) if self.pending else None
        self._write(step, rollouts)

    def _write(self, step: int, rollouts: str | None = None) -> None:
        """The main rank saves; those that it shares the weights with hand over theirs, and write their own part of the
        optimizer state."""
        self._saved = step
        if self.ranks.dp_rank:
            return
        self.policy.reshard()
        if self.ranks.is_main:

            def write_trainer(folder: Path) -> None:
                self._write_optimizer(folder)
                if rollouts is not None:
                    (folder / ROLLOUTS).write_text(rollouts)

            self.checkpoints.save(step, self._write_model, write_trainer, {"skipped": self.skips.names})
        elif self.sharded:
            self._write_optimizer(None)
            self._write_model(None)

    def _write_model(self, folder: Path | None) -> None:
        """folder: where, on the main rank."""
        family, lora = self.policy.family, self.config.model.lora
        weights = adapters.parameters(family.model) if lora else family.model.state_dict(keep_vars=True)
        if folder is None:
            whole(weights, keep=False)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as files:
            in_full = whole(weights, True, Path(files))
            if lora:
                adapters.save(family, folder, in_full)
            else:
                family.save(folder, in_full)

    def _write_optimizer(self, folder: Path | None) -> None:
        """folder: where, known to the main rank."""
        group, where = None, folder
        if self.sharded and self.ranks.sp is not None:
            group, where = self.ranks.sp.group, self.ranks.once(lambda: folder)
        assert where is not None
        tensor_files.write(pack_optimizer(self.optimizer.adamw), where, group)

    def last_model(self) -> Path:
        """The Hugging Face folder of the last checkpoint; of adapters, peft's."""
        last = self.ranks.from_main(self.checkpoints.latest)
        assert last is not None
        return last.model_path
