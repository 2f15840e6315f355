"""Processes on this machine that make one call together and hand back what it returned. Each has a GPU of its own where
there are so many; messages about tensors on it go by NCCL, all others by gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from longrl.parallel.sequence import SequenceGroup

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = timedelta(hours=2)
"""Ranks that have less to do wait so long for the others; one that fails ends all at once."""


def in_processes(
    size: int, call: Callable[Concatenate[SequenceGroup | None, P], T], *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Calls call(sp, ...) in `size` new processes; sp is None in a single one.

    Args:
        call: a function of a module; it, the arguments and what it returns are pickled.

    Returns:
        What it returned in each, by rank.

    Raises:
        RuntimeError: one of them failed; the others were ended.
    """
    multiprocessing.set_forkserver_preload([call.__module__])  # imports once for all
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
                _process, args=(size, folder, call, args, kwargs), nprocs=size, start_method="forkserver"
            )
        except ProcessException as error:
            why = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"one of {size} processes failed: {why}") from error
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(size)]


def _process(rank: int, size: int, folder: str, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    sp = None
    if size > 1:
        cuda = torch.cuda.device_count() >= size
        if cuda:
            torch.cuda.set_device(rank)
        store = dist.FileStore(f"{folder}/store", size)  # pyright: ignore[reportPrivateImportUsage]
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        sp = SequenceGroup()
    torch.save(call(sp, *args, **kwargs), _result(folder, rank))
    if size > 1:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"
