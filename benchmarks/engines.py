"""Times the two engines (`rollout.engine`) at several prompt lengths and numbers of rollouts.

    PYTHONPATH=tests/vllm/site .venv-vllm/bin/python benchmarks/engines.py > docs/engines.jsonl   (after make test-vllm)

A text twin with random weights, fp32, one thread; every response has its full length. Seconds of the processor, of a
step up to the update: of the built-in engine prefill and decoding; of vLLM drawing, prefill included, the prefixes that
the update must then compute (the built-in engine hands over its own), and new weights. Other work on the machine only
adds: the engines take turns, and each one's fastest run counts. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext

import torch

from longrl.config import RlConfig
from longrl.models import load_family
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.rollout.vllm_engine import VllmEngine, start_vllm
from longrl.types import Example, Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    torch.set_num_threads(1)
    sampling = {"group_size": asked.group_size, "max_new_tokens": asked.response_tokens, "prompts_in_flight": 8}
    config = RlConfig.model_validate(
        {"run_dir": "run", "model": {"path": "tiny:qwen2"}, "steps": 1, "rollout": {"engine": "vllm", **sampling}}
    )
    family = load_family(config.model)
    family.model.generation_config.eos_token_id = []  # pyright: ignore (nothing ends a response early)
    policy = Policy(family)
    vllm = start_vllm(config, policy, lambda _: nullcontext(), ALONE, greedy=False)
    native = NativeEngine(policy, config.rollout)
    by_one = NativeEngine(policy, config.rollout.model_copy(update={"prompts_in_flight": 1}))
    for length in asked.lengths:
        for count in asked.prompts:
            prompts = make_prompts(count, length)
            times = [
                (native_s(native, prompts), native_s(by_one, prompts), *vllm_s(vllm, prompts))
                for _ in range(1 + asked.repeats)
            ][1:]
            theirs = min((one[2:] for one in times), key=sum)
            row = {"prompt_tokens": length, "prompts": count, "rollouts": count * asked.group_size}
            row |= {"response_tokens": asked.response_tokens}
            row |= {name: round(min(one[i] for one in times), 3) for i, name in enumerate(("native_s", "by_one_s"))}
            row |= dict(zip(("draw_s", "prefix_s", "weights_s"), (round(x, 3) for x in theirs), strict=True))
            print(json.dumps(row), flush=True)
    vllm.close()


def make_prompts(count: int, length: int) -> list[Prompt]:
    return [
        Prompt(
            token_ids=torch.randint(8, 256, (length,)),
            position_ids=torch.arange(length)[None],
            media=(),
            media_slots=(),
        )
        for _ in range(count)
    ]


def ask(engine: NativeEngine | VllmEngine, prompts: list[Prompt]) -> None:
    examples = [Example(id=str(i), messages=(), answer=None, kind="open") for i in range(len(prompts))]
    for _, prefix in engine.rollout(examples, prompts, range(len(prompts))):
        if prefix is not None:
            prefix.release()


def native_s(engine: NativeEngine, prompts: list[Prompt]) -> float:
    began = time.process_time()
    ask(engine, prompts)
    return time.process_time() - began


def vllm_s(engine: VllmEngine, prompts: list[Prompt]) -> tuple[float, float, float]:
    times = [time.process_time()]
    ask(engine, prompts)
    times.append(time.process_time())
    for prompt in prompts:
        engine.policy.prefix([prompt]).release()
    times.append(time.process_time())
    engine.update_weights()
    times.append(time.process_time())
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


if __name__ == "__main__":
    main()
