"""Gradients that ranks hold a share of each, summed once before the optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from longrl.parallel.shard import local

BUCKET = 25_000_000
"""Elements of one message, and of the copy it takes."""


def sum_gradients(
    parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None = None, bucket: int = BUCKET
) -> None:
    """Replaces each parameter's gradient by its sum over the group.

    A parameter that has a gradient on some ranks only gets zeros on the others, so that all make the same messages; one
    that has none anywhere keeps None, because an optimizer decays the weights of what has a gradient of zero.

    Args:
        parameters: the same on every rank, in the same order; of a sharded one, the same shard.
        group: of torch.distributed; None: all processes.
        bucket: elements of one message.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    pieces: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter, somewhere in zip(parameters, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pieces.setdefault(parameter.grad.dtype, []).extend(local(parameter.grad).view(-1).split(bucket))
    for same_dtype in pieces.values():
        waiting: list[torch.Tensor] = []
        for piece in same_dtype:
            if sum(len(x) for x in waiting) + len(piece) > bucket:
                _sum(waiting, group)
                waiting = []
            waiting.append(piece)
        _sum(waiting, group)


def _sum(pieces: list[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """pieces: flat views, written in place."""
    flat = torch.cat(pieces)
    dist.all_reduce(flat, group=group)
    for piece, total in zip(pieces, flat.split([len(x) for x in pieces]), strict=True):
        piece.copy_(total)
