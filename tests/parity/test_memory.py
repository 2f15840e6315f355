"""What recomputation runs again, and what a prefix pass does not run at all."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrl.config import MemoryConfig
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import make_streams
from longrl.parallel.kernels import KERNELS
from longrl.policy import Policy
from tests.parity.test_shared_prefix import make_prompts, responses_of

LAYERS = 4


class Calls(TorchDispatchMode):
    """Counts the calls of kernels, and of products with an MLP's wide side."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.rows = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func in KERNELS
        if func is torch.ops.aten.mm.default:
            self.rows[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def run(memory: MemoryConfig):
    """Calls of a prefix's forward, and of its backward."""
    family = Qwen25VL.tiny(0, torch.float32)
    policy = Policy(family, memory=memory)
    prompts = make_prompts(family, 90, ["who?"])
    with Calls() as forward:
        prefix = policy.prefix(prompts)
    streams = make_streams(prompts, responses_of(family, [4]), prefix.length)
    leaves = prefix.leaves()
    logprobs, _ = policy.trunk("suffix", leaves, streams)
    logprobs.sum().backward()
    grads = [leaf.grad for leaf in leaves.keys + leaves.values]
    with Calls() as backward:
        torch.autograd.backward(prefix.keys + prefix.values, grads)
    return prefix.length, forward, backward


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("layer", LAYERS - 1), ("keep_attention", 0)])
def test_attention_is_run_again_only_where_it_is_not_kept(recompute, again):
    _, forward, backward = run(MemoryConfig(recompute=recompute))
    assert (forward.attention, backward.attention) == (LAYERS - 1, again)  # the last layer of a prefix has none


def test_the_mlp_is_run_in_tiles():
    length, whole, _ = run(MemoryConfig())
    _, tiled, _ = run(MemoryConfig(mlp_tile_tokens=40))
    wide = Qwen25VL.tiny(0, torch.float32).model.config.get_text_config().intermediate_size
    # gate and up read [tokens, D], down reads [tokens, wide]
    assert whole.rows[length, wide] == LAYERS - 1
    assert tiled.rows[length, wide] == 0
    assert tiled.rows[40, wide] == (LAYERS - 1) * (length // 40)
    assert tiled.rows[length % 40, wide] == LAYERS - 1
