"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.forked import run_command

# Before torch is imported: test processes run side by side, so one thread each; and no test may reach for a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, bool | None, bool | None]:
    """A signal that a test blocks (`longrl.stopping.listen`) is not blocked in those after it, nor in children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        return (yield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def longrl(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own, in tmp_path if no other folder is given."""

    def run(*arguments: object, cwd: Path = tmp_path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return run_command([*map(str, arguments)], cwd, tmp_path_factory.mktemp("printed"), timeout_s)

    return run
