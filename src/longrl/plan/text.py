"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from longrl.plan.devices import GIB, Device
from longrl.plan.memory import Tally
from longrl.plan.plan import Plan


def plan_lines(plan: Plan) -> Iterator[str]:
    """Sizes are those of one process. What was assumed is called estimated."""
    shape, prompt, work, setup, device = plan.shape, plan.prompt, plan.work, plan.setup, plan.device
    most = "at most " if work.draws > 1 else ""
    if shape.source is not None:
        yield f"           sizes as published; it is not here yet: download it from {shape.source}"
    video = f"{prompt.frames:,} frames give {prompt.video_tokens:,}, text {prompt.text_tokens:,}"
    yield f"prompt     {prompt.tokens:,} tokens: {video}"
    yield f"           {prompt.source}"
    yield (
        f"layout     {_count(plan.processes, 'process', 'processes')} ({device.name}); {setup.sp} for each prompt "
        f"(Ulysses {setup.ulysses} x ring {setup.ring}), weights {'shared out' if setup.sharded else 'whole on each'}"
    )
    yield f"           {_memory_keys(plan)}"
    if work.trains:
        passes = f"{most}{plan.cost.passes:.2f} over each prompt, in forward passes"
        yield f"passes     {passes}; {plan.cost.flops:.2g} operations"
    room = f"of {_size(device.memory_bytes)}, {_size(device.planned_bytes)} may be planned"
    yield f"memory     {_size(plan.memory.peak_bytes)} a process at the peak, in the {plan.memory.peak_phase}; {room}"
    for part, size in sorted(plan.memory.parts.items(), key=lambda item: -item[1]):
        yield f"           {_size(size):>11}  {part}"
    yield "           other phases: " + ", ".join(
        f"{phase} {_size(sum(parts.values()))}"
        for phase, parts in plan.memory.phases.items()
        if phase != plan.memory.peak_phase
    )
    if plan.memory.host:
        host = f"{_size(plan.memory.host_bytes)} a process, pinned: {', '.join(plan.memory.host)}"
        yield f"host       {host}; {_host(device)}"
    times = ", ".join(f"{phase} {_seconds(value)}" for phase, value in plan.cost.seconds.items())
    what = f"a step of {work.prefixes} prompts" if work.trains else "a video"
    yield f"time       {most}{_seconds(plan.cost.total_s)} for {what} (estimated): {times}"
    if prompt.patches:
        yield f"           and {_seconds(plan.encode_s)} to encode each video, once (estimated, without decoding it)"
    if plan.faster is not None:
        keys, memory, cost = plan.faster
        yield f"faster     {_seconds(cost.total_s)} and {_size(memory.peak_bytes)} with {_keys(keys)} (estimated)"
    yield f"fits       {'yes' if plan.fits else 'no'}"


def refusal(plan: Plan) -> str:
    """Why a plan does not fit, and what would make it, in one line."""
    text = _lack(plan)
    if plan.change is None:
        smaller = "; set video.max_pixels: smaller frames have fewer tokens" if plan.prompt.video_tokens else ""
        return f"{text}; no layout, recomputation, adapters or an eighth of the frames would make it fit{smaller}"
    keys, other = plan.change
    return f"{text}; {_size(other.peak_bytes)} with {_keys(keys)}"


def _lack(plan: Plan) -> str:
    device, memory = plan.device, plan.memory
    tally = Tally(plan.shape, plan.work, plan.setup, device)
    if tally.vllm_lacks:
        assert plan.setup.vllm is not None
        share = f"rollout.vllm.gpu_memory_utilization {plan.setup.vllm.share:g}"
        taken = plan.setup.vllm.share * device.memory_bytes
        return f"vLLM's weights and one response need {_size(tally.vllm_needs)}, with {share} it has {_size(taken)}"
    need, room = memory.peak_bytes + (memory.host_bytes if device.is_cpu else 0), device.planned_bytes
    here = "this machine's CPU (--device plans for another)" if device.is_cpu else f"one {device.name}"
    if need <= room:
        assert device.planned_host_bytes is not None
        need, room, here = memory.host_bytes, device.planned_host_bytes, "its host"
    return f"a step needs {_size(need)} a process, on {here} {_size(room)} may be planned, {_size(need - room)} too few"


def _keys(keys: dict[str, str]) -> str:
    return " ".join(_change(key, value) for key, value in keys.items())


def _change(key: str, value: str) -> str:
    """As it is typed; frames are no key, and the way to fewer is the user's."""
    if key == "processes":
        return f"--processes {value}"
    return f"and {value} of the frames" if key == "frames" else f"{key}={value}"


def _host(device: Device) -> str:
    if device.is_cpu:
        return "of the same memory"
    if device.planned_host_bytes is None:
        return "not judged, as this machine has no such GPU"
    return f"{_size(device.planned_host_bytes)} may be planned"


def _memory_keys(plan: Plan) -> str:
    setup = plan.setup
    parts = [f"recompute {setup.recompute}"]
    parts += ["offload"] if setup.offload else []
    parts += [f"MLP in tiles of {setup.mlp_tile_tokens:,}"] if setup.mlp_tile_tokens else []
    parts += [f"LoRA of rank {setup.lora_rank}"] if setup.lora_rank else []
    if setup.prompts_in_flight > 1:
        trained = Tally(plan.shape, plan.work, setup, plan.device).in_flight > 1  # other engines take one at a time
        parts.append(f"{setup.prompts_in_flight} prompts in flight{'' if trained else ' in evaluation'}")
    return ", ".join([*parts, f"weights of {setup.weight_bytes} bytes, computed in {setup.compute_bytes}"])


def _size(size: float) -> str:
    if size < GIB:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.1f} GiB"


def _seconds(value: float) -> str:
    if value >= 2 * 86400:
        return f"{value / 86400:,.0f} days"
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
