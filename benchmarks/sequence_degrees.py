"""Times a fused step with every layout of four processes, beside the one that `parallel.sp: auto` chooses; JSON lines.

    python benchmarks/sequence_degrees.py            # some minutes on two cores
    python benchmarks/sequence_degrees.py --quick

A step is four prompts, each decoded and learned from; groups of (heads x ring) processes share a prompt and take
different ones. What a process may hold is set so low that a prompt of 2,048 tokens needs two processes and one of 4,096
four, of which pairs split the keys and values: the model's 2 KV heads, repeated for 4 ranks, do not fit. All layouts
are timed; the best is the fastest of those that fit. They take turns, and the fastest of each counts, since other work
on the machine only adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from longrl.config import MemoryConfig, RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.parallel.ranks import make_ranks
from longrl.plan.choose import choose_layout, fits, layouts
from longrl.plan.devices import find_device
from longrl.plan.memory import plan_memory
from longrl.plan.shapes import SHAPES
from longrl.plan.work import Setup, Work
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, Prompt

PROCESSES, PROMPTS = 4, 4
SHAPE = replace(SHAPES["tiny:qwen2_5_vl"], width=256, heads=8, kv_heads=2, head_dim=32, intermediate=512, vision=None)
SETUP = Setup(recompute="layer")
DEVICE = replace(find_device("CPU", PROCESSES), memory_bytes=70 << 20, usable=1.0, runtime_bytes=0)
TIMEOUT = timedelta(minutes=10)


def plan(prompt_tokens: int, group_size: int, response_tokens: int) -> dict[str, Any]:
    """What fits, with the MiB that a process needs, and what is chosen."""
    work = Work(prompt_tokens=prompt_tokens, group_size=group_size, response_tokens=response_tokens)
    mib, good = {}, []
    for heads, ring in layouts(SHAPE, PROCESSES):
        setup = replace(SETUP, ulysses=heads, ring=ring)
        mib[heads, ring] = round(plan_memory(SHAPE, work, setup, DEVICE).peak_bytes / 2**20, 1)
        if fits(SHAPE, work, setup, DEVICE):
            good.append((heads, ring))
    return {"mib": mib, "fits": good, "auto": choose_layout(SHAPE, work, SETUP, DEVICE, PROCESSES)}


def make_family() -> Qwen25VL:
    """A body of SHAPE with random weights, the same in every process."""
    twin = Qwen25VL.tiny(0, torch.float32)
    config: Any = copy.deepcopy(twin.model.config)
    text = config.text_config
    text.hidden_size, text.intermediate_size = SHAPE.width, SHAPE.intermediate
    text.num_attention_heads, text.num_key_value_heads = SHAPE.heads, SHAPE.kv_heads
    torch.manual_seed(0)
    family = Qwen25VL(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), twin.tokenizer, {})
    family.model.generation_config.eos_token_id = [-1]  # every response is as long
    return family


def step(policy: Policy, prompt: Prompt, group_size: int, response_tokens: int) -> None:
    engine = NativeEngine(policy, RolloutConfig(group_size=group_size, max_new_tokens=response_tokens))
    example = Example(id="prompt", messages=(), answer=None, kind="open")
    [(groups, prefix)] = engine.rollout([example], [prompt], [0])
    responses = [one.token_ids for one in groups[0].rollouts]
    advantages = torch.linspace(-1, 1, len(responses))
    streams = make_streams([prompt] * len(responses), responses, prefix.length)
    policy.backward(prefix, streams, lambda logprobs, entropy, rows: -(advantages[rows, None] * logprobs).sum())


def process(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    """One of them: the first prints, for each length and layout, the seconds of the fastest repeat."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=TIMEOUT)
    policy = Policy(make_family(), memory=MemoryConfig(recompute="layer"))
    ranks = {(h, r): make_ranks(PROCESSES, h * r, TIMEOUT, r) for h, r in layouts(SHAPE, PROCESSES)}
    for tokens in arguments.prompt_tokens:
        ids = torch.randint(0, 500, (PROMPTS, tokens), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(tokens).expand(3, -1)
        prompts = [Prompt(token_ids=x, position_ids=positions, media=(), media_slots=()) for x in ids]
        seconds = dict.fromkeys(ranks, float("inf"))
        for _ in range(arguments.repeats):
            for layout, these in ranks.items():
                policy.share_with(these.sp)
                dist.barrier()
                began = time.perf_counter()
                for prompt in prompts[these.dp_rank :: these.dp_size]:
                    step(policy, prompt, arguments.group_size, arguments.response_tokens)
                dist.barrier()
                seconds[layout] = min(seconds[layout], time.perf_counter() - began)
                policy.trunk.zero_grad()
        if rank == 0:
            for line in table(tokens, seconds, arguments):
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


def table(
    tokens: int, seconds: dict[tuple[int, int], float], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A line for each layout, and one that compares what is chosen with the best."""
    planned = plan(tokens, arguments.group_size, arguments.response_tokens)
    for layout, value in seconds.items():
        yield {
            "prompt_tokens": tokens,
            "heads": layout[0],
            "ring": layout[1],
            "seconds": round(value, 4),
            "planned_mib": planned["mib"][layout],
            "fits": layout in planned["fits"],
            "auto": layout == planned["auto"],
        }
    if planned["auto"] is not None:
        best = min(planned["fits"], key=lambda layout: seconds[layout])
        over = round(seconds[planned["auto"]] / seconds[best] - 1, 3)
        yield {"prompt_tokens": tokens, "auto": planned["auto"], "best": best, "over_best": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three lengths, two repeats")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompt_tokens, arguments.repeats = [1024, 2048, 4096], 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(process, args=(folder, arguments), nprocs=PROCESSES, start_method="spawn")


if __name__ == "__main__":
    main()
