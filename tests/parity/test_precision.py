"""Passes in bfloat16 beside fp32 weights: what is stored stays fp32, and what is lost is stated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longrl import policy as policy_module
from longrl.config import OptimConfig, RolloutConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.optim import Optimizer
from longrl.parallel.shard import local
from longrl.policy import Policy, collect_gradients
from longrl.rollout.native import NativeEngine
from longrl.types import Example
from tests.parity.test_adapters import run, with_adapters
from tests.parity.test_shared_prefix import make_prompts, plain, responses_of

BF16 = torch.bfloat16


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all of the model."""
    assert ours.keys() == theirs.keys()
    apart = torch.stack([torch.dist(ours[name], theirs[name]) for name in theirs]).norm()
    return float(apart / torch.stack([x.norm() for x in theirs.values()]).norm())


def gradients(policy: Policy) -> dict[str, Tensor]:
    named = policy.trunk.named_parameters()
    return {name: local(p.grad).clone() for name, p in named if p.grad is not None}


def make(lora: bool, compute_dtype: torch.dtype | None) -> Policy:
    family = with_adapters() if lora else Qwen25VL.tiny(0, torch.float32)
    return Policy(family, compute_dtype=compute_dtype)


def stock(lora: bool) -> dict[str, Tensor]:
    """The gradients of stock transformers in bfloat16 throughout, every response its own sequence."""
    policy = make(lora, None)
    rows, responses, weights, _ = run(policy)
    policy.trunk.zero_grad()
    for parameter in policy.family.model.parameters():  # the rotary angles stay in fp32, as loading leaves them
        parameter.data = parameter.data.to(BF16)
    rows = [replace(row, media=tuple(replace(x, embeds=x.embeds.to(BF16)) for x in row.media)) for row in rows]
    plain(policy.family, rows, responses, weights)  # pyright: ignore
    return {name: x.float() for name, x in gradients(policy).items()}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_gradients_are_as_near_to_fp32_as_bfloat16_allows(monkeypatch, lora):
    """bfloat16 has 8 bits: each product is off by up to 2e-3, and four layers there and back add up some twenty."""
    found, logprobs = {}, {}
    for name, compute_dtype, stream_tokens in (("fp32", None, 8192), ("one pass", BF16, 8192), ("several", BF16, 30)):
        monkeypatch.setattr(policy_module, "STREAM_TOKENS", stream_tokens)
        policy = make(lora, compute_dtype)
        logprobs[name] = run(policy)[-1]
        policy.reshard()
        found[name] = gradients(policy)
    theirs = relative(stock(lora), found["fp32"])
    for name in ("one pass", "several"):
        assert {x.dtype for x in found[name].values()} == {torch.float32}
        assert 1e-3 < relative(found[name], found["fp32"]) < min(1.2 * theirs, 5e-2)
        assert logprobs[name].dtype == torch.float32
        assert 1e-3 < (logprobs[name] - logprobs["fp32"]).abs().max() < 0.15


def test_passes_are_in_bfloat16_and_updates_in_fp32():
    """A step of 1e-6, which a bfloat16 weight would not show, is taken, and seen by passes once it has added up."""
    policy = make(False, BF16)
    prompts = make_prompts(policy.family, 90, ["what comes first?"])  # pyright: ignore
    prefix = policy.prefix(prompts)
    assert {x.dtype for x in prefix.kv()} == {BF16}
    streams = make_streams(prompts, responses_of(policy.family, [5]), prefix.length)  # pyright: ignore
    before = policy.logprobs(prefix, streams)[0]
    policy.backward(prefix, streams, lambda logprobs, entropy, rows: -logprobs.sum())
    policy.reshard()
    optimizer = Optimizer(policy.trunk.parameters(), OptimConfig(lr=1e-6), 1)
    weights = [local(p).clone() for p in policy.trunk.parameters()]
    optimizer.step(1, 5, ["q0"])
    steps = torch.cat([(local(p) - was).flatten() for p, was in zip(policy.trunk.parameters(), weights, strict=True)])
    assert all(local(p).dtype == torch.float32 for p in policy.trunk.parameters())
    # AdamW's first step is lr times the gradient's sign (and a little weight decay)
    assert ((steps.abs() > 5e-7) & (steps.abs() < 2e-6)).float().mean() > 0.9
    with torch.no_grad():
        for parameter in policy.trunk.parameters():
            local(parameter).mul_(1.05)
    assert (policy.logprobs(policy.prefix(prompts), streams)[0] - before).abs().max() > 1e-2


def test_engine_and_trainer_agree_as_bfloat16_can():
    """Decoding is in the same type, gathers the weights once, and draws from fp32 log-probs."""
    policy = make(False, BF16)
    prompts = make_prompts(policy.family, 60, ["what comes first?", "who?"])  # pyright: ignore
    examples = [Example(id=f"q{i}", messages=(), answer=None, kind="open") for i in range(2)]
    with torch.no_grad():
        engine = NativeEngine(policy, RolloutConfig(group_size=4, max_new_tokens=12))
        [(groups, prefix)] = engine.rollout(examples, prompts, [0, 1])
    rows = [(group.prompt, one) for group in groups for one in group.rollouts]
    streams = make_streams([prompt for prompt, _ in rows], [one.token_ids for _, one in rows], prefix.length)
    trainer = policy.logprobs(prefix, streams)[0][streams.mask]
    sampled = torch.tensor([x for _, one in rows for x in one.logprobs])
    # logits of about 8 are 0.03 apart from their neighbours in bfloat16
    assert (trainer - sampled).abs().max() < 0.15
    assert (trainer - sampled).abs().mean() < 0.02


def test_gradients_of_keys_add_up_in_fp32():
    """64 passes: rounded once each, not once more at every addition."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(64, 1000, generator=generator).to(BF16)
    errors = []
    for passes in (64, 1):  # 1: as if a single pass followed, which needs no fp32 sum
        leaf = torch.zeros(1000, dtype=BF16, requires_grad=True)
        collect = collect_gradients([leaf], passes)
        for part in parts:
            (leaf * part).sum().backward()
        [total] = collect()
        errors.append((total.double() - parts.double().sum(0)).norm() / parts.double().sum(0).norm())
        assert total.dtype == (torch.float32 if passes > 1 else BF16)
        assert (leaf.grad is None) == (passes > 1)
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3


def test_many_passes_lose_no_more_than_one(monkeypatch):
    """Of the prefix's gradient, whose sum over 16 micro-batches goes through the keys and values: against fp32."""
    monkeypatch.setattr(policy_module, "STREAM_TOKENS", 8)
    errors = {}
    exact = make(False, None)
    run(exact)
    for wide in (True, False):
        if not wide:  # bfloat16 sums, as without the hook
            monkeypatch.setattr(policy_module, "collect_gradients", lambda leaves, passes: collect_gradients(leaves, 1))
        policy = make(False, BF16)
        run(policy)
        policy.reshard()
        errors[wide] = relative(gradients(policy), gradients(exact))
    assert errors[True] <= errors[False] * 1.02
    assert errors[True] < 3e-2
