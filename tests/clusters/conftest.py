"""What the tests of Slurm and Ray use: the installed command itself, as these start it again elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import dataset

__all__ = ["dataset", "longrl"]


@pytest.fixture
def longrl(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, cwd: Path = tmp_path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "longrl", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)

    return run
