"""Processes of a test, from a server that has imported what they need, once for all: most of a start is that."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_IMPORTED = ["longrl.cli", "longrl.inference", "tests.distributed.loops", "tests.distributed.media"]
"""Before the first process is started."""


def start_ranks(process: Callable[..., None], size: int, *args: Any) -> None:
    """Calls process(rank, size, *args) in `size` processes, and waits for them.

    Raises:
        Exception: of torch.multiprocessing, with the traceback of the first that failed.
    """
    import torch

    multiprocessing.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(process, args=(size, *args), nprocs=size, start_method="forkserver")


def run_command(
    arguments: Sequence[str], cwd: Path, folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """`python -m longrl` with these arguments, as subprocess.run does it; sys.path and the seed of hashes are the
    server's.

    Args:
        folder: where what it prints is kept until it ends.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    printed = folder / "stdout", folder / "stderr"
    for path in printed:
        path.touch()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_command, args=(arguments, cwd, dict(os.environ), printed))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(list(arguments), timeout_s)
    out, err = (path.read_text(encoding="utf-8") for path in printed)
    return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


def _command(arguments: Sequence[str], cwd: Path, environment: dict[str, str], printed: Sequence[Path]) -> None:
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["longrl", *arguments]
    try:
        runpy.run_module("longrl", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue] - multiprocessing ends without
