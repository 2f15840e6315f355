"""`longrl bench step`: one GRPO step of one prompt along several paths, with the same weights and samples.

plain    prefill and decode; then every response is a sequence of its own, once for its old log-probs and once in
         the update: what most stacks do, at the micro-batch that is fastest here
shared   prefill and decode; then the prompt once for all old log-probs and once in the update
fused    the prompt once: the prefill is the update's prefix forward, and its log-probs are the old ones
stock    not a path of ours: stock transformers (SDPA) in the place of the passes of plain

Attention to a shared prefix is summed in fp64 on the CPU (parallel/attend.py), all else is fp32: the separate sequences
of plain have the cheaper kernel.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from longrl.config import RolloutConfig
from longrl.models.streams import Streams, make_streams
from longrl.models.trunk import ATTENTION, TrunkParts
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Example, Group, Prefix, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    prompt_tokens: int
    group_size: int
    response_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One path. Seconds are of its fastest run: other work on the machine only adds."""

    path: str
    seconds: float
    micro_batch: int | None
    """Sequences a pass, where they are separate."""
    prefix_passes: int
    """In forward passes over the prompt; a backward pass counts two."""
    flops: float
    """Counted, without recomputation."""
    over_floor: float
    """Seconds over those that the counted operations take at this machine's measured rate of matrix products."""
    peak_bytes: int | None
    """Memory above what there was before the step; None where the system does not tell (not Linux)."""
    max_rel_grad_diff: float | None
    """Of a parameter to plain's, over max(its largest gradient, 1e-3 x the model's largest)."""


def bench_step(work: Work, repeats: int, threads: int | None, as_json: bool) -> None:
    """Measures and prints. The paths take turns, so that a slow minute of the machine does not fall on one of them."""
    if threads is not None:
        torch.set_num_threads(threads)
    step = _Step(work)
    separate = [n for n in (1, 2, 4, 8, 16) if n <= work.group_size]
    runs = [("fused", None), ("shared", None), *((path, n) for path in ("plain", "stock") for n in separate)]
    seconds = dict.fromkeys(runs, float("inf"))
    gradients: dict[tuple[str, int | None], list[Tensor]] = {}
    for repeat in range(repeats + 1):
        for run in runs:
            began = time.perf_counter()
            step.run(*run)
            if repeat:
                seconds[run] = min(seconds[run], time.perf_counter() - began)
            else:
                gradients[run] = step.gradients(run[0])
            step.model.zero_grad()
            step.stock_model.zero_grad()
    rate = _matmul_rate()
    fastest = {path: min((k for k in runs if k[0] == path), key=seconds.__getitem__) for path, _ in runs}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = {
            run: pool.submit(_peak_bytes, work, torch.get_num_threads(), *run).result() for run in fastest.values()
        }
    found = [
        Measured(
            path=path,
            seconds=seconds[key],
            micro_batch=key[1],
            prefix_passes=step.prefix_passes(path),
            flops=step.flops(path),
            over_floor=seconds[key] * rate / step.flops(path),
            peak_bytes=peaks[key],
            max_rel_grad_diff=_difference(gradients[key], gradients[fastest["plain"]]),
        )
        for path, key in fastest.items()
    ]
    _print(work, found, rate, as_json)


class _Body:
    """A text-only decoder with random weights, in the place of a family."""

    stop_ids = frozenset({-1})  # every response has its full length

    def __init__(self, attention: str) -> None:
        config = Qwen2Config(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=1 << 20,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Qwen2ForCausalLM(config)
        self.tokenizer = self
        self.model.set_attn_implementation(attention)

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def parts(self) -> TrunkParts:
        body = self.model.model
        return TrunkParts(
            embed=body.embed_tokens,
            layers=body.layers,
            norm=body.norm,
            rotary=body.rotary_emb,
            head=self.model.lm_head,
        )


class _Step:
    """The step's paths. Each leaves its gradients in the parameters."""

    def __init__(self, work: Work) -> None:
        self.work = work
        body: Any = _Body(ATTENTION)
        self.model, self.stock_model = body.model, _Body("sdpa").model
        self.policy = Policy(body)
        config = RolloutConfig(group_size=work.group_size, max_new_tokens=work.response_tokens, max_streams=1 << 20)
        self.engine = NativeEngine(self.policy, config)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1024, (work.prompt_tokens,), generator=generator)
        self.prompt = Prompt(token_ids=ids, position_ids=torch.arange(len(ids))[None], media=(), media_slots=())
        self.example = Example(id="bench", messages=(), answer=None, kind="open")
        self.advantages = torch.randn(work.group_size, 1, generator=generator)

    def fused(self) -> None:
        group, prefix = self._rollout()
        self.policy.backward(prefix, self._streams(group, prefix.length), self._loss(None))

    def shared(self) -> None:
        with torch.no_grad():
            group, _ = self._rollout()
            prefix = self.policy.prefix([self.prompt])
        streams = self._streams(group, prefix.length)
        old, _ = self.policy.logprobs(prefix, streams)
        self.policy.backward(self.policy.prefix([self.prompt]), streams, self._loss(old))

    def separate(self, micro_batch: int, logprobs_of: Callable[[Streams], Tensor]) -> None:
        with torch.no_grad():
            group, _ = self._rollout()
        streams = self._streams(group, 0)
        parts = [slice(i, i + micro_batch) for i in range(0, self.work.group_size, micro_batch)]
        with torch.no_grad():
            old = torch.cat([logprobs_of(streams[rows]) for rows in parts])
        for rows in parts:
            self._loss(old)(logprobs_of(streams[rows]), old, rows).backward()

    def ours(self, streams: Streams) -> Tensor:
        none: Any = [None] * len(self.policy.trunk.blocks)
        return self.policy.trunk("suffix", Prefix(none, none, 0, 0), streams)[0]

    def stock(self, streams: Streams) -> Tensor:
        hidden = self.stock_model.model(streams.token_ids, use_cache=False).last_hidden_state
        first = self.work.prompt_tokens - 1
        logits = self.stock_model.lm_head(hidden[:, first:])
        logprobs = logits.log_softmax(-1).gather(-1, streams.labels[:, first:, None])[..., 0]
        return torch.nn.functional.pad(logprobs, (first, 0))

    def run(self, path: str, micro_batch: int | None) -> None:
        if micro_batch is None:
            (self.fused if path == "fused" else self.shared)()
        else:
            self.separate(micro_batch, self.ours if path == "plain" else self.stock)

    def gradients(self, path: str) -> list[Tensor]:
        model = self.stock_model if path == "stock" else self.model
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    def prefix_passes(self, path: str) -> int:
        return {"fused": 3, "shared": 5}.get(path, 1 + 4 * self.work.group_size)

    def flops(self, path: str) -> float:
        """Of products with weights and of attention, the causal half; a backward pass counts two forward passes."""
        work, config = self.work, self.model.config
        weights = sum(p.numel() for block in self.policy.trunk.blocks for p in block.parameters() if p.ndim > 1)
        prompt, new = work.prompt_tokens - 1, work.response_tokens

        def forward(tokens: int, before: int) -> float:
            """tokens in a row, each seeing `before` others, itself and those of the row before it."""
            return tokens * (2 * weights + 4 * config.num_hidden_layers * config.hidden_size * (before + tokens / 2))

        head = 2 * config.hidden_size * config.vocab_size * new
        prefix, suffix = forward(prompt, 0), work.group_size * (forward(new, prompt) + head)
        separate = work.group_size * (forward(prompt + new, 0) + head)
        return {"fused": 3 * prefix + 4 * suffix, "shared": 5 * prefix + 5 * suffix}.get(
            path, prefix + suffix + 4 * separate
        )

    def _rollout(self) -> tuple[Group, Prefix]:
        (((group,), prefix),) = self.engine.rollout([self.example], [self.prompt], [0])
        return group, prefix

    def _streams(self, group: Group, prefix_length: int) -> Streams:
        responses = [rollout.token_ids for rollout in group.rollouts]
        return make_streams([self.prompt] * len(responses), responses, prefix_length)

    def _loss(self, old: Tensor | None) -> Callable[[Tensor, Tensor, slice], Tensor]:
        def loss(logprobs: Tensor, _: Tensor, rows: slice) -> Tensor:
            before = logprobs.detach() if old is None else old[rows]
            return -(self.advantages[rows] * ((logprobs - before).exp() - 1)).sum()

        return loss


def _difference(found: list[Tensor], plain: list[Tensor]) -> float:
    largest = max(float(g.abs().max()) for g in plain)
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * largest)
        for a, b in zip(found, plain, strict=True)
    )


def _matmul_rate() -> float:
    """Floating-point operations a second in fp32 products of a prompt's hidden states with a layer's weights."""
    a, b = torch.randn(2048, 256), torch.randn(256, 1024)
    best = float("inf")
    for _ in range(100):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 * 256 * 1024 / best


def _peak_bytes(work: Work, threads: int, path: str, micro_batch: int | None) -> int | None:
    """In a process of its own: resident memory that the step needs above what was there before it."""
    torch.set_num_threads(threads)
    step = _Step(work)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest so far: what imports took
        status = Path("/proc/self/status")
        before = _kib(status.read_text(), "VmRSS")
        step.run(path, micro_batch)
        return 1024 * (_kib(status.read_text(), "VmHWM") - before)
    except OSError:
        return None


def _kib(status: str, name: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:"))


def _print(work: Work, found: list[Measured], rate: float, as_json: bool) -> None:
    about = asdict(work) | {
        "ranks": 1,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "matmul_flops_per_s": rate,
    }
    by_path = {one.path: one for one in found}
    plain = by_path["plain"]
    if as_json:
        for one in found:
            times = {"speedup": plain.seconds / one.seconds, "speedup_by_flops": plain.flops / one.flops}
            typer.echo(json.dumps(asdict(one) | about | times))
        return
    typer.echo(
        f"{work.prompt_tokens} prompt tokens, {work.group_size} responses of {work.response_tokens} tokens, "
        f"fp32, {about['threads']} threads, products at {rate / 1e9:.0f} GFLOP/s"
    )
    typer.echo("path      seconds  x plain  by FLOPs  passes  x floor  peak MB  gradient difference  micro-batch")
    for one in found:
        peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.0f}"
        typer.echo(
            f"{one.path:8}{one.seconds:9.3f}{plain.seconds / one.seconds:9.2f}{plain.flops / one.flops:10.2f}"
            f"{one.prefix_passes:8}{one.over_floor:9.1f}{peak:>9}{one.max_rel_grad_diff:21.1e}"
            f"{'-' if one.micro_batch is None else one.micro_batch:>13}"
        )
