"""Weights shared out to the ranks that share a prompt (FSDP2), with gradients and optimizer state; to nobody else.

A Block and the Trunk's own parts are gathered for each pass and dropped after it. Sharded over sp alone, because its
ranks make the same passes and data-parallel ranks do not: those add up their shards' gradients once a step.

The same on a mesh of one rank keeps the weights whole and lets passes compute in another type than that in which
weights are stored and gradients added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longrl.parallel.sequence import SequenceGroup


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    sp: SequenceGroup | None,
    compute_dtype: torch.dtype | None = None,
    device: str | None = None,
) -> None:
    """Called before an optimizer is made, because it replaces the parameters; those of `root` are its own, not the
    blocks'.

    Args:
        sp: who shares the weights; None: this rank keeps them.
        compute_dtype: of the gathered weights, and so of what passes compute; None: as stored. Gradients are then
            added up in fp32.
        device: where passes compute, while the weights stay on the CPU and come a block at a time; None: where they
            are.
    """
    group: Any = _alone() if sp is None else sp.group
    mesh = DeviceMesh.from_group(group, device or next(root.parameters()).device.type, mesh_dim_names=("sp",))
    home = OffloadPolicy() if device is None else CPUOffloadPolicy(pin_memory=device != "cpu")
    precision = MixedPrecisionPolicy()
    if compute_dtype is not None:
        # what enters is of the embedding's type already; casting would also take the rotary angles and wide keys
        precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for module in (*blocks, root):
        sharded = fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=home)
        # gradients are summed, and divided once by the global count; both settings are of this module alone
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    # what FSDP2 prefetches by itself follows the order of the last forward, which is gone when the prefix's backward,
    # the dear one, comes after the suffix's
    for after, before in pairwise((root, *reversed(blocks))):
        after.set_modules_to_backward_prefetch([before])  # pyright: ignore


def _alone() -> Any:
    """A group of this rank."""
    if not dist.is_initialized():  # a run of one process, which has none
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


@contextmanager
def gathered(root: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, for many passes without gradients, the weights are gathered once and stay."""
    blocks = [block for block in blocks if isinstance(block, FSDPModule)]
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
        reshard(root)


def reshard(root: nn.Module) -> None:
    """Before the weights are changed or saved: a module that is still gathered would go on with what it has."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(tensors: Mapping[str, Tensor], keep: bool, folder: Path | None = None) -> dict[str, Tensor]:
    """Sharded tensors in full, gathered one after the other; every rank of their group calls it.

    Args:
        tensors: by name; what is there twice (tied weights) comes out as one.
        keep: False: this rank only takes part, and gets nothing.
        folder: what is not in this rank's host memory anyway is written to files there, which are mapped into it: of a
            model that has no room, the system keeps what is being read. None: all comes into memory.
    """
    full: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) in full:
            continue
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1:
            x, is_here = tensor.full_tensor().detach(), False
        else:
            x, is_here = local(tensor).detach(), tensor.device.type == "cpu"
        if not keep:
            x = torch.empty(0)
        elif not is_here:
            x = x.cpu() if folder is None else _in_file(x, folder / str(len(full)))
        full[id(tensor)] = x
    return {} if not keep else {name: full[id(tensor)] for name, tensor in tensors.items()}


def each_whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Sharded tensors in full, where they are computed with, gathered when it is their turn and not kept; every rank of
    their group goes through all of them. What is there twice (tied weights) comes once."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1:
            tensor = tensor.full_tensor()
        yield name, local(tensor).detach()


def _in_file(x: Tensor, path: Path) -> Tensor:
    x.cpu().flatten().view(torch.uint8).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=x.numel(), dtype=x.dtype).view(x.shape)
