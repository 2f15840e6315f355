"""The `rollout` section of a configuration: how responses are sampled, and by what. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from longrl.algo_config import AlgoConfig
from longrl.model_config import ModelConfig, Section


class ServerConfig(Section):
    """Rollout servers, which draw the rollouts of training instead of this process: docs/servers.md."""

    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of all servers, `http://node1:8100`. Groups of processes, and what each draws, are dealt out to them."""
    timeout_s: Annotated[float, Field(gt=0)] = 1200.0
    """How long the rollouts of a step may take; then the run stops, saved."""
    retry_s: Annotated[float, Field(ge=0)] = 120.0
    """How long a server that cannot be reached, or fails, is asked again; then the run stops, saved."""

    @field_validator("urls")
    @classmethod
    def _absolute(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            try:
                parts = urlsplit(url)
                if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                    raise ValueError("it names no server")
            except ValueError as error:  # a port that is no number, say
                raise ValueError(f"got {url!r}, expected http://HOST:PORT ({error})") from None
        return urls


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
    server: ServerConfig | None = None
    """Servers that draw them, with their own `engine`; null: this process does."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """Updates that the weights which draw rollouts may be behind the policy. 1: servers draw those of the next step
    while this one's update runs (one step off-policy)."""
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


def require_ahead(rollout: RolloutConfig, algo: AlgoConfig, model: ModelConfig, timeout_s: float) -> None:
    """Checks that rollouts can be drawn by servers, and a step ahead.

    Args:
        timeout_s: how long processes wait for each other.

    Raises:
        ValueError: something else in the configuration rules it out.
    """
    if (server := rollout.server) and server.timeout_s + server.retry_s >= timeout_s:
        raise ValueError(
            f"rollout.server.timeout_s and retry_s are {server.timeout_s:g} and {server.retry_s:g}, expected less "
            f"together than parallel.timeout_s ({timeout_s:g}), after which the other processes give the run up"
        )
    if not rollout.max_staleness:
        return
    if rollout.server is None:
        raise ValueError(
            "rollout.max_staleness is 1, but rollout.server is not set: in one process rollouts and updates take "
            "turns; set a server, or leave it at 0"
        )
    for wrong, why in (
        (
            algo.correction == "off",
            "algo.correction is off: older weights than the policy's need it; set it to truncate or mask",
        ),
        (algo.max_refills > 0, "algo.max_refills draws rollouts that the update waits for; set one of them to 0"),
        (
            algo.shuffled_rollouts > 0,
            "algo.shuffled_rollouts draws rollouts that the update waits for; set one of them to 0",
        ),
        (
            model.trains_encoder,
            f"model.train is {list(model.train)}: the embeddings of the next step would be the old encoder's; train "
            "the language model alone",
        ),
    ):
        if wrong:
            raise ValueError(f"rollout.max_staleness is 1, but {why}")
