"""What the loop of train_flow.py stands on: the model as it was last saved, its samplers, saving, held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longrl.checkpoint import Checkpoint, Checkpoints, pack_optimizer, read_optimizer
from longrl.data.media_prompts import step_prompts
from longrl.flow_config import FlowConfig
from longrl.flow_types import Media, MediaPrompt
from longrl.loop import Loop
from longrl.models.denoiser import Denoiser, Shadow
from longrl.models.diffusion import MediaFamily
from longrl.models.media import load_media_family, quiet
from longrl.optim import Optimizer
from longrl.parallel import tensor_files
from longrl.parallel.gradients import sum_gradients
from longrl.parallel.ranks import ALONE, Ranks
from longrl.rollout.flow import Guided, Sampler, make_sampler, micro_batches
from longrl.rollout.text_cache import TextCache
from longrl.runtime import CHECKPOINTS, seed_for, start_run

log = logging.getLogger(__name__)

BASE = "base"
"""Where a run directory keeps a twin that was warmed up."""


class FlowTraining(Loop[FlowConfig]):
    """A run taken up where its directory left off, or begun."""

    def __init__(self, config: FlowConfig, family: MediaFamily, ranks: Ranks = ALONE) -> None:
        """
        Args:
            family: from `begin_run`.
            ranks: all of them do this, and call every method that follows.

        Raises:
            ValueError: the weights cannot be shared out evenly.
        """
        self.config, self.family, self.ranks = config, family, ranks
        self.run_dir, algo = Path(config.run_dir), config.flow
        self.checkpoints = Checkpoints(self.run_dir / CHECKPOINTS, config.checkpoint.keep)
        group = ranks.everyone if config.processes.shard else None
        if config.processes.shard and (group is None or config.prompts_per_step % ranks.size):
            raise ValueError(
                f"processes.shard is true with {ranks.size} processes and {config.prompts_per_step} prompts_per_step, "
                "expected several processes and a multiple of them"
            )
        seed, lora = config.runtime.seed, config.model.lora
        referred_to = algo.kl_coef > 0
        self.denoiser = Denoiser(family, lora, seed, config.gradient_checkpointing, referred_to, group)
        self.optimizer = Optimizer(self.denoiser.weights.values(), config.optim, config.steps)
        self.average = Shadow(self.denoiser) if algo.ema_decay else None
        self.old = Shadow(self.denoiser) if algo.method == "nft" else None
        self.texts = TextCache(family, self.run_dir / "text_embeds")
        negative = self.texts([config.prompts.negative or ""]) if config.sampling.guidance > 1 else None
        self.model = Guided(family, config.sampling.guidance, negative, config.sampling.detach_negative)
        self.done = 0
        latest = ranks.from_main(self.checkpoints.latest)
        if latest:
            self._restore(latest)

    @property
    def size(self) -> tuple[int, int, int]:
        return self.config.media.height, self.config.media.width, self.config.media.frames

    def draw(self, prompts: Sequence[MediaPrompt], step: int) -> list[tuple[int, MediaPrompt]]:
        """(epoch, prompt) of all ranks; this one takes every size-th, from its own number on."""
        return step_prompts(prompts, step, self.config.prompts_per_step, self.config.runtime.seed)

    def sampler(self, steps: int, shared_start: bool) -> Sampler:
        algo, sampling = self.config.flow, self.config.sampling
        return make_sampler(
            self.model,
            size=self.size,
            steps=steps,
            noise_level=algo.noise_level,
            noise_schedule=algo.noise_schedule,
            shift=sampling.shift,
            shared_start=shared_start,
            max_rows=sampling.max_rows,
        )

    def media(self, prompt: MediaPrompt, latents: Tensor) -> Media:
        """Decodes the samples of a prompt."""
        batches = micro_batches(len(latents), self.config.sampling.max_rows)
        pixels = np.concatenate([self.family.decode(latents[rows]) for rows in batches])
        return Media(prompt=prompt, pixels=pixels, fps=self.config.media.fps if self.family.is_video else None)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated and saved."""
        if self.average is None:
            yield
        else:
            with self.average.swapped_in():
                yield

    def update(self, step: int, count: int, ids: Sequence[str]) -> tuple[float, float]:
        """Adds up the gradients of all ranks, divides them by count and takes the optimizer step."""
        self.denoiser.reshard()
        if self.ranks.size > 1 and (not self.denoiser.sharded or self.config.model.lora):
            sum_gradients(self.optimizer.parameters, self.ranks.everyone)  # those of shared weights are summed already
        return self.optimizer.step(step, count, ids)

    def follow(self, step: int) -> None:
        """The copies move after a step."""
        algo = self.config.flow
        if self.average is not None and step % algo.ema_every == 0:
            self.average.follow(algo.ema_decay)
        if self.old is not None:
            self.old.follow(algo.nft_decay)

    def _save(self, step: int, stopping: bool) -> None:
        """The main rank saves: the weights that are evaluated for others to load, and all that a resumed run needs."""
        main = self.ranks.is_main
        tensors = {f"weight.{name}": x for name, x in self.denoiser.packed(main).items()}
        for copy, shadow in (("average", self.average), ("old", self.old)):
            if shadow is not None:
                with shadow.swapped_in():
                    tensors |= {f"{copy}.{name}": x for name, x in self.denoiser.packed(main).items()}
        optimizer = self._optimizer_state()
        if not main:
            return
        which = "average" if self.average is not None else "weight"
        saved = {name.removeprefix(f"{which}."): x for name, x in tensors.items() if name.startswith(f"{which}.")}

        def write_trainer(folder: Path) -> None:
            tensor_files.write(optimizer, folder / "optimizer")
            tensor_files.write(tensors, folder / "weights")

        self.checkpoints.save(step, partial(self.denoiser.save, weights=saved), write_trainer, {})

    def _optimizer_state(self) -> dict[str, Tensor]:
        from longrl.parallel.shard import whole

        return whole(pack_optimizer(self.optimizer.adamw), self.ranks.is_main)

    def _restore(self, latest: Checkpoint) -> None:
        read_optimizer(self.optimizer.adamw, latest.trainer_path / "optimizer")
        tensors = tensor_files.read(latest.trainer_path / "weights")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        self.denoiser.restore(part("weight."))
        for prefix, shadow in (("average.", self.average), ("old.", self.old)):
            if shadow is not None:
                shadow.restore(part(prefix))
        self.done = latest.step

    def last_model(self) -> Path:
        """Adapters, or a denoiser, as the stock pipeline loads them."""
        last = self.ranks.from_main(self.checkpoints.latest)
        assert last is not None
        return last.model_path


@torch.no_grad()
def held_out(training: FlowTraining, prompts: Sequence[MediaPrompt]) -> Iterator[Media]:
    """This rank's share of the held-out samples, with the weights that are evaluated: the same noise at every call."""
    config, ranks = training.config, training.ranks
    sampler, samples = training.sampler(config.held_out.steps, shared_start=False), config.held_out.samples
    no_window = range(len(sampler.schedule), len(sampler.schedule))
    mine = prompts[ranks.rank :: ranks.size]
    # ranks that share the weights make the same passes
    idle = -(-len(prompts) // ranks.size) - len(mine) if training.denoiser.sharded else 0
    for i, prompt in enumerate([*mine, *prompts[:idle]]):
        seeds = [seed_for(config.runtime.seed, "held out", prompt.id)]
        with training.evaluated():
            drawn = sampler(training.texts([prompt.text]), seeds, samples, no_window)
        if i < len(mine):
            yield training.media(prompt, drawn.latents)


def load_family(config: FlowConfig) -> MediaFamily:
    """Loads the pipeline that the run begins with.

    Raises:
        ValueError: there is no such pipeline, or it cannot make media of this size.
    """
    family = load_media_family(config.model, config.runtime.seed, config.prompts.max_tokens)
    family.require_size(config.media.height, config.media.width, config.media.frames)
    return family


def begin_run(config: FlowConfig, family: MediaFamily, ranks: Ranks = ALONE) -> MediaFamily:
    """Starts the run; a twin is warmed up and kept in the run directory, if the run wants it.

    Returns:
        What is trained: the family, or the twin from there.

    Raises:
        ValueError, OSError: as start_run.
    """
    folder = start_run(config, is_main=ranks.is_main) / BASE
    if not config.warm_up_steps:
        return family

    def make() -> None:
        if not folder.exists():
            from longrl.models.media_warm_up import warm_up

            size, negative = (config.media.height, config.media.width, config.media.frames), config.prompts.negative
            loss = warm_up(family, size, config.warm_up_steps, config.runtime.seed, negative or "")
            log.info("warmed up the twin: flow-matching loss %.3f after %d steps", loss, config.warm_up_steps)
            unfinished = folder.with_name(f".{BASE}.part")
            with quiet():
                family.pipe.save_pretrained(unfinished)
            unfinished.replace(folder)

    ranks.from_main(make)
    return load_media_family(config.model.at(folder), config.runtime.seed, config.prompts.max_tokens)
