"""What each process of the sequence-parallel tests does: every case in groups of up to 4 ranks, in one start.

The same functions without a group are the slow twin: one process, the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from longrl import policy as policy_module
from longrl.config import ALL_KEPT, MemoryConfig, RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.parallel.gradients import sum_gradients
from longrl.parallel.ranks import make_ranks
from longrl.parallel.sequence import SequenceGroup
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, MediaEmbeds, Prompt
from tests import LONG

LAYOUTS = ((4, 1), (2, 1), (1, 1), (2, 2), (1, 2), *([(1, 4)] if LONG else []))
"""Ranks that share the heads, and the places of a ring that share the tokens."""
WORLD = 4
TIMEOUT = timedelta(minutes=15)
HEAD_DIM, LAYERS = 16, 2
ENGINE_SEEDS = [11, 12]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts of one cohort, their responses, and a model."""

    heads: int | None
    """Of HEAD_DIM each; None: the tiny twin as it is (4 heads, 2 KV heads of 32; 4 layers)."""
    kv_heads: int = 2
    dtype: torch.dtype = torch.float64
    layout: tuple[int, ...]
    """Tokens in turn: text, media, text, media, ..."""
    questions: tuple[int, ...]
    """Tokens of each question after that."""
    responses: tuple[int, ...]
    """Tokens of each response to each question."""
    memory: MemoryConfig = ALL_KEPT
    stream_tokens: int = 8192


RECOMPUTED = MemoryConfig(recompute="layer")
CASES = {
    "twin": Case(heads=None, layout=(3, 28, 2), questions=(4, 6, 1), responses=(7, 3)),
    "twin, fp32, recomputed": Case(
        heads=None, dtype=torch.float32, layout=(3, 28, 2), questions=(4, 6, 1), responses=(7, 3), memory=RECOMPUTED
    ),
    "1 KV head, 3 query heads, media first": Case(
        heads=3, kv_heads=1, layout=(0, 21), questions=(3,), responses=(5, 9, 1)
    ),
    "2 KV heads, 6 query heads, 3 media, recomputed but for attention, offloaded": Case(
        heads=6,
        layout=(2, 9, 1, 5, 3, 12, 1),
        questions=(2, 5),
        responses=(4, 8),
        memory=MemoryConfig(recompute="keep_attention", offload=True),
    ),
    "2 KV heads, 14 query heads, fp32, micro-batches": Case(
        heads=14, dtype=torch.float32, layout=(5, 30), questions=(3,), responses=(4, 9, 1, 6, 2), stream_tokens=25
    ),
    "4 KV heads, 8 query heads, text": Case(heads=8, kv_heads=4, layout=(35,), questions=(4,), responses=(6, 2, 5)),
    "4 KV heads, fp32, media to the last token but one": Case(
        heads=4, kv_heads=4, dtype=torch.float32, layout=(1, 36), questions=(1, 1), responses=(3,)
    ),
    "labels on the last rank alone": Case(heads=8, kv_heads=4, layout=(2, 9), questions=(25, 24), responses=(2,)),
    "a prefix of a token a rank": Case(heads=4, layout=(4,), questions=(1,), responses=(3, 2)),
    "one token to score": Case(heads=4, layout=(2, 9), questions=(1,), responses=(1,)),
}


@cache
def _twin(dtype: torch.dtype) -> Qwen25VL:
    return Qwen25VL.tiny(0, dtype)


def make_family(heads: int | None, kv_heads: int, dtype: torch.dtype) -> Qwen25VL:
    twin = _twin(dtype)
    if heads is None:
        return Qwen25VL(copy.deepcopy(twin.model), twin.tokenizer, {})
    config: Any = copy.deepcopy(twin.model.config)
    text = config.text_config
    text.hidden_size, text.intermediate_size = heads * HEAD_DIM, heads * HEAD_DIM * 2
    text.num_attention_heads, text.num_key_value_heads = heads, kv_heads
    text.num_hidden_layers, text.layer_types = LAYERS, ["full_attention"] * LAYERS
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 2, 2]}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Qwen25VL(AutoModelForImageTextToText.from_config(config, dtype=dtype), twin.tokenizer, {})


def make_prompts(family: Qwen25VL, case: Case) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    width = family.model.config.get_text_config().hidden_size
    media, slots, here = [], [], 0
    for i, count in enumerate(case.layout):
        if i % 2:
            media.append(
                MediaEmbeds(
                    embeds=torch.randn(count, width, generator=generator) * 0.3,  # fp32: converted where it is used
                    grid_thw=(count, 2, 2),
                    seconds_per_grid=2.0,
                    timestamps_s=torch.arange(2 * count, dtype=torch.float64),
                    key=f"video {i}",
                )
            )
            slots.append(((here, here + count),))
        here += count
    shared = torch.randint(0, 500, (here,), generator=generator)
    prompts = []
    for count in case.questions:
        ids = torch.cat([shared, torch.randint(0, 500, (count,), generator=generator)])
        positions = family.positions(len(ids), tuple(media), slots)
        prompts.append(Prompt(token_ids=ids, position_ids=positions, media=tuple(media), media_slots=tuple(slots)))
    return prompts


def train(case: Case, sp: SequenceGroup | None) -> dict[str, Any]:
    """One cohort's backward. The loss mixes all tokens of a response, so a rank needs the others' log-probs."""
    policy_module.STREAM_TOKENS = case.stream_tokens
    family = make_family(case.heads, case.kv_heads, case.dtype)
    policy = Policy(family, memory=case.memory, sp=sp)
    prompts = make_prompts(family, case)
    generator = torch.Generator().manual_seed(3)
    rows = [prompt for prompt in prompts for _ in case.responses]
    responses = [torch.randint(0, 500, (n,), generator=generator).tolist() for n in case.responses * len(prompts)]
    weights = torch.linspace(-1, 1.5, len(rows), dtype=case.dtype)
    seen = []

    def loss(logprobs, entropy, part):
        seen.append((logprobs.detach(), entropy))
        total = logprobs.sum(1)
        return (weights[part] * total + 0.02 * total**2).sum()

    prefix = policy.prefix(prompts)
    shapes, length = [tuple(x.shape) for x in prefix.keys + prefix.values], prefix.length
    streams = make_streams(rows, responses, length)
    policy.backward(prefix, streams, loss)
    if sp is not None:
        sum_gradients(policy.trunk.parameters(), sp.group, bucket=50_000)
    return {
        "logprobs": torch.cat([x for x, _ in seen]),
        "entropy": torch.cat([x for _, x in seen]),
        "gradients": {n: p.grad for n, p in policy.trunk.named_parameters() if p.grad is not None},
        "shapes": shapes,
        "length": length,
        "stream_shape": tuple(streams.mask.shape),
    }


DECODE = Case(heads=6, layout=(3, 30, 2), questions=(4, 7), responses=())


def decode(temperature: float, sp: SequenceGroup | None) -> dict[str, Any]:
    """Rollouts of two questions. Ranks other than the first get other noise, which must not matter."""
    family = make_family(DECODE.heads, DECODE.kv_heads, DECODE.dtype)
    # at temperature 0 none stops, so that the test can count messages; otherwise every eighth token does
    family.model.generation_config.eos_token_id = list(range(0, 512, 8)) if temperature else [-1]
    prompts = make_prompts(family, DECODE)
    examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(len(prompts))]
    engine = NativeEngine(
        Policy(family, sp=sp), RolloutConfig(group_size=4, max_new_tokens=12, temperature=temperature)
    )
    seeds = [seed + (0 if sp is None else sp.rank) for seed in ENGINE_SEEDS]
    with torch.no_grad():
        [(groups, _)] = engine.rollout(examples, prompts, seeds)
    return {"rollouts": [one for group in groups for one in group.rollouts]}


def agree(sp: SequenceGroup | None) -> dict[str, Any]:
    """The largest difference between the log-probs that the engine records and that the trainer computes, fp32."""
    family = make_family(None, 2, torch.float32)
    policy = Policy(family, sp=sp)
    examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(len(DECODE.questions))]
    engine = NativeEngine(policy, RolloutConfig(group_size=4, max_new_tokens=12))
    with torch.no_grad():
        [(groups, prefix)] = engine.rollout(examples, make_prompts(family, DECODE), ENGINE_SEEDS)
    rows = [(group.prompt, one) for group in groups for one in group.rollouts]
    streams = make_streams([prompt for prompt, _ in rows], [one.token_ids for _, one in rows], prefix.length)
    trainer, _ = policy.logprobs(prefix, streams)
    recorded = torch.tensor([x for _, one in rows for x in one.logprobs])
    return {"difference": (trainer[streams.mask] - recorded).abs().max().item(), "tokens": len(recorded)}


LONG = Case(heads=8, kv_heads=4, layout=(7, 111, 3, 81), questions=(2,), responses=())


class Largest(TorchDispatchMode):
    """Notes the largest tensor of the model's width that any operation makes; views of another are not made."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None
        if made and out.is_floating_point() and out.ndim and out.shape[-1] == self.width:
            self.rows = max(self.rows, out.numel() // self.width)
        return out


def hold(sp: SequenceGroup | None) -> dict[str, Any]:
    """How much of a prefix a rank holds: the most rows of hidden states at once, and all that is kept for backward."""
    family = make_family(LONG.heads, LONG.kv_heads, LONG.dtype)
    policy, [prompt] = Policy(family, sp=sp), make_prompts(family, LONG)
    parameters = {p.untyped_storage().data_ptr() for p in family.model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Largest(LONG.heads * HEAD_DIM) as largest:
        prefix = policy.prefix([prompt])
    kv_bytes = sum(x.numel() * x.element_size() for x in prefix.keys + prefix.values)
    return {"rows": largest.rows, "kept": sum(kept.values()), "kv_bytes": kv_bytes, "length": prefix.length}


class Messages(TorchDispatchMode):
    """Notes every message of torch.distributed, whoever sends it: (operation, bytes of its largest side)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "barrier" not in func._schema.name:
            # lists of lists of tensors, of those that are gathered
            sides = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args]
            self.seen.append((func._schema.name.removeprefix("c10d::"), max(sides)))
        return func(*args, **(kwargs or {}))


TRAFFIC = (180, 720)
"""Video tokens of two prompts that differ in nothing else."""


def traffic(sp: SequenceGroup) -> dict[str, Any]:
    """The messages of a whole step, decoding included, with whole and with sharded weights; for both prompts."""
    found = {}
    for sharded in (False, True) if sp.size > 1 else ():
        for tokens in TRAFFIC:
            case = Case(heads=8, kv_heads=4, layout=(7, tokens), questions=(4, 3), responses=())
            family = make_family(case.heads, case.kv_heads, case.dtype)
            family.model.generation_config.eos_token_id = [-1]
            policy, prompts = Policy(family, sp=sp, sharded=sharded, memory=RECOMPUTED), make_prompts(family, case)
            examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(len(prompts))]
            engine = NativeEngine(policy, RolloutConfig(group_size=2, max_new_tokens=5, temperature=0.0))
            with Messages() as messages:
                [(groups, prefix)] = engine.rollout(examples, prompts, ENGINE_SEEDS)
                rows = [(group.prompt, one.token_ids) for group in groups for one in group.rollouts]
                streams = make_streams([prompt for prompt, _ in rows], [ids for _, ids in rows], prefix.length)
                policy.backward(prefix, streams, lambda logprobs, *_: logprobs.sum())
                if not sharded:
                    sum_gradients(policy.trunk.parameters(), sp.group)
            found[sharded, tokens] = messages.seen
    return {"messages": found}


def refuse(sp: SequenceGroup) -> dict[str, Any]:
    """What is refused on a rank, and how tokens are split."""
    too_short = Prompt(
        token_ids=torch.arange(sp.size), position_ids=torch.arange(sp.size).expand(3, -1), media=(), media_slots=()
    )
    policy = Policy(make_family(4, 2, torch.float32), sp=sp)
    return {
        "short": _message(lambda: policy.prefix([too_short])),
        "heads": _message(lambda: Policy(make_family(3, 3, torch.float32), sp=sp)),
        "span": {total: sp.span(total) for total in range(sp.size, 40)},
        "spans": {total: sp.spans(total) for total in range(sp.size, 40)},
    }


def _message(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def summed(sp: SequenceGroup) -> dict[str, Any]:
    """Parameters of a few elements, buckets of seven: one has a gradient on the first rank alone, one nowhere."""
    sizes = {"everywhere": (4, 5), "first": (3,), "nowhere": (2,), "frozen": (2,), "last": (9,)}
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    parameters["frozen"].requires_grad_(False)
    for name in ("everywhere", "last", *(["first"] if sp.rank == 0 else [])):
        parameters[name].grad = torch.arange(parameters[name].numel()).float().view(sizes[name]) + sp.rank
    sum_gradients(parameters.values(), sp.group, bucket=7)
    return {"gradients": {name: p.grad for name, p in parameters.items()}}


def run(rank: int, size: int, folder: str) -> None:
    """The process of one rank: writes what it found to FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    jobs: dict[str, Callable[[SequenceGroup], dict[str, Any]]] = {
        **{name: lambda sp, case=case: train(case, sp) for name, case in CASES.items()},
        "decode 0.9": lambda sp: decode(0.9, sp),
        "decode 0": lambda sp: decode(0.0, sp),
        "agree": agree,
        "hold": hold,
        "traffic": traffic,
        "refuse": refuse,
        "sum": summed,
    }
    found = {}
    for heads, ring in LAYOUTS:
        n = heads * ring
        ranks, only = make_ranks(n, n, TIMEOUT, ring), dist.new_group([0])
        if rank < n:
            for name, job in jobs.items():
                sp = ranks.sp or SequenceGroup(only)
                sp.bytes_sent.clear()
                found[name, (heads, ring)] = {**job(sp), "bytes": dict(sp.bytes_sent)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
