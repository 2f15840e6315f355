"""The processes of a run on a mesh (dp, sp): where this one stands, and what the loops tell each other.

    sp  ranks that share every prompt and make the same calls     (sequence.py)
    dp  groups of those, each with cohorts of its own

How many share a prompt may depend on its length: the same processes are then laid out in several ways (`deal`).

Process number = dp rank x sp + rank in its sp group, which sequence.py lays out further. Process 0 is the main one,
which alone writes. A run of one process has no process group, and none of the messages below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from longrl.config import ParallelConfig
from longrl.parallel.layout import JOIN_S, balanced, require_world
from longrl.parallel.sequence import SequenceGroup
from longrl.plan.devices import host_share_bytes
from longrl.runtime import rank_and_size

GRACE_S = 3.0
"""A rank that others have left waits so long before it ends: torchrun is to report the rank that failed, not this."""

Degree = Callable[[int], tuple[int, int]]
"""Prompt tokens -> (ranks that the heads are split over, places of a ring): as sequence.py lays out a group."""

T = TypeVar("T")
P = ParamSpec("P")


class Ranks:
    """This process among the others. Whatever a method says is told to some ranks, all of those call it."""

    def __init__(
        self,
        everyone: dist.ProcessGroup | None = None,
        dp: dist.ProcessGroup | None = None,
        sp: SequenceGroup | None = None,
        others: Others | None = None,
    ) -> None:
        """
        Without groups: one process.

        Args:
            sp: None: every rank takes prompts of its own.
            others: layouts of the same processes for other prompts than the shortest.
        """
        self.everyone, self.dp = everyone, dp
        self.rank, self.size = _place(everyone)
        self.dp_rank, self.dp_size = _place(dp)
        self.sp, self.others = sp, others
        self.sp_rank, self.sp_size = (0, 1) if sp is None else (sp.rank, sp.size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def layout(self, tokens: int) -> Ranks:
        """Of the processes, for a prompt of so many tokens."""
        return self if self.others is None else self.others.at(*self.others.degree(tokens))

    def deal(self, tokens: Sequence[int], lengths: Sequence[int]) -> list[tuple[Ranks, list[int]]]:
        """Which cohorts of a step this rank takes, and in which layout of the processes; all take those in this order.

        Args:
            tokens: of each cohort; groups of ranks get about as many each.
            lengths: of the longest prompt of each, which the layout depends on.

        Returns:
            Each layout that is used, the smallest degree first, with the indices of this rank's cohorts, ascending.
        """
        degrees = [(1, 1) if self.others is None else self.others.degree(length) for length in lengths]
        dealt = []
        for heads, ring in sorted(set(degrees), key=lambda one: (one[0] * one[1], one[1])):
            layout = self if self.others is None else self.others.at(heads, ring)
            members = [i for i, degree in enumerate(degrees) if degree == (heads, ring)]
            part = balanced([tokens[i] for i in members], layout.dp_size)[layout.dp_rank]
            dealt.append((layout, [members[k] for k in part]))
        return dealt

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
        return _tell(None if self.sp is None else self.sp.group or dist.group.WORLD, make, *args, **kwargs)

    def from_main(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` returns on the main rank, told to all."""
        return _tell(self.everyone, make, *args, **kwargs)


class Others:
    """Layouts of the same processes, made when they are first used: by all at the same time, as all draw the same."""

    def __init__(self, size: int, degree: Degree, timeout: timedelta) -> None:
        self.size, self.degree, self.timeout = size, degree, timeout
        self._made: dict[tuple[int, int], Ranks] = {}

    def at(self, heads: int, ring: int) -> Ranks:
        """
        Raises:
            ValueError: the processes cannot be put in such groups.
        """
        if (heads, ring) not in self._made:
            require_world(self.size, heads * ring)
            self._made[heads, ring] = make_ranks(self.size, heads * ring, self.timeout, ring)
        return self._made[heads, ring]


@contextmanager
def start_ranks(
    config: ParallelConfig, rule: Callable[[int, int | None, int], Degree] | None = None
) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; one that was started otherwise is alone.

    Args:
        rule: of `sp: auto`, for so many processes with at least so many bytes of GPU memory (None: there are no GPUs)
            and of host memory each.

    Raises:
        ValueError: their number is not a multiple of config.sp.
        RuntimeError: a rank never came, has ended, or did not answer within config.timeout_s.
    """
    _, size = rank_and_size()
    sp = 1 if config.sp == "auto" else config.sp
    require_world(size, sp)
    if size == 1:
        yield ALONE
        return
    timeout = timedelta(seconds=config.timeout_s)
    gpu_bytes = None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        gpu_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _join(backend, timeout)
    try:
        degree = None
        if rule and config.sp == "auto":  # of the least memory, so that all lay the processes out in the same way
            gpus, hosts = zip(*_gather(dist.group.WORLD, (gpu_bytes, host_share_bytes())), strict=True)
            degree = rule(size, None if None in gpus else min(gpus), min(hosts))
        yield make_ranks(size, sp, timeout, config.ring, degree)
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


def _join(backend: str, timeout: timedelta) -> None:
    """
    Raises:
        RuntimeError: not all processes came within `timeout`, or JOIN_S if that is less.
    """
    patience = min(timeout, timedelta(seconds=JOIN_S))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))  # pyright: ignore
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        rank, size = rank_and_size()
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(
            f"not all {size} processes came within {patience.total_seconds():g} s ({' '.join(str(error).split())}); "
            f"see whether each node has started its own, and reaches {where}, where rank 0 listens"
        ) from error


def make_ranks(size: int, sp: int, timeout: timedelta, ring: int = 1, degree: Degree | None = None) -> Ranks:
    """A mesh of the first `size` processes. Every process calls it; what those outside get is of no use.

    Args:
        size: a multiple of sp.
        ring: a divisor of sp.
        timeout: how long a rank waits for the others. A new group does not inherit it.
        degree: sp is 1, and prompts of some lengths have groups of their own.
    """
    mesh = torch.arange(size).view(-1, ring, sp // ring)

    def mine(groups: torch.Tensor) -> Any:
        return dist.new_subgroups_by_enumeration(groups.tolist(), timeout=timeout)[0]

    everyone: Any = dist.new_group(mesh.flatten().tolist(), timeout=timeout)
    dp, shared = mine(mesh.flatten(1).T), mine(mesh.flatten(1))
    rows_and_columns = (mine(mesh.flatten(0, 1)), mine(mesh.transpose(1, 2).flatten(0, 1))) if ring > 1 else ()
    group = SequenceGroup(shared, *rows_and_columns) if sp > 1 else None
    return Ranks(everyone, dp, group, Others(size, degree, timeout) if degree else None)


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
