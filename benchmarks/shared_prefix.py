"""Times the update of one group: its prompt read once (ours) against once for every response (stock transformers).

    python benchmarks/shared_prefix.py --threads 1

Forward and backward of the summed log-probs of G responses to one video prompt, in fp32, on the tiny Qwen2.5-VL twin
with random weights; embeddings are there already on both sides. Stock transformers runs with its own SDPA attention,
computes logits for response tokens only, and is timed one sequence at a time and all in one batch; the faster counts.
Beside it stand the same separate sequences with our own attention: sharing cannot be faster than those by more than
`token_ratio`, the tokens computed one way over those computed the other. The ways take turns, and each one's fastest
run counts, since other work on the machine only adds. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.policy import Policy
from longrl.types import Clip, Example, MediaEmbeds, Message, Prompt


def make_prompt(family: Qwen25VL, tokens: int) -> Prompt:
    """A video, at a token for every two seconds, and a short question."""
    width = family.model.config.text_config.hidden_size

    def build(patches: int) -> Prompt:
        media = MediaEmbeds(
            embeds=torch.randn(patches, width) * 0.3,
            grid_thw=(patches, 2, 2),
            seconds_per_grid=2.0,
            timestamps_s=torch.arange(2 * patches, dtype=torch.float64),
            key="video",
        )
        content = (Clip(path="video.mp4", fps=1.0), "what comes first?")
        example = Example(id="q", messages=(Message(role="user", content=content),), answer=None, kind="open")
        return family.prompt(example, (media,))

    return build(tokens - (len(build(1)) - 1))


def update_separately(family: Qwen25VL, prompt: Prompt, responses: Tensor) -> None:
    """Stock transformers on [prompt, response] of each row of responses [n, R]."""
    body, count = family.model.model.language_model, len(responses)
    ids = torch.cat([prompt.token_ids.expand(count, -1), responses], 1)
    ((start, end),) = prompt.media_slots
    embeds = body.embed_tokens(ids)
    embeds = torch.cat([embeds[:, :start], prompt.media[0].embeds.expand(count, -1, -1), embeds[:, end:]], 1)
    positions = prompt.followed_by(responses[0].tolist()).position_ids[:, None].expand(-1, count, -1)
    hidden = body(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    logprobs = family.model.lm_head(hidden[:, len(prompt) - 1 : -1]).log_softmax(-1)
    logprobs.gather(-1, responses[..., None]).sum().backward()


def update_shared(policy: Policy, prompt: Prompt, responses: Tensor) -> None:
    prefix = policy.prefix([prompt])
    streams = make_streams([prompt] * len(responses), responses.tolist(), prefix.length)
    policy.backward(prefix, streams, lambda logprobs, entropy, rows: logprobs.sum())


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1800)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each way, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours, stock = Qwen25VL.tiny(0, torch.float32), Qwen25VL.tiny(0, torch.float32)
    stock.model.set_attn_implementation("sdpa")
    policy, prompt = Policy(ours), make_prompt(ours, arguments.prompt_tokens)
    responses = torch.randint(len(ours.tokenizer), (arguments.responses, arguments.response_tokens))

    def one_by_one() -> None:
        for response in responses:
            update_separately(stock, prompt, response[None])

    def one_by_one_with_our_attention() -> None:
        for response in responses:
            update_shared(policy, prompt, response[None])

    ways: dict[str, tuple[torch.nn.Module, Callable[[], None]]] = {
        "shared": (ours.model, lambda: update_shared(policy, prompt, responses)),
        "separate_our_attention": (ours.model, one_by_one_with_our_attention),
        "separate_one_by_one": (stock.model, one_by_one),
        "separate_one_batch": (stock.model, lambda: update_separately(stock, prompt, responses)),
    }
    best_s, found = dict.fromkeys(ways, float("inf")), {}
    for run in range(arguments.repeat + 1):
        for name, (model, update) in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            update()
            if run:
                best_s[name] = min(best_s[name], time.perf_counter() - start)
            found[name] = gradients(model)
    separate_s = min(best_s["separate_one_by_one"], best_s["separate_one_batch"])
    difference = (found["shared"] - found["separate_one_by_one"]).abs().max() / found["separate_one_by_one"].abs().max()
    count, length = responses.shape
    report = {
        "prompt_tokens": len(prompt),
        "responses": arguments.responses,
        "response_tokens": arguments.response_tokens,
        "prefix_passes": {"shared": 1, "separate": arguments.responses},
        "parameters": sum(p.numel() for p in ours.model.model.language_model.parameters()),
        "device": "cpu",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "wall_s": {name: round(value, 4) for name, value in best_s.items()},
        "ratio": round(separate_s / best_s["shared"], 2),
        "ratio_our_attention": round(best_s["separate_our_attention"] / best_s["shared"], 2),
        "token_ratio": round(count * (len(prompt) - 1 + length) / (len(prompt) - 1 + count * length), 2),
        "gradient_difference": float(f"{difference.item():.2g}"),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
