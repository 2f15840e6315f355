"""The `algo` section of a configuration, and the presets that `algorithm` names. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from longrl.algo.advantages import ADVANTAGES, require_group_size
from longrl.model_config import Section

_GRPO: dict[str, Any] = {
    "advantage": "grpo",
    "loss": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "normalise": "sequence",
    "kl": "k3",
    "kl_in": "loss",
    "kl_coef": 0.04,
}
_SUM_OF_TOKENS: dict[str, Any] = {**_GRPO, "normalise": "constant"}

LOSS_NAMES = ("cispo", "clip", "gspo")
"""What is built in: algo/losses.py, which needs torch."""

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO,
    "dr_grpo": {**_SUM_OF_TOKENS, "advantage": "dr_grpo", "kl": "off"},
    "rloo": {**_SUM_OF_TOKENS, "advantage": "rloo", "kl": "k1", "kl_in": "reward", "kl_coef": 0.03},
    "reinforce": {**_SUM_OF_TOKENS, "advantage": "reinforce", "kl": "off"},
    "remax": {**_SUM_OF_TOKENS, "advantage": "remax", "kl": "k1", "kl_in": "reward", "kl_coef": 0.03},
    "reinforce_pp": {
        **_GRPO,
        "advantage": "reinforce_pp",
        "normalise": "token",
        "kl": "k1",
        "kl_in": "reward",
        "kl_coef": 0.01,
    },
    "reinforce_pp_baseline": {
        **_GRPO,
        "advantage": "reinforce_pp_baseline",
        "normalise": "token",
        "kl": "k2",
        "kl_coef": 0.01,
    },
    "dapo": {
        **_GRPO,
        "clip_high": 0.28,
        "normalise": "token",
        "kl": "off",
        "max_refills": 4,
        "overlong_buffer": 0.2,
    },
    "gspo": {**_GRPO, "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "kl": "off"},
    "cispo": {**_GRPO, "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "normalise": "token", "kl": "off"},
    "t_grpo": {**_GRPO, "shuffled_rollouts": 4, "temporal_bonus": 0.3},
}
"""What each `algorithm` sets in `algo`; docs/papers.md says where the numbers are from."""


class AlgoConfig(Section):
    advantage: str = "grpo"
    """A name in algo/advantages.py or `package.module:attr`."""
    loss: str = "clip"
    """A name in algo/losses.py or `package.module:attr`."""
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    """The ratio of new to old probability is clipped below 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """And above 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Of loss `clip`: tokens of bad responses whose ratio is above this get no gradient; null: they do."""
    normalise: Literal["token", "sequence", "constant"] = "token"
    """What the summed loss is divided by: the step's trained tokens; its sequences (each averaged first); or its
    sequences times rollout.max_new_tokens, so that a token counts the same whatever else is in the step."""
    updates_per_batch: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on the same rollouts, each over all of them; from the second on ratios are clipped."""
    kl: Literal["off", "k1", "k2", "k3"] = "off"
    """The estimate of how far the policy has left the reference (the initial model)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Added to the loss of each token, or subtracted, summed over the response, from its reward."""
    kl_coef: Annotated[float, Field(ge=0)] = 1e-2
    """What the estimate is multiplied by."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """A bonus for each token's entropy."""
    overlong_buffer: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In the last such part of rollout.max_new_tokens the reward falls, linearly, by 1; null: it does not."""
    max_refills: Annotated[int, Field(ge=0)] = 0
    """Dynamic sampling: groups whose rewards are all equal are dropped, and other examples drawn in their place, so
    many times a step at most; 0: they stay, without a gradient of their own."""
    shuffled_rollouts: Annotated[int, Field(ge=0)] = 0
    """T-GRPO: rollouts of each prompt with its video's frames shuffled, which are compared with and not trained."""
    temporal_bonus: Annotated[float, Field(ge=0)] = 0.3
    """Added to right responses where more of them are right in order than shuffled."""
    accuracy: str = "answer"
    """The reward that says whether a response is right: where it is above 0.5."""
    correction: Literal["off", "truncate", "mask"] = "off"
    """Where the engine's log-probs are not the trainer's: weigh tokens by the ratio of probabilities, cut at
    correction_high, or 0 where it is outside correction_low to correction_high. Then raise max_logprob_diff."""
    correction_level: Literal["token", "sequence"] = "token"
    """The ratio of each token, or of the whole response."""
    correction_low: Annotated[float, Field(ge=0)] = 0.5
    correction_high: Annotated[float, Field(gt=0)] = 2.0
    offload_reference: bool = False
    """Keep the reference in host memory and bring it to the GPU a layer at a time."""
    max_logprob_diff: Annotated[float, Field(gt=0)] = 1e-2
    """The run stops when engine and trainer log-probs differ by more."""

    @property
    def kl_in_loss(self) -> bool:
        return self.kl != "off" and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl != "off" and self.kl_in == "reward"

    @model_validator(mode="after")
    def _has_a_gradient(self) -> AlgoConfig:
        if self.kl == "k1" and self.kl_in == "loss":
            raise ValueError(
                "kl is k1 in the loss, where its expected gradient is zero; set kl_in to reward, or kl to k2 or k3"
            )
        if self.correction_low >= self.correction_high:
            raise ValueError(
                f"correction_low is {self.correction_low:g}, expected less than correction_high, "
                f"{self.correction_high:g}"
            )
        return self


class AlgorithmConfig(Section):
    """What a stage of reinforcement learning has."""

    algorithm: (
        Literal[
            "grpo",
            "dr_grpo",
            "rloo",
            "reinforce",
            "remax",
            "reinforce_pp",
            "reinforce_pp_baseline",
            "dapo",
            "gspo",
            "cispo",
            "t_grpo",
        ]
        | None
    ) = None
    """A preset: the settings it stands for are written into `algo`, unless they are given there."""
    algo: Annotated[AlgoConfig, Field(validate_default=True)] = AlgoConfig()

    @field_validator("algo", mode="before")
    @classmethod
    def _expand(cls, algo: Any, info: ValidationInfo) -> Any:
        """The preset's settings, under those that are given."""
        name = info.data.get("algorithm")  # not there if it was not valid itself
        given = algo.model_dump(exclude_unset=True) if isinstance(algo, AlgoConfig) else algo
        return {**PRESETS[name], **given} if name and isinstance(given, dict) else algo


def require_answerable(algo: AlgoConfig, group_size: int, rewards: dict[str, float]) -> None:
    """Checks that an algorithm gets the rollouts and rewards that it needs.

    Raises:
        ValueError: too few rollouts to compare, or no reward that says what is right.
    """
    if algo.advantage in ADVANTAGES:
        require_group_size(algo.advantage, ADVANTAGES[algo.advantage], group_size)
    if algo.shuffled_rollouts and algo.accuracy not in rewards:
        raise ValueError(
            f"algo.accuracy is {algo.accuracy!r}, but the rewards are {', '.join(rewards)}; algo.shuffled_rollouts "
            "needs one that says which responses are right"
        )
