"""Times decoding of short prompts, one after the other and several side by side (`rollout.prompts_in_flight`).

    python benchmarks/in_flight.py --threads 1

The tiny Qwen2.5-VL twin with random weights, fp32, text alone; every response has its full length. The settings take
turns, and each one's fastest run counts, in seconds of the processor that this process had: other work on the machine
only adds. Prefill is not counted: it is the same for all. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longrl.config import RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prompts": 8, "prompt-tokens": 200, "group-size": 4, "response-tokens": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    family = Qwen25VL.tiny(0, torch.float32)
    family.model.generation_config.eos_token_id = [-1]  # nothing ends a response early
    policy = Policy(family)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(asked.prompt_tokens).expand(3, -1)
    prompts = [
        Prompt(
            token_ids=torch.randint(256, (asked.prompt_tokens,), generator=generator),
            position_ids=positions,
            media=(),
            media_slots=(),
        )
        for _ in range(asked.prompts)
    ]
    examples = [Example(id=str(i), messages=(), answer=None, kind="open") for i in range(asked.prompts)]

    def decode_s(in_flight: int) -> float:
        spent = {"prefill": 0.0, "decode": 0.0}

        @contextmanager
        def timed(part: str) -> Iterator[None]:
            began = time.process_time()
            yield
            spent[part] += time.process_time() - began

        config = RolloutConfig(
            group_size=asked.group_size, max_new_tokens=asked.response_tokens, prompts_in_flight=in_flight
        )
        with torch.no_grad():
            for _, prefix in NativeEngine(policy, config, timed).rollout(examples, prompts, range(asked.prompts)):
                prefix.release()
        return spent["decode"]

    found = {n: [decode_s(n)] for n in asked.in_flight}  # the first is to warm up
    for _ in range(asked.repeats):
        for n, seconds in found.items():
            seconds.append(decode_s(n))
    fastest = {n: min(seconds[1:]) for n, seconds in found.items()}
    first = fastest[asked.in_flight[0]]
    for n, seconds in fastest.items():
        print(json.dumps(vars(asked) | {"in_flight": n, "decode_cpu_s": round(seconds, 3), "times": first / seconds}))


if __name__ == "__main__":
    main()
