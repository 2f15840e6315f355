"""Starts the processes of a test: from a server that has imported what they need, once for all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from tests.e2e.conftest import dataset

__all__ = ["dataset", "start"]


def start(process: Callable[..., None], size: int, *args: Any) -> None:
    """Calls process(rank, size, *args) in `size` processes, and waits for them.

    Raises:
        Exception: of torch.multiprocessing, with the traceback of the first that failed.
    """
    multiprocessing.set_forkserver_preload(
        ["tests.distributed.ranks", "tests.distributed.loops", "tests.distributed.media"]
    )
    torch.multiprocessing.start_processes(process, args=(size, *args), nprocs=size, start_method="forkserver")
