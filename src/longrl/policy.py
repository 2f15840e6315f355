"""The policy: a model driven by its trunk, and the three-phase backward that reads each prefix once.

    1. prefix forward   keys and values of the shared tokens, attached to the graph
    2. suffix           they enter as detached leaves; streams forward and backward leave gK, gV in them
    3. prefix backward  one backward of (keys, values) with (gK, gV)

Exact: prompt tokens carry no loss, so the loss reaches the prefix's part of the graph only through its keys and values.
Gradients are accumulated un-normalised; optim.py divides once, by the global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from longrl.config import ALL_KEPT, DataRunConfig, MemoryConfig, ModelConfig
from longrl.models import load_family
from longrl.models.family import Family
from longrl.models.streams import Streams, split_length
from longrl.models.trunk import Trunk
from longrl.parallel.layout import require_heads
from longrl.parallel.ranks import Ranks
from longrl.parallel.sequence import SequenceGroup
from longrl.parallel.shard import gathered, reshard, shard
from longrl.types import Prefix, Prompt

STREAM_TOKENS = 8192
"""Tokens of one suffix micro-batch."""

StreamLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(logprobs [n, R], entropy [n, R], which rows) -> a scalar loss sum."""


class Policy:
    """A family's model, its trunk, and how many updates it has had."""

    def __init__(
        self,
        family: Family,
        *,
        memory: MemoryConfig = ALL_KEPT,
        sp: SequenceGroup | None = None,
        sharded: bool = False,
    ) -> None:
        """
        Args:
            memory: what backward passes recompute.
            sp: the ranks that share every prompt; each calls the same methods with the same prompts and streams.
            sharded: they share the weights too.

        Raises:
            ValueError: the model's heads cannot be dealt to that many ranks.
        """
        if sp is not None:
            require_heads(family.model.config.get_text_config().num_key_value_heads, sp.size)
        self.family = family
        self.trunk = Trunk(family.parts(), memory=memory, sp=sp)
        if sharded:
            assert sp is not None, "one rank has nobody to share the weights with"
            shard(self.trunk, self.trunk.blocks, sp)
        self.version = 0

    def prefix(self, prompts: Sequence[Prompt]) -> Prefix:
        """Computes, once, the tokens that all these prompts share (of a single prompt: all but the last)."""
        return self.trunk("prefix", prompts[0], split_length(prompts), self.version)

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, sharded weights are whole: for decoding, which would gather them for each token otherwise."""
        return gathered(self.trunk, self.trunk.blocks)

    def reshard(self) -> None:
        """Called before weights are changed or saved."""
        reshard(self.trunk)

    def logprobs(self, prefix: Prefix, streams: Streams, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [N, R] of the streams, without gradients."""
        with torch.no_grad():
            parts = [self.trunk("suffix", prefix, streams[rows], temperature) for rows in micro_batches(streams)]
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)

    def backward(self, prefix: Prefix, streams: Streams, loss: StreamLoss, temperature: float = 1.0) -> None:
        """Accumulates the gradient of the summed loss over all streams into the parameters, and releases the prefix.

        In a sequence group that is this rank's share; `sum_gradients` adds the others' before the optimizer step.
        """
        leaves = prefix.leaves()
        for rows in micro_batches(streams):
            logprobs, entropy = self.trunk("suffix", leaves, streams[rows], temperature)
            loss(logprobs, entropy, rows).backward()
        torch.autograd.backward(
            prefix.keys + prefix.values,
            [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves.keys + leaves.values],
        )
        prefix.release()


def load_policy(model: ModelConfig, config: DataRunConfig, ranks: Ranks) -> Policy:
    """A model on the ranks of a run.

    Args:
        model: config.model, or another checkpoint of it.

    Raises:
        ValueError: as load_family and Policy.
    """
    family = load_family(model, config.runtime.seed)
    return Policy(family, memory=config.memory, sp=ranks.sp, sharded=config.parallel.shard)


def micro_batches(streams: Streams) -> Iterator[slice]:
    """Row slices of at most STREAM_TOKENS tokens each (at least one row)."""
    count, length = streams.token_ids.shape
    rows = max(1, STREAM_TOKENS // length)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
