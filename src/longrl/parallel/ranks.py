"""The processes of a run on a mesh (dp, sp): where this one stands, and what the loops tell each other.

    sp  ranks that share every prompt and make the same calls     (sequence.py)
    dp  groups of those, each with cohorts of its own

Process number = dp rank x sp + rank in its sp group. Process 0 is the main one, which alone writes. A run of one
process has no process group, and none of the messages below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from longrl.config import ParallelConfig
from longrl.parallel.layout import require_world
from longrl.parallel.sequence import SequenceGroup
from longrl.runtime import rank_and_size

GRACE_S = 3.0
"""A rank that others have left waits so long before it ends: torchrun is to report the rank that failed, not this."""

T = TypeVar("T")
P = ParamSpec("P")


class Ranks:
    """This process among the others. Whatever a method says is told to some ranks, all of those call it."""

    def __init__(
        self,
        everyone: dist.ProcessGroup | None = None,
        dp: dist.ProcessGroup | None = None,
        sp: dist.ProcessGroup | None = None,
    ) -> None:
        """Without groups: one process. Otherwise all three, of which sp may have one rank."""
        self.everyone, self.dp = everyone, dp
        self.rank, self.size = _place(everyone)
        self.dp_rank, self.dp_size = _place(dp)
        self.sp_rank, self.sp_size = _place(sp)
        self.sp = None if sp is None or dist.get_world_size(sp) == 1 else SequenceGroup(sp)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, x: T) -> list[T]:
        """The x of every dp rank, on each. Ranks that share a prompt have the same x."""
        return _gather(self.dp, x)

    def gather_all(self, x: T) -> list[T]:
        """The x of every rank, on each."""
        return _gather(self.everyone, x)

    def gather_sp(self, x: T) -> list[T]:
        """The x of every rank that shares a prompt with this one, on each."""
        return _gather(None if self.sp is None else self.sp.group, x)

    def once(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` returns on one of the ranks that share a prompt, told to the others: for what need not come out
        the same in every call, as a difference would part their ways."""
        return _tell(None if self.sp is None else self.sp.group, make, *args, **kwargs)

    def from_main(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` returns on the main rank, told to all."""
        return _tell(self.everyone, make, *args, **kwargs)


@contextmanager
def start_ranks(config: ParallelConfig) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; one that was started otherwise is alone.

    Raises:
        ValueError: their number is not a multiple of config.sp.
        RuntimeError: another rank has ended, or did not answer within config.timeout_s.
    """
    _, size = rank_and_size()
    require_world(size, config.sp)
    if size == 1:
        yield ALONE
        return
    timeout = timedelta(seconds=config.timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield make_ranks(size, config.sp, timeout)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # whose errors have no type of their own
            raise
        time.sleep(GRACE_S)
        raise RuntimeError(
            f"lost the other ranks: one ended, or did not answer within parallel.timeout_s ({config.timeout_s:g} s); "
            f"see its own message ({error})"
        ) from error
    # not after an error: the others may never come to it
    dist.destroy_process_group()


def make_ranks(size: int, sp: int, timeout: timedelta) -> Ranks:
    """A mesh of the first `size` processes. Every process calls it; what those outside get is of no use.

    Args:
        size: a multiple of sp.
        timeout: how long a rank waits for the others. A new group does not inherit it.
    """
    mesh = torch.arange(size).view(-1, sp)
    everyone: Any = dist.new_group(mesh.flatten().tolist(), timeout=timeout)
    dp: Any
    shared: Any
    dp, _ = dist.new_subgroups_by_enumeration(mesh.T.tolist(), timeout=timeout)
    shared, _ = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout=timeout)
    return Ranks(everyone, dp, shared)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _gather(group: dist.ProcessGroup | None, x: T) -> list[T]:
    if group is None:
        return [x]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x, group)
    return parts


def _tell(group: dist.ProcessGroup | None, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    if group is None:
        return make(*args, **kwargs)
    told: list[Any] = [make(*args, **kwargs) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return told[0]


ALONE = Ranks()
"""One process."""
