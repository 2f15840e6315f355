"""The host memory of a rank that encodes does not grow with the clip, the ranks or the group: the benchmark, small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import host_memory
from tests.distributed.conftest import start

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def rise(folder: Path, seconds: int, ranks: int, group_size: int) -> float:
    """MB, of the rank that needs most; chunks of 16 frames."""
    folder.mkdir()
    video = folder / "clip.mp4"
    host_memory.render(video, seconds)
    start(host_memory.measure, ranks, str(folder), str(video), seconds, group_size, 8)
    risen = [host_memory.read(folder, rank)[0] for rank in range(ranks)]
    return max(max(each.values()) for each in risen)


def test_memory_does_not_grow(tmp_path):
    """Ten times the clip, twice the ranks, four times the group. The bound leaves room for the allocator's free lists;
    the pixels of a rank's share are 66 MB, of the whole clip 132 MB."""
    assert rise(tmp_path / "long", 600, 2, 8) < rise(tmp_path / "short", 60, 1, 2) + 20
