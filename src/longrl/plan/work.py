"""What is planned: how much of which work, and how it is laid out. Plain numbers; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

STREAM_TOKENS = 8192
"""Tokens of one suffix micro-batch."""
BACKWARD_PATCHES = 4096
"""The vision tower is differentiated over at most so many patches at a time, or one temporal patch."""
HEAD_CHUNK = 2048
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One update: the cohorts of a step, all as large as the largest."""

    prompt_tokens: int
    group_size: int
    """Streams after one prefix: the rollouts of all its questions."""
    response_tokens: int
    """The longest response, with what a prompt has after the prefix."""
    prefixes: int = 1
    """In a step."""
    max_streams: int = 128
    """Decoded side by side."""
    trains: bool = True
    """False: responses are sampled, nothing is learned."""
    rollout: bool = True
    """False: the responses are given (SFT), or servers draw them."""
    updates: int = 1
    """Of the weights on the same rollouts; from the second on each computes the prompts again."""
    reference: bool = False
    """A KL term: the reference's log-probs are needed too."""
    evaluated_streams: int = 0
    """After one prefix, by the built-in engine, in evaluations while it trains; 0: there are none."""
    greedy_streams: int = 0
    """After one prefix, decoded beside the others and not trained (ReMax)."""
    shuffled_streams: int = 0
    """After the same video in another order, decoded and not trained (T-GRPO)."""
    waits: bool = False
    """Rewards come late, or advantages need the whole batch: the prompts are computed again for their update."""
    draws: int = 1
    """Times that a step's number of prompts is drawn, at most: with refills (DAPO)."""
    video_patches: int = 0
    """Patches that the tower reads, if the embeddings are not in the cache."""
    grid_patches: int = 0
    """Of them in a temporal patch, all of which attend to each other."""

    @property
    def suffix_tokens(self) -> int:
        return self.group_size * self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """vLLM in this process, on a GPU; how much it takes of a machine without one is not planned."""

    share: float
    """Of the device's memory, that it takes while it draws."""
    sleeps: bool
    """Then it gives that back, and its weights wait in host memory; else it takes it all the time."""
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How the work is done: what may be changed to make it fit. Only LoRA changes what is learned."""

    ulysses: int = 1
    """Ranks that deal the heads among themselves."""
    ring: int = 1
    """Groups of those ranks; each holds 1 / ring of the keys and values."""
    sharded: bool = False
    recompute: str = "none"
    """none | layer | keep_attention"""
    offload: bool = False
    """Layer inputs wait in host memory."""
    mlp_tile_tokens: int | None = None
    offload_reference: bool = False
    prompts_in_flight: int = 1
    """Of the built-in engine; others leave one prompt at a time to the update."""
    vllm: Vllm | None = None
    """What draws the rollouts; None: the built-in engine."""
    lora_rank: int = 0
    """0: all weights of the language model are trained."""
    lora_targets: tuple[str, ...] = ()
    language: bool = True
    """Whether the language model, or adapters in it, learn."""
    encoder_parameters: int = 0
    """Of the vision tower and the projector, those that are trained."""
    weight_bytes: int = 4
    """Of a stored weight, its gradient and its moments; adapters' are of 4 bytes at least."""
    compute_bytes: int = 4
    """Of an activation; where weights differ, passes have a copy of them."""

    @property
    def sp(self) -> int:
        return self.ulysses * self.ring

    @property
    def copies_weights(self) -> bool:
        """Passes gather or convert the weights, a layer at a time."""
        return self.sharded or self.weight_bytes != self.compute_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process, by phase of a step and part. The phase that needs most decides."""

    phases: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """At the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())
