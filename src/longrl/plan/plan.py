"""The plan of a run: its work and layout out of the configuration, memory, time, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from longrl.algo.advantages import ADVANTAGES
from longrl.config import DataRunConfig, EvalRunConfig, RlConfig, SftConfig, TrainConfig
from longrl.parallel.layout import require_heads, require_world
from longrl.plan.choose import choose_layout, fastest_change, fits, largest_prompt, layouts, smallest_change
from longrl.plan.cost import Cost, encode_seconds, plan_cost
from longrl.plan.devices import CORE, GPUS, Device, find_device, host_share_bytes
from longrl.plan.memory import plan_memory
from longrl.plan.prompt import TEXT_TOKENS, PromptSize, prompt_size
from longrl.plan.shapes import ModelShape, shape_of
from longrl.plan.work import Memory, Setup, Vllm, Work

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
SFT_RESPONSE_TOKENS = 1024
"""Of a demonstration, which no key limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `longrl check` prints."""

    shape: ModelShape
    prompt: PromptSize
    work: Work
    setup: Setup
    device: Device
    processes: int
    memory: Memory
    cost: Cost
    encode_s: float
    """Of one prompt's video, once."""
    fits: bool
    change: tuple[dict[str, str], Memory] | None
    """Keys that would make it fit, and the memory it then takes."""
    faster: tuple[dict[str, str], Memory, Cost] | None
    """Keys that would make a step that fits faster, with its memory and time."""


def make_plan(config: DataRunConfig, device: str, processes: int) -> Plan:
    """Plans a step (of evaluation: one video).

    Args:
        config: `rollout.engine: auto` is planned as the built-in one; see rollout/engine.py, settle_engine.
        device: a name in devices.py.
        processes: of the run.

    Raises:
        ValueError: the model's sizes cannot be read; processes, heads and tokens do not go together.
    """
    shape = _shape(config)
    setup, prompt, on = setup_of(config, shape), prompt_size(config, shape), find_device(device, processes)
    work = work_of(config, prompt)
    if config.parallel.sp == "auto":
        ulysses, ring = choose_layout(shape, work, setup, on, processes) or layouts(shape, processes)[-1]
        setup = replace(setup, ulysses=ulysses, ring=ring)
    require_world(processes, setup.sp)
    require_heads(shape.kv_heads, setup.sp, setup.ring)
    if prompt.tokens < setup.sp:
        raise ValueError(
            f"a prompt of {prompt.tokens} tokens cannot be split over {setup.sp} sequence-parallel ranks: at least one "
            f"each, so {setup.sp - prompt.tokens} too few"
        )
    memory, good = plan_memory(shape, work, setup, on), fits(shape, work, setup, on)
    change = faster = None
    if good and (better := fastest_change(shape, work, setup, on, processes)) is not None:
        keys, other = better
        cost = plan_cost(shape, work, other, on, processes // other.sp)
        faster = keys, plan_memory(shape, work, other, on), cost
    if not good and (found := smallest_change(shape, work, setup, on, processes)) is not None:
        keys, other_work, other = found
        change = keys, plan_memory(shape, other_work, other, on)
    return Plan(
        shape=shape,
        prompt=prompt,
        work=work,
        setup=setup,
        device=on,
        processes=processes,
        memory=memory,
        cost=plan_cost(shape, work, setup, on, processes // setup.sp),
        encode_s=encode_seconds(shape, work, setup, on),
        fits=good,
        change=change,
        faster=faster,
    )


def max_prompt_tokens(
    config: DataRunConfig, processes: int, gpu_bytes: int | None, host_bytes: int | None = None
) -> int | None:
    """The longest prompt that this configuration has room for: one that is longer is refused before it is decoded.

    Args:
        gpu_bytes: memory of each process's GPU; None: they run on CPUs.
        host_bytes: each process's share of the host's memory; None: of a CPU this machine's, beside a GPU not judged.

    Returns:
        Tokens; None where the model's sizes are not known.

    Raises:
        ValueError: they cannot be read.
    """
    if shape_of(config.model.path) is None:
        return None
    shape, setup, work, device = _without_prompt(config, processes, gpu_bytes, host_bytes)
    setups = [setup]
    if config.parallel.sp == "auto":
        setups = [replace(setup, ulysses=ulysses, ring=ring) for ulysses, ring in layouts(shape, processes)]
    return max(largest_prompt(shape, work, one, device) for one in setups)


def degree_rule(
    config: DataRunConfig, processes: int, gpu_bytes: int | None, host_bytes: int | None = None
) -> Callable[[int], tuple[int, int]]:
    """What `parallel.sp: auto` chooses for a prompt of so many tokens: (Ulysses, ring) degrees.

    Args:
        gpu_bytes, host_bytes: as of max_prompt_tokens.

    Raises:
        ValueError: the model's sizes cannot be read. What is returned: no layout has room for such a prompt.
    """
    shape, setup, work, device = _without_prompt(config, processes, gpu_bytes, host_bytes)

    @cache
    def degree(tokens: int) -> tuple[int, int]:
        found = choose_layout(shape, replace(work, prompt_tokens=tokens), setup, device, processes)
        if found is None:
            raise ValueError(
                f"a prompt of {tokens} tokens fits no layout of {processes} processes; longrl check names a way out"
            )
        return found

    return degree


def _without_prompt(
    config: DataRunConfig, processes: int, gpu_bytes: int | None, host_bytes: int | None
) -> tuple[ModelShape, Setup, Work, Device]:
    # memory decides; rates only order layouts, in the same way on every machine
    if gpu_bytes is None or config.model.device == "cpu":
        device = replace(CORE, memory_bytes=host_share_bytes() if host_bytes is None else host_bytes)
    else:
        device = replace(GPUS["A100-80G"], memory_bytes=gpu_bytes, host_bytes=host_bytes)
    shape = _shape(config)
    nothing = PromptSize(video_tokens=0, text_tokens=TEXT_TOKENS, frames=0, merge=1, temporal=1, source="")
    return shape, setup_of(config, shape), work_of(config, nothing), device


def _shape(config: DataRunConfig) -> ModelShape:
    shape = shape_of(config.model.path)
    if shape is None:
        raise ValueError(
            f"model.path {config.model.path}: neither a Hugging Face folder nor a model whose sizes are known"
        )
    return shape


def setup_of(config: DataRunConfig, shape: ModelShape) -> Setup:
    """Where `parallel.sp` is auto, of prompts that one process has to itself."""
    model, parallel, memory = config.model, config.parallel, config.memory
    in_flight = config.rollout.prompts_in_flight if isinstance(config, RlConfig | EvalRunConfig) else 1
    sp = 1 if parallel.sp == "auto" else parallel.sp
    encoder = 0
    if shape.vision is not None:
        merger = shape.projector_parameters
        parts = {"projector": merger, "tower": shape.tower_parameters - merger}
        encoder = sum(parts.get(part, 0) for part in model.train)
    return Setup(
        ulysses=sp // parallel.ring,
        ring=parallel.ring,
        sharded=parallel.shard,
        recompute=memory.recompute,
        offload=memory.offload,
        mlp_tile_tokens=memory.mlp_tile_tokens,
        prompts_in_flight=in_flight,
        vllm=_vllm_of(config),
        weight_bytes=BYTES[model.dtype],
        compute_bytes=BYTES[model.compute_dtype or model.dtype],
        lora_rank=model.lora.rank if model.lora else 0,
        lora_targets=(model.lora.targets or tuple(shape.linears)) if model.lora else (),
        offload_reference=isinstance(config, RlConfig) and config.algo.offload_reference,
        language="language" in model.train,
        encoder_parameters=encoder,
    )


def _by_servers(config: DataRunConfig) -> bool:
    """Whether they draw the rollouts."""
    return isinstance(config, RlConfig) and config.rollout.server is not None


def _vllm_of(config: DataRunConfig) -> Vllm | None:
    """Where it draws the rollouts, in this process."""
    if not isinstance(config, RlConfig) or _by_servers(config) or config.rollout.engine != "vllm":
        return None
    model, asked = config.model, config.rollout.vllm
    return Vllm(
        share=asked.gpu_memory_utilization,
        sleeps=asked.sleep,
        weight_bytes=BYTES[asked.dtype or model.compute_dtype or model.dtype],
    )


def work_of(config: DataRunConfig, prompt: PromptSize) -> Work:
    """Of one step, all its cohorts being as large as `prompt`."""
    share = config.data.share_media
    # questions about one video have their text after what they share
    rest = 1 if share == 1 else prompt.text_tokens
    prefixes = ceil(config.prompts_per_step / share) if isinstance(config, TrainConfig) else 1
    work = Work(
        prompt_tokens=prompt.tokens,
        group_size=share,
        response_tokens=rest + SFT_RESPONSE_TOKENS,
        prefixes=prefixes,
        rollout=False,
        video_patches=prompt.patches,
        grid_patches=prompt.grid_patches,
    )
    if isinstance(config, SftConfig):
        return work
    assert isinstance(config, RlConfig | EvalRunConfig)
    asked = config.rollout.group_size if isinstance(config, RlConfig) else config.eval.samples
    advantage = ADVANTAGES.get(config.algo.advantage) if isinstance(config, RlConfig) else None  # the user's own: plain
    greedy = advantage is not None and advantage.greedy
    work = replace(
        work,
        group_size=share * asked,
        greedy_streams=share * greedy,
        response_tokens=rest + config.rollout.max_new_tokens,
        max_streams=max(1, config.rollout.max_streams // (asked + greedy)) * (asked + greedy),  # whole groups
        rollout=not _by_servers(config),
        trains=isinstance(config, RlConfig),
    )
    if not isinstance(config, RlConfig):
        return work
    return replace(
        work,
        evaluated_streams=share * config.eval.samples if config.eval_every_steps else 0,
        updates=config.algo.updates_per_batch,
        reference=config.algo.kl != "off",
        shuffled_streams=share * config.algo.shuffled_rollouts,
        waits="judge" in config.rewards or (advantage is not None and advantage.scope == "batch"),
        draws=1 + config.algo.max_refills,
    )
