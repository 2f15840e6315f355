"""What a run is: frozen pydantic models, one YAML file each. Importing this module does not import torch.

`kind` says which program a file is for; unknown keys are refused. Files, overrides and messages: see config_files.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from longrl.algo_config import AlgoConfig as AlgoConfig
from longrl.algo_config import AlgorithmConfig, require_answerable
from longrl.judge_config import JudgeConfig
from longrl.model_config import LoraConfig as LoraConfig
from longrl.model_config import ModelConfig, Section
from longrl.rollout_config import RolloutConfig as RolloutConfig
from longrl.rollout_config import VllmConfig as VllmConfig
from longrl.rollout_config import require_ahead
from longrl.scoring_config import REWARD_PRESETS, Weights
from longrl.scoring_config import ScoringConfig as ScoringConfig


class VideoConfig(Section):
    """How clips are sampled where a data row does not say. Set one of fps and num_frames."""

    fps: Annotated[float, Field(gt=0, le=120)] | None = 1.0
    num_frames: Annotated[int, Field(ge=1, le=8192)] | None = None
    max_pixels: Annotated[int, Field(ge=784)] | None = None
    """Largest height x width of a frame handed to the encoder; null: the model's own limit."""
    with_audio: bool = False
    """Hear each video's own sound too, with a model that hears."""

    @model_validator(mode="after")
    def _one_of(self) -> VideoConfig:
        if (self.fps is None) == (self.num_frames is None):
            raise ValueError("set exactly one of fps and num_frames; write `fps: null` to use num_frames")
        return self


class DataConfig(Section):
    train: str | None = None
    """Rows of examples: a JSONL, JSON or parquet file, or a dataset of the Hugging Face hub (NAME@SPLIT)."""
    eval: str | None = None
    """Likewise, of questions held out from training."""
    format: Literal["auto", "own", "longvideo_reason", "video_r1", "easyr1", "messages", "trl", "verl"] = "auto"
    """Of the rows (docs/data.md); auto: by the columns of the first."""
    kind: Literal["choice", "open", "math", "number", "ocr", "free_text", "regression", "grounding"] | None = None
    """Of questions whose rows do not say; null: choice where options are lettered, else open."""
    media_dir: str | None = None
    """Where relative media paths start; null: in the folder of the file."""
    system_prompt: str | None = None
    """Put before every conversation."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an unusable media file does. Skips are counted and named."""
    max_skips: Annotated[int, Field(ge=0)] = 10
    share_media: Annotated[int, Field(ge=1)] = 1
    """Examples about the same media that stay together in a step, and so share its prefix."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """A longer prompt is unusable, as an unusable media file is, and its video is not decoded; null: any will do."""


class CacheConfig(Section):
    dir: str = "runs/cache"
    """Where video embeddings are kept; runs share it."""
    max_gib: Annotated[float, Field(gt=0)] = 100.0
    """The least recently used entries go when the cache grows larger."""


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the schedule ends, as a part of lr."""


class EvalConfig(Section):
    samples: Annotated[int, Field(ge=1)] = 4
    """Answers sampled for each question."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """This and top_k: as in `rollout`."""


class CheckpointConfig(Section):
    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """The newest so many stay on disk."""


class RuntimeConfig(Section):
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads; null: all."""
    tensorboard: bool = True


class ParallelConfig(Section):
    """How the processes of a run that torchrun starts share its work. One process needs none of it."""

    sp: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Processes that share each prompt, its tokens, keys and values; groups of so many take different prompts. auto:
    chosen for each prompt by its length, with the ring."""
    ring: Annotated[int, Field(ge=1)] = 1
    """Parts that the keys and values of a prompt are split into, beside the split of heads over sp / ring processes."""
    shard: bool = False
    """Keep 1/sp of the weights, gradients and optimizer state on each process that shares a prompt (FSDP2)."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a process waits for the others before it gives the run up."""

    @model_validator(mode="after")
    def _whole_rings(self) -> ParallelConfig:
        if self.sp == "auto":
            if self.ring > 1:
                raise ValueError(f"ring is {self.ring}, but sp is auto, which chooses the ring too; leave ring out")
        elif self.sp % self.ring:
            raise ValueError(
                f"ring is {self.ring}, but sp is {self.sp}, expected a multiple of it: {self.sp} = "
                f"{self.sp // self.ring} x {self.ring} + {self.sp % self.ring}; choose another sp or ring"
            )
        return self

    @model_validator(mode="after")
    def _something_to_shard_over(self) -> ParallelConfig:
        if self.shard and self.sp == "auto":
            raise ValueError("shard is true, but sp is auto: weights are divided among a fixed number of processes")
        if self.shard and self.sp == 1:
            raise ValueError("shard is true, but sp is 1: weights are divided among sp processes; set sp to 2 or more")
        return self


class MemoryConfig(Section):
    """What is kept of a prompt's pass for its backward, and where. All give the same gradients."""

    recompute: Literal["none", "layer", "keep_attention"] = "none"
    """Compute layers again in the backward instead of keeping their activations; `keep_attention` keeps what each
    attention gave, which is most of the work where prompts are long."""
    offload: bool = False
    """Keep the inputs of recomputed layers in host memory."""
    mlp_tile_tokens: Annotated[int, Field(ge=1)] | None = None
    """Run each layer's MLP over so many tokens at a time; null: all at once."""

    @model_validator(mode="after")
    def _inputs_to_offload(self) -> MemoryConfig:
        if self.offload and self.recompute == "none":
            raise ValueError("offload is true, but recompute is none, so there are no inputs of layers to offload")
        return self


ALL_KEPT = MemoryConfig()


class RunConfig(Section):
    """What every run has."""

    run_dir: str
    """Where the run writes; a directory that holds the same run is taken up again."""
    model: ModelConfig
    """The model to begin with, or to evaluate."""
    video: VideoConfig = VideoConfig()
    cache: CacheConfig = CacheConfig()
    runtime: RuntimeConfig = RuntimeConfig()


class DataRunConfig(RunConfig):
    """What every run on given data has."""

    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()


class AnswerConfig(Section):
    """What a run that samples responses has."""

    rollout: RolloutConfig = RolloutConfig()
    """Sampling. Evaluation takes the number of answers, temperature, top_k and top_p from `eval`."""
    rewards: Weights = Field(default=REWARD_PRESETS["r1v"])
    """Reward name -> weight, or the name of a preset. A name in rewards/compose.py, `package.module:attr` or
    `file.py:attr`, which run in worker processes (scoring.in_process)."""
    scoring: ScoringConfig = ScoringConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _servers_train(self) -> AnswerConfig:
        if self.rollout.server and not isinstance(self, RlConfig):
            raise ValueError("rollout.server is set, but servers draw the rollouts of `longrl rl` alone; leave it out")
        return self

    @field_validator("rollout")
    @classmethod
    def _groups_differ(cls, rollout: RolloutConfig) -> RolloutConfig:
        if rollout.temperature == 0:
            raise ValueError("temperature is 0, so all rollouts of a group would be the same; use 1.0")
        for name, value, off in (("top_k", rollout.top_k, None), ("top_p", rollout.top_p, 1.0)):
            if value != off:
                raise ValueError(
                    f"{name} is {value}, but training must draw from the distribution of all tokens, as it scores "
                    f"under that; remove it, or set eval.{name} for evaluation"
                )
        return rollout


class JudgedConfig(AnswerConfig, DataRunConfig):
    """What a run has whose responses models may judge."""

    judge: JudgeConfig | None = None
    """What the reward `judge` asks; null: there is no such reward."""

    @model_validator(mode="after")
    def _judge_is_used(self) -> JudgedConfig:
        if (self.judge is None) == ("judge" in {*self.rewards, *self.scoring.by_kind.values()}):
            have, lack = ("judge", "rewards.judge") if self.judge else ("rewards.judge", "judge")
            raise ValueError(f"{have} is set, but {lack} is not; add it, or remove {have}")
        if self.judge and self.judge.limits.give_up_s >= self.parallel.timeout_s:
            raise ValueError(
                f"judge.limits.give_up_s is {self.judge.limits.give_up_s:g}, expected less than parallel.timeout_s "
                f"({self.parallel.timeout_s:g}), after which the other processes give the run up"
            )
        return self


class LoopConfig(Section):
    """What a training loop has."""

    steps: Annotated[int, Field(ge=1)]
    prompts_per_step: Annotated[int, Field(ge=1)] = 8
    """Examples a step. Those that share a video share its prefix."""
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("optim")
    @classmethod
    def _warm_up_ends(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        steps = info.data.get("steps")  # not there if it was not valid itself
        if steps is not None and optim.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps is {optim.warmup_steps}, expected fewer than the {steps} steps of the run; set "
                f"optim.warmup_steps to at most {steps - 1}, or steps to more"
            )
        return optim


class TrainConfig(LoopConfig, DataRunConfig):
    """What every training run has."""

    @field_validator("model")
    @classmethod
    def _can_be_updated(cls, model: ModelConfig) -> ModelConfig:
        # a step of 1e-6 is lost in the rounding of a bfloat16 weight
        if model.dtype == "bfloat16" and not model.lora:
            raise ValueError(
                "model.dtype is bfloat16, which has no room for small updates; train in float32, with compute_dtype "
                "bfloat16 perhaps, or train adapters (model.lora)"
            )
        return model


class SftConfig(TrainConfig):
    kind: Literal["sft"] = "sft"


class RlConfig(AlgorithmConfig, JudgedConfig, TrainConfig):
    kind: Literal["rl"] = "rl"
    eval_every_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate `data.eval` every so many steps and after the last; 0: never."""

    @model_validator(mode="after")
    def _answerable(self) -> RlConfig:
        require_answerable(self.algo, self.rollout.group_size, self.rewards)
        require_ahead(self.rollout, self.algo, self.model, self.parallel.timeout_s)
        return self

    @model_validator(mode="after")
    def _embeddings_fit(self) -> RlConfig:
        if self.algo.offload_reference and (self.algo.kl == "off" or self.model.lora):
            why = "algo.kl is off" if self.algo.kl == "off" else "with model.lora it is the policy without its adapters"
            raise ValueError(f"algo.offload_reference is true, but there is no second model: {why}; set it to false")
        if self.model.trains_encoder and self.algo.kl != "off":
            raise ValueError(
                f"algo.kl is {self.algo.kl}, but model.train is {list(self.model.train)}: the reference would need "
                "embeddings of its own; set algo.kl to off, or train the language model alone"
            )
        if self.model.trains_encoder and self.algo.updates_per_batch > 1:
            raise ValueError(
                f"algo.updates_per_batch is {self.algo.updates_per_batch}, model.train {list(self.model.train)}: "
                "but videos are embedded once a step; set it to 1, or train the language model alone"
            )
        return self


class EvalRunConfig(JudgedConfig):
    kind: Literal["eval"] = "eval"
    control: Literal["without_media", "shuffled"] | None = None
    """Take the media away, or shuffle videos in time: what a model knows without looking, or without watching."""

    @field_validator("model")
    @classmethod
    def _as_it_is(cls, model: ModelConfig) -> ModelConfig:
        if not model.is_as_it_is:
            raise ValueError("lora and train say how a model is trained; leave them out (path may hold adapters)")
        return model


class SyntheticConfig(Section):
    """Synthetic long videos, rendered from a seed: see data/synthetic."""

    dir: str
    train_videos: Annotated[int, Field(ge=1)] = 12
    test_videos: Annotated[int, Field(ge=1)] = 12
    seconds: Annotated[float, Field(ge=10)] = 3600.0
    """Shortest video; each is up to 5% longer."""
    fps: Annotated[float, Field(ge=1, le=60)] = 2.0
    width: Annotated[int, Field(ge=64)] = 160
    height: Annotated[int, Field(ge=64)] = 120
    train_questions: Annotated[int, Field(ge=1)] = 40
    """Questions about each training video."""
    test_questions: Annotated[int, Field(ge=1)] = 24
    audio: bool = False
    seed: int = 0


class StageConfig(LoopConfig):
    """One of the quickstart's two training stages; what the stages have in common stands beside them."""

    share_media: Annotated[int, Field(ge=1)] = 1
    """As `data.share_media`."""


class RlStageConfig(AlgorithmConfig, StageConfig):
    pass


class QuickstartConfig(AnswerConfig, RunConfig):
    """Every stage from rendering videos to the report; the stages' own configurations are made from this one."""

    kind: Literal["quickstart"] = "quickstart"
    run_dir: str = "runs/quickstart"
    videos: SyntheticConfig
    sft: StageConfig
    rl: RlStageConfig

    @model_validator(mode="after")
    def _answerable(self) -> QuickstartConfig:
        require_answerable(self.rl.algo, self.rollout.group_size, self.rewards)
        if "judge" in {*self.rewards, *self.scoring.by_kind.values()}:
            raise ValueError(
                "the quickstart asks no judge, but its rewards name judge; leave it out, or use `longrl rl`"
            )
        return self

    @field_validator("model")
    @classmethod
    def _weights_go_on(cls, model: ModelConfig) -> ModelConfig:
        if not model.is_as_it_is:
            raise ValueError("the quickstart trains the language model's weights; leave lora and train out")
        return model


class WarmStartConfig(Section):
    """The recipe of the shipped warm start: see warm_start.py."""

    kind: Literal["warm_start"] = "warm_start"
    out: str
    """The Hugging Face folder to write."""
    model: str = "tiny:qwen2_5_vl"
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] = 2
    stories: Annotated[int, Field(ge=1)] = 3000
    read_steps: Annotated[int, Field(ge=0)] = 2000
    read_rows: Annotated[int, Field(ge=8)] = 24
    """Rows of text in a step of the first stage. Steps of text in the others have half of them."""
    look_steps: Annotated[int, Field(ge=0)] = 1350
    look_windows: Annotated[int, Field(ge=1)] = 12
    look_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Of the first two stages."""
    mastered: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of right responses at which a stage goes on."""
    watch_steps: Annotated[int, Field(ge=0)] = 1400
    watch_stories: Annotated[int, Field(ge=1)] = 8
    watch_questions: Annotated[int, Field(ge=1)] = 6
    watch_lr: Annotated[float, Field(gt=0)] = 7e-4
    dense_fraction: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of stories sampled at one token every two seconds."""
    log_every: Annotated[int, Field(ge=1)] = 50


AnyConfig = Annotated[
    SftConfig | RlConfig | EvalRunConfig | QuickstartConfig | WarmStartConfig, Field(discriminator="kind")
]
