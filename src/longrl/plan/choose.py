"""What would make a plan fit, or a step faster, found by trying; and the layout of the processes for a prompt of some
length."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from longrl.parallel.layout import require_heads
from longrl.plan.cost import plan_cost
from longrl.plan.devices import Device
from longrl.plan.memory import Tally, plan_memory
from longrl.plan.shapes import ModelShape
from longrl.plan.work import Setup, Vllm, Work

TILE = 4096
CLEARLY = 0.98
"""How much of the time a later layout may take to be preferred: estimates are no better."""
LORA_RANK = 16
WORTH = 0.9
"""How much of the time a change may leave to be offered."""


def fits(shape: ModelShape, work: Work, setup: Setup, device: Device) -> bool:
    """On the device and, where it is known how much its host has, there too; vLLM in what it takes."""
    if Tally(shape, work, setup, device).vllm_lacks:
        return False
    memory = plan_memory(shape, work, setup, device)
    if device.is_cpu:
        return memory.peak_bytes + memory.host_bytes <= device.planned_bytes
    host_bytes = device.planned_host_bytes
    return memory.peak_bytes <= device.planned_bytes and (host_bytes is None or memory.host_bytes <= host_bytes)


def layouts(shape: ModelShape, processes: int) -> list[tuple[int, int]]:
    """(ulysses, ring) degrees that processes and heads allow, the smallest first, Ulysses before the ring."""
    found = []
    for ulysses, ring in product(range(1, processes + 1), repeat=2):
        if processes % (ulysses * ring) or ulysses > shape.heads:
            continue
        try:
            require_heads(shape.kv_heads, ulysses)
        except ValueError:
            continue
        found.append((ulysses, ring))
    return sorted(found, key=lambda degrees: (degrees[0] * degrees[1], degrees[1]))


def choose_layout(
    shape: ModelShape, work: Work, setup: Setup, device: Device, processes: int
) -> tuple[int, int] | None:
    """The (ulysses, ring) degrees for prompts of this length: what `parallel.sp: auto` asks.

    A prompt that fits one process stays there: nothing is sent, and other processes take other prompts. Otherwise, of
    the layouts that fit, the one that takes the least time of all its processes together; of those about as good the
    smallest, and Ulysses before the ring.

    Args:
        setup: all that is settled; its own degrees do not matter.
        processes: of the run; the degrees' product divides it.

    Returns:
        None where no layout fits.
    """
    best, best_s = None, float("inf")
    for ulysses, ring in layouts(shape, processes):
        tried = replace(setup, ulysses=ulysses, ring=ring, sharded=setup.sharded and ulysses * ring > 1)
        if work.prompt_tokens < tried.sp or not fits(shape, work, tried, device):
            continue
        spent_s = tried.sp * plan_cost(shape, work, tried, device).total_s
        if spent_s < CLEARLY * best_s:
            best, best_s = (ulysses, ring), spent_s
        if tried.sp == 1:
            break
    return best


def largest_prompt(shape: ModelShape, work: Work, setup: Setup, device: Device, most: int = 1 << 24) -> int:
    """Tokens of the longest prompt that fits; 0: none does."""

    def good(tokens: int) -> bool:
        return fits(shape, replace(work, prompt_tokens=tokens), setup, device)

    low, high = 0, most + 1  # memory grows with the prompt, so what fits and what does not meet once
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def smallest_change(
    shape: ModelShape, work: Work, setup: Setup, device: Device, processes: int
) -> tuple[dict[str, str], Work, Setup] | None:
    """What to set so that it fits, tried in all combinations.

    First what changes no result: recomputation, offload, tiles, one prompt in flight, vLLM's share of memory and layout
    of the processes, then of up to eight times as many; of that the fewest keys, then the fastest. Only then adapters
    in the place of full fine-tuning, and fewer frames.

    Returns:
        Configuration keys and values, with the work and setup that they come to; None where nothing helps.
    """
    in_flight, engines = {setup.prompts_in_flight, 1}, _engines(setup.vllm)
    for lossy, times in product((False, True), (1, 2, 4, 8)):
        best, one = None, device.shared_by(times)
        for changes, results, other_work, other in _tries(shape, work, setup, processes * times, in_flight, engines):
            if bool(results) != lossy or not fits(shape, other_work, other, one):
                continue
            cost = (results, len(changes), other.sp, plan_cost(shape, other_work, other, one).total_s)
            if best is None or cost < best[0]:
                best = cost, changes, other_work, other
        if best is not None:
            more = {"processes": str(processes * times)} if times > 1 else {}
            return more | best[1], *best[2:]
    return None


def fastest_change(
    shape: ModelShape, work: Work, setup: Setup, device: Device, processes: int
) -> tuple[dict[str, str], Setup] | None:
    """What to set so that a step takes the least time in the room that there is, results being the same.

    Returns:
        Configuration keys and values, with the setup that they come to; None where nothing is clearly faster.
    """
    before, found = _step_s(shape, work, setup, device, processes), []
    in_flight = {setup.prompts_in_flight}
    if work.rollout and not setup.vllm:
        in_flight |= {count for count in (1, 2, 4, 8) if count <= work.prefixes}
    for changes, results, _, other in _tries(shape, work, setup, processes, in_flight, [setup.vllm]):
        if not results and fits(shape, work, other, device):
            after = _step_s(shape, work, other, device, processes)
            if after < WORTH * before:
                found.append((after, changes, other))
    least = min((after for after, *_ in found), default=0.0)
    # of those that are about as good, the one with the fewest keys
    good = [(len(changes), after, changes, other) for after, changes, other in found if CLEARLY * after <= least]
    return min(good, key=lambda one: one[:2])[2:] if good else None


def _step_s(shape: ModelShape, work: Work, setup: Setup, device: Device, processes: int) -> float:
    return plan_cost(shape, work, setup, device, max(1, processes // setup.sp)).total_s


def _engines(vllm: Vllm | None) -> list[Vllm | None]:
    """As it is, and with more memory or less."""
    if vllm is None:
        return [None]
    return [
        replace(vllm, share=vllm.share / part, sleeps=sleeps)
        for part, sleeps in product((1, 2, 4, 1 / 2, 1 / 4), sorted({vllm.sleeps, True}))
        if vllm.share / part < 1
    ]


def _tries(
    shape: ModelShape,
    work: Work,
    setup: Setup,
    processes: int,
    in_flight: Collection[int],
    engines: Collection[Vllm | None],
) -> Iterator[tuple[dict[str, str], int, Work, Setup]]:
    """(changes, how many of them change results, work, setup)."""
    tiles = {setup.mlp_tile_tokens, TILE}
    at_least = {(u, r) for u, r in layouts(shape, processes) if u * r >= setup.sp} | {(setup.ulysses, setup.ring)}
    # not where the encoder is trained: adapters are for the language model alone
    adapters = {setup.lora_rank, setup.lora_rank or (0 if setup.encoder_parameters else LORA_RANK)}
    for recompute, offload, tile, (ulysses, ring), sharded, lora, reference, together, vllm, fewer in product(
        ("none", "layer", "keep_attention"), (False, True), tiles, at_least, (False, True), adapters, (False, True),
        in_flight, engines, (1, 2, 4, 8),
    ):  # fmt: skip
        away = reference and work.reference and not lora
        if (offload and recompute == "none") or (sharded and ulysses * ring == 1) or reference != away:
            continue
        other = replace(
            setup,
            recompute=recompute,
            offload=offload,
            mlp_tile_tokens=tile,
            ulysses=ulysses,
            ring=ring,
            sharded=sharded,
            lora_rank=lora,
            lora_targets=setup.lora_targets or tuple(shape.linears),
            offload_reference=reference,
            prompts_in_flight=together,
            vllm=vllm,
        )
        changes = {
            "parallel.sp": str(other.sp) if other.sp != setup.sp else None,
            "parallel.ring": str(ring) if ring != setup.ring else None,
            "parallel.shard": str(sharded).lower() if sharded != setup.sharded else None,
            "memory.recompute": recompute if recompute != setup.recompute else None,
            "memory.offload": str(offload).lower() if offload != setup.offload else None,
            "memory.mlp_tile_tokens": str(tile or "null") if tile != setup.mlp_tile_tokens else None,
            "rollout.prompts_in_flight": str(together) if together != setup.prompts_in_flight else None,
            "algo.offload_reference": str(reference).lower() if reference != setup.offload_reference else None,
            "model.lora.rank": str(LORA_RANK) if lora != setup.lora_rank else None,
            "frames": f"1/{fewer}" if fewer > 1 else None,
        }
        if vllm and setup.vllm:
            share, before = f"{vllm.share:g}", f"{setup.vllm.share:g}"
            changes["rollout.vllm.gpu_memory_utilization"] = share if share != before else None
            changes["rollout.vllm.sleep"] = "true" if vllm.sleeps != setup.vllm.sleeps else None
        results = (fewer - 1) + 2 * (lora != setup.lora_rank)
        shorter = replace(work, prompt_tokens=ceil(work.prompt_tokens / fewer))
        yield {key: value for key, value in changes.items() if value is not None}, results, shorter, other
