"""What a layer's backward recomputes instead of keeping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longrl.parallel.kernels import KERNELS

T = TypeVar("T")


def recomputed(run: Callable[..., T], *args: Any, keep_attention: bool = False) -> T:
    """run(*args), of which only the arguments are kept for the backward, which runs it again.

    Args:
        keep_attention: the output and log-sum-exp of each attention are kept too: one more [tokens, width] of memory,
            and nearly all of the time that long sequences would lose.
    """
    if not torch.is_grad_enabled():
        return run(*args)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)} if keep_attention else {}
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **contexts)  # pyright: ignore


def _keep(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KERNELS else CheckpointPolicy.PREFER_RECOMPUTE


class TiledMLP(nn.Module):
    """A layer's MLP run over some tokens at a time: its inner activations exist for those alone, also in the backward.

    It has the parameters of the MLP it stands for, by the same names.
    """

    def __init__(self, mlp: nn.Module, tokens: int) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._run, self._tokens = mlp.forward, tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., T, D]."""
        if hidden.shape[-2] <= self._tokens:
            return self._run(hidden)
        return torch.cat([recomputed(self._run, tile) for tile in hidden.split(self._tokens, -2)], -2)
