"""What a run of image or video generation is: kind `flow`. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from longrl.config import CheckpointConfig, LoopConfig, OptimConfig, RuntimeConfig
from longrl.model_config import ModelConfig, Section
from longrl.scorers_config import ScorersConfig

PRESETS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"kl_coef": 0.04},
    "flow_grpo_fast": {"window": 2, "shared_start": True, "noise_level": 0.8, "clip": 1e-5},
    "mix_grpo": {"window": 4 / 25, "window_moves": "slide", "shared_start": True, "advantage_std": "group"},
    "dance_grpo": {
        "noise_schedule": "constant",
        "noise_level": 0.3,
        "shared_start": True,
        "advantage_std": "group",
        "fraction": 0.6,
    },
    "diffusion_nft": {"method": "nft", "kl_coef": 1e-4},
}
"""Name -> the keys of `flow` that differ from their defaults. Papers: docs/flow.md."""


class PromptsConfig(Section):
    train: str
    """A file of prompts: .txt, one a line; or .jsonl, a mapping a line with `prompt` (GenEval's metadata as it is)."""
    eval: str | None = None
    """Prompts that samples are shown and scored of, before training and after; null: those of `train`."""
    negative: str | None = None
    """What guidance leads away from; "" is a prompt too. Needed where sampling.guidance is above 1."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Of the T5 encoder, to which shorter prompts are padded; null: the pipeline's own."""
    too_long: Literal["raise", "skip", "cut"] = "raise"
    """A prompt that one of the text encoders cannot take whole. Skips and cuts are counted and named."""


class MediaConfig(Section):
    """What is made."""

    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    frames: Annotated[int, Field(ge=1)] = 1
    """1: images."""
    fps: Annotated[float, Field(gt=0)] = 16.0
    """Of videos."""


Sides = Mapping[str, tuple[int, int | None]]
"""height and width -> what it is a multiple of, and the most of it; None: no most."""


def require_multiples(height: int, width: int, frames: int, sides: Sides, temporal: int | None) -> None:
    """
    Args:
        temporal: what frames after the first are a multiple of; None: the model makes images.

    Raises:
        ValueError: media of this size cannot be made.
    """
    for side, value in (("height", height), ("width", width)):
        unit, largest = sides[side]
        if value < 1 or value % unit or (largest and value > largest):
            near, most = max(round(value / unit), 1) * unit, f" up to {largest}" if largest else ""
            raise ValueError(
                f"media.{side} is {value}, expected a multiple of {unit}{most}, as the model's autoencoder and patches "
                f"need; use {min(near, largest or near)}"
            )
    if temporal is None and frames != 1:
        raise ValueError(f"media.frames is {frames}, but the model makes images; set it to 1")
    if temporal is not None and (frames < 1 or (frames - 1) % temporal):
        raise ValueError(
            f"media.frames is {frames}, expected 1 + a multiple of {temporal}, as the model's autoencoder needs; use "
            f"{max(round((frames - 1) / temporal), 0) * temporal + 1}"
        )


class SamplingConfig(Section):
    """How media are made, while training; `held_out` has its own number of steps."""

    steps: Annotated[int, Field(ge=1)] = 10
    guidance: Annotated[float, Field(ge=0)] = 4.5
    """Of classifier-free guidance; 1 or less: none."""
    detach_negative: bool = False
    """An approximation: no gradient through the negative prompt's half of guidance, which saves its memory."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Of the schedule of sigmas; null: the pipeline's."""
    max_rows: Annotated[int, Field(ge=1)] = 16
    """Samples in the denoiser at a time, in sampling and in training."""


class FlowAlgoConfig(Section):
    """How it learns."""

    preset: Literal["flow_grpo", "flow_grpo_fast", "mix_grpo", "dance_grpo", "diffusion_nft"] | None = None
    """Sets what else is here and not set: docs/flow.md."""
    method: Literal["policy", "nft"] = "policy"
    """policy: gradients of the stochastic steps' log-probs. nft: DiffusionNFT, which needs samples alone."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples of each prompt."""
    noise_schedule: Literal["flow", "constant"] = "flow"
    """Of stochastic steps: noise_level * sqrt(sigma / (1 - sigma)), or noise_level."""
    noise_level: Annotated[float, Field(gt=0)] = 0.7
    window: Annotated[float, Field(gt=0)] | None = None
    """So many steps of each sampling are stochastic, and trained; below 1: that share of sampling.steps, rounded, at
    least one; null: all, of which the last is not trained."""
    window_moves: Literal["random", "slide"] = "random"
    """Where the window is: drawn anew each step, or moved on by one every window_every steps."""
    window_every: Annotated[int, Field(ge=1)] = 25
    window_range: tuple[int, int] | None = None
    """First step that the window may hold, and the first that it may not; null: all steps."""
    shared_start: bool = False
    """The samples of a group begin with one noise; what is deterministic before the window is computed once for all."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the stochastic steps, drawn anew each step; the others are sampled but not trained."""
    advantage_std: Literal["group", "batch"] = "batch"
    """Rewards less their group's mean are divided by the standard deviation of the group, or of all of the step."""
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    clip: Annotated[float, Field(gt=0)] = 1e-4
    """The ratio of new to old density (averaged over dimensions) is clipped at 1 +- clip."""
    updates_per_batch: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on the same samples, each over all of them."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from the model as it was; 0: off."""
    max_logprob_diff: Annotated[float, Field(gt=0)] | None = None
    """The run stops when the first update's log-probs differ more from those of sampling; null: by more than `clip`,
    as samples would be clipped for rounding alone."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Evaluate and save an exponential moving average of the weights; 0: the weights."""
    ema_every: Annotated[int, Field(ge=1)] = 1
    """Steps between its updates."""
    nft_beta: Annotated[float, Field(gt=0)] = 1.0
    """nft: how far the mirrored models are from the one that sampled."""
    nft_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """nft: the model that samples follows the trained one as an average with this decay."""

    def window_size(self, steps: int) -> int:
        """In steps, of so many sampling steps."""
        assert self.window is not None
        return int(self.window) if self.window >= 1 else max(round(self.window * steps), 1)

    def window_starts(self, steps: int) -> range:
        """Where the window can begin, of so many sampling steps."""
        first, end = self.window_range or (0, steps)
        # a window of the last step alone would train nothing
        return range(first, min(end, steps - 1) - self.window_size(steps) + 1)

    @field_validator("window")
    @classmethod
    def _whole_or_share(cls, window: float | None) -> float | None:
        if window is not None and window > 1 and window % 1:
            raise ValueError(f"got {window:g}, expected a whole number of steps, or a share of them below 1")
        return window

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("window_range"), list):  # strict reading wants a tuple of what is no longer JSON
            given = given | {"window_range": tuple(given["window_range"])}
        return PRESETS.get(given.get("preset") or "", {}) | given

    @model_validator(mode="after")
    def _window_fits(self) -> FlowAlgoConfig:
        if self.window_range is not None:
            first, end = self.window_range
            least = int(max(self.window or 1, 1))
            if first < 0 or end - first < least:
                raise ValueError(
                    f"window_range is [{first}, {end}], expected room for the window of {least}, from 0 on"
                )
        return self


class HeldOutConfig(Section):
    """Samples from seeds that training does not use, before training and after it, the same noise both times."""

    samples: Annotated[int, Field(ge=1)] = 4
    """Of each prompt."""
    steps: Annotated[int, Field(ge=1)] = 40
    """Deterministic sampling steps."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: only before the first step and after the last."""
    shown: Annotated[int, Field(ge=1)] = 8
    """Prompts in the report."""


class ProcessesConfig(Section):
    """The processes that torchrun starts: each takes prompts of its own."""

    shard: bool = False
    """Keep a share of the denoiser's weights on each (FSDP2); needs prompts_per_step to be a multiple of them."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a process waits for the others before it gives the run up."""


class FlowConfig(LoopConfig):
    """Reinforcement learning of an image or video generator."""

    kind: Literal["flow"] = "flow"
    run_dir: str
    """Where the run writes; a directory that holds the same run is taken up again."""
    model: ModelConfig
    """`path`: a diffusers folder, or tiny:sd3, tiny:wan."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 0
    """Of the tiny twins: so many supervised steps on flat colours, partly wrong ones, before anything else."""
    prompts: PromptsConfig
    media: MediaConfig
    sampling: SamplingConfig = SamplingConfig()
    flow: FlowAlgoConfig = FlowAlgoConfig()
    rewards: dict[str, float]
    """Reward name -> weight. Names: flow.md; `package.module:attr` or `file.py:attr` of your own, which
    runs in the run's process."""
    scorers: ScorersConfig = ScorersConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    gradient_checkpointing: bool = False
    """Compute the denoiser's layers again in the backward instead of keeping their activations."""
    optim: OptimConfig = OptimConfig(lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4)
    checkpoint: CheckpointConfig = CheckpointConfig()
    processes: ProcessesConfig = ProcessesConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @field_validator("model")
    @classmethod
    def _denoiser(cls, model: ModelConfig) -> ModelConfig:
        if model.train != ("language",) or model.compute_dtype:
            raise ValueError("train and compute_dtype are of language models; leave them out")
        if model.dtype == "bfloat16" and not model.lora:
            raise ValueError(
                "model.dtype is bfloat16, which has no room for small updates; train in float32, or adapters (lora)"
            )
        return model

    @model_validator(mode="after")
    def _goes_together(self) -> FlowConfig:
        steps, flow = self.sampling.steps, self.flow
        self.scorers.require_sections(self.rewards)
        if self.sampling.guidance > 1 and self.prompts.negative is None:
            raise ValueError(
                f"sampling.guidance is {self.sampling.guidance:g}, but prompts.negative is not set: write what to lead "
                'away from (negative: "" is usual), or set guidance to 1'
            )
        if self.warm_up_steps and not self.model.path.startswith("tiny:"):
            raise ValueError(f"warm_up_steps is of tiny twins, but model.path is {self.model.path}; leave it out")
        if flow.method == "nft":
            if self.sampling.guidance > 1:
                raise ValueError("flow.method nft learns without guidance; set sampling.guidance to 1")
            return self
        first, end = flow.window_range or (0, steps)
        if end > steps or (flow.window and not flow.window_starts(steps)):
            size = flow.window_size(steps) if flow.window else "all"
            raise ValueError(
                f"flow.window is {size} steps within {first} to {end}, but sampling.steps is {steps}, of which the "
                "last is not trained; use more steps or a smaller window"
            )
        if first == steps - 1:
            raise ValueError("the only stochastic step is the last, which is not trained; use more sampling.steps")
        return self
