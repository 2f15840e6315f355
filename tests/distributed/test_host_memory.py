"""The host memory of a rank that encodes does not grow with the clip, the ranks or the group: the benchmark, small."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def test_memory_does_not_grow(root):
    """Pixels of the long clip: 396 MB; a chunk of 128 frames with its patches is what is held, whoever encodes it.

    The bound of 20 MB is room for the allocator's free lists; beside it, a rank that held or sent all pixels of its
    share would need 66 MB more for the long clip than for the short one, on four ranks, and 264 MB more in one process.
    """
    risen = {}
    for seconds, ranks, group_size in [(600, 1, 2), (1800, 1, 8), (1800, 2, 2)]:
        command = [sys.executable, "benchmarks/host_memory.py", "--seconds", str(seconds)]
        command += ["--ranks", str(ranks), "--group-sizes", str(group_size)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=300)
        found = json.loads(done.stdout)
        risen[seconds, ranks, group_size] = max(found["encode_mb"]), max(found["sample_mb"])
        assert found["pixels_mb"] > 2.5 * max(found["encode_mb"]) or seconds == 600
    (encode, sample), *others = risen.values()
    for more_encode, more_sample in others:
        assert more_encode < encode + 20
        assert more_sample < max(sample, encode) + 20
