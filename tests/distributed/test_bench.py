"""The benchmark's paths on two processes: the gradients of one, and what they send."""

from __future__ import annotations

import pytest

from longrl.bench.work import Work
from tests.parity.test_bench import check, measure

pytestmark = pytest.mark.distributed


def test_every_path_on_two_processes(capsys):
    work = Work(prompt_tokens=70, group_size=3, response_tokens=5, video_tokens=32, sp=2)
    rows, _ = measure(work, capsys)
    check(work, rows, {"plain": 14, "reuse": 14, "mrsp": 13, "shared": 5, "fused": 3, "stock": 14})
    assert [row["same_as"] for row in rows.values()] == [None] * 6
    encodings = {"plain": 8, "reuse": 1, "mrsp": 1, "shared": 1, "fused": 1, "stock": 8}
    assert {path: row["encodings"] for path, row in rows.items()} == encodings
    sent = {path: row["bytes_sent"] for path, row in rows.items()}
    # responses dealt out share nothing; reuse tells the others the frames it encoded, once: a frame pair of 16 tokens
    assert sent["plain"] == sent["stock"] == 0
    assert sent["reuse"] == 2 * 16 * 256 * 4
    assert sent["reuse"] < sent["fused"] < sent["shared"] < sent["mrsp"]
