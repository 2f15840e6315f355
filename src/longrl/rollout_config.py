"""The `rollout` section of a configuration: how responses are sampled, and by which engine. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longrl.model_config import Section


class VllmConfig(Section):
    """What vLLM is started with, where it draws the rollouts (docs/engines.md)."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of its weights, keys and values; null: what the policy computes in."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt with its response; null: data.max_prompt_tokens and max_new_tokens, or, where the former is null
    too, what its memory holds."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of each GPU's memory that it takes, weights included; the trainer has the rest."""
    sleep: bool = True
    """On a GPU give that memory back while the policy is updated."""
    enforce_eager: bool = False
    """On a GPU start faster and decode slower, without CUDA graphs."""


class RolloutConfig(Section):
    engine: Literal["native", "vllm", "auto"] = "native"
    """What draws them in training: the built-in engine, vLLM (`pip install 'longrl[vllm]'`), or whichever a rule names
    (docs/engines.md)."""
    vllm: VllmConfig = VllmConfig()
    group_size: Annotated[int, Field(ge=1)] = 8
    """Rollouts of each prompt."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest response; what is longer ends there, with finish reason `length`."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: always the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Draw from so many likeliest tokens; null: from all. Like top_p not for training, which scores all tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens (of top_k) that together have this probability."""
    max_streams: Annotated[int, Field(ge=1)] = 128
    """Rollouts decoded side by side, rounded to whole groups; more questions take turns."""
    prompts_in_flight: Annotated[int, Field(ge=1)] = 1
    """Videos (or prompts without one) whose keys and values are in memory at once, to be decoded side by side."""
