"""Passes, operations and expected seconds of a step. Rates are those of devices.py, so every time is an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from longrl.plan.devices import Device
from longrl.plan.memory import Tally
from longrl.plan.shapes import ModelShape
from longrl.plan.work import Setup, Work

OPERATIONS = 30
"""Small operations of a layer in eager mode."""
LATENCY_S = 2e-5
"""Of a message of a few streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one step, on each process that shares a prompt."""

    passes: float
    """Over a prompt that is trained, in forward passes; a backward pass counts two, what it recomputes its share of one
    more. With refills at most, as are the others."""
    flops: float
    """Of all processes that share a prompt and for one prompt: what the algorithm asks for, without recomputation."""
    seconds: dict[str, float]
    """By phase, all prompts of the step that fall to one such group of processes."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def plan_cost(shape: ModelShape, work: Work, setup: Setup, device: Device, groups: int = 1) -> Cost:
    """
    Args:
        groups: of processes that take different prompts (dp).
    """
    rounds = ceil(work.prefixes / groups)
    prefix = _Pass(shape, work, setup, device)
    together = rounds if setup.vllm else min(setup.prompts_in_flight, rounds)
    suffix = _Suffix(shape, work, setup, device, together)
    frozen = setup.lora_rank > 0 or not setup.language
    again = {"none": 0.0, "layer": 1.0, "keep_attention": prefix.products_s / prefix.forward_s}[setup.recompute]
    moved = Tally(shape, work, setup, device).kept()[1] / (device.host_link * device.movement)
    forwards = _forwards(work, setup)
    seconds = {"prefill": forwards * (max(prefix.forward_s, moved) + prefix.messages_s + prefix.gather_s)}
    passes, flops = float(forwards), forwards * prefix.flops
    if work.rollout:
        drawn = [work.group_size + work.greedy_streams, *([work.shuffled_streams] if work.shuffled_streams else [])]
        seconds["decode"] = work.draws * sum(suffix.decode_s(streams) + prefix.gather_s for streams in drawn)
        flops += work.draws * sum(drawn) / work.group_size * suffix.flops
    if work.reference:
        each = prefix.forward_s + prefix.messages_s + suffix.forward_s + 2 * prefix.gather_s
        seconds["reference"] = work.draws * each
        passes, flops = passes + work.draws, flops + work.draws * (prefix.flops + suffix.flops)
    if work.trains:
        # frozen weights have no gradients of their own; those of attention cost five products where forward has two
        products, attention, updates = 1.0 if frozen else 2.0, 2.5, work.updates
        backward = prefix.products_s * products + prefix.attention_s * attention
        backward += again * (prefix.forward_s + prefix.messages_s)
        seconds["suffix"] = updates * suffix.forward_s * (1 + products + (again > 0))
        seconds["suffix"] += updates * suffix.micro_batches * 2 * prefix.gather_s
        seconds["prefix backward"] = updates * (max(backward, moved) + prefix.messages_back_s + prefix.gather_s)
        if not frozen and setup.sharded:
            seconds["gradients"] = updates * 2 * (suffix.micro_batches + 1) * prefix.gather_s
        if setup.encoder_parameters:  # forward again, and backward, each rank the rows it has
            seconds["encoder"] = 3 * encode_seconds(shape, work, setup, device) / setup.sp
        passes += updates * (2 + again)
        flops += updates * (1 + products) * suffix.flops
        flops += updates * (products * prefix.flops_products + 2 * prefix.flops_attention)
    seconds = {name: rounds * value for name, value in seconds.items()}
    if work.trains:
        seconds["optimizer"] = work.updates * prefix.optimizer_s
    return Cost(passes=passes, flops=flops, seconds=seconds)


def _forwards(work: Work, setup: Setup) -> int:
    """Passes over a prompt, without the reference's: to draw its rollouts, and for each update, the first of which has
    that of the built-in engine if it need not wait."""
    drawn = work.draws * (1 + (work.shuffled_streams > 0)) if work.rollout else 0
    shared = work.rollout and work.trains and not (work.waits or setup.vllm)
    return drawn + work.trains * work.updates - shared


def encode_seconds(shape: ModelShape, work: Work, setup: Setup, device: Device) -> float:
    """Of one prompt's frames through the tower, by one process: before their embeddings are in the cache."""
    return 2 * shape.tower_parameters * work.video_patches / (device.flops[setup.weight_bytes] * device.products)


class _Pass:
    """One forward pass over a prefix. The last layer is left at its keys and values."""

    def __init__(self, shape: ModelShape, work: Work, setup: Setup, device: Device) -> None:
        tally = Tally(shape, work, setup, device)
        layers, length = shape.layers - 1, work.prompt_tokens
        rate, heads = device.flops[setup.compute_bytes], shape.heads * shape.head_dim
        self.flops_products = 2.0 * layers * shape.layer_matrices * length
        self.flops_attention = 2.0 * layers * heads * length * length
        self.flops = self.flops_products + self.flops_attention
        self.products_s = self.flops_products / setup.sp / (rate * device.products)
        padded = tally.a / heads  # query heads that are zeros are computed too
        self.attention_s = self.flops_attention * padded / setup.sp / (rate * device.attention)
        self.forward_s = self.products_s + self.attention_s
        speed = device.link * device.movement
        exchanged = tally.tokens * (2 * tally.a + 2 * tally.kv) * tally.b * (setup.ulysses - 1) / setup.ulysses
        passed_on = tally.prefix_kv / shape.layers * (setup.ring - 1)
        self.messages_s = layers * (exchanged + passed_on) / speed
        # backward, the gradients of keys and values go round with them
        self.messages_back_s = layers * (exchanged + 2 * passed_on) / speed
        whole = tally.b * shape.trunk_parameters * (setup.sp - 1) / setup.sp
        self.gather_s = whole / speed if setup.sharded else 0.0
        # weight, gradient and two moments are read, three of them written
        trained = tally.steady().get("gradients", 0.0)
        self.optimizer_s = 7 * trained / (device.bandwidth * device.movement)


class _Suffix:
    """All streams after one prefix."""

    def __init__(self, shape: ModelShape, work: Work, setup: Setup, device: Device, together: int) -> None:
        """together: prompts whose streams are decoded side by side, for each token of which weights are read once."""
        tally = Tally(shape, work, setup, device)
        rate, tokens = device.flops[setup.compute_bytes], work.suffix_tokens
        weights = shape.layers * shape.layer_matrices + shape.vocabulary * shape.width
        attention = 4.0 * shape.layers * shape.heads * shape.head_dim * (work.prompt_tokens + work.response_tokens / 2)
        self.work, self.together = work, together
        self.flops = tokens * (2.0 * weights + attention)
        per_token = 2.0 * weights / device.products + attention / device.attention
        self.forward_s = tokens * per_token / setup.sp / rate
        self.micro_batches = ceil(tokens / max(1, tally.micro_batch * setup.sp))
        messages, speed = (setup.ulysses > 1) + (setup.ring > 1), device.bandwidth * device.movement
        self.launched_s = shape.layers * (OPERATIONS * device.launch_s + messages * LATENCY_S)
        self.weights_s, self.prefix_s = tally.b * weights / speed, tally.prefix_kv / speed
        self.computed_s = self.flops / tokens / rate / device.products / setup.sp

    def decode_s(self, streams: int) -> float:
        """Of so many after one prefix."""
        work, together = self.work, self.together
        beside = min(together * streams, work.max_streams)
        turns = ceil(together * streams / beside)
        read_s = self.weights_s + max(1.0, together / turns) * self.prefix_s
        return turns / together * work.response_tokens * (max(read_s, beside * self.computed_s) + self.launched_s)
