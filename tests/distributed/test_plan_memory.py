"""Ranks that share a prompt take the memory that is planned for them, by heads (Ulysses) and by positions (ring)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longrl.parallel.sequence import SequenceGroup
from longrl.plan.devices import find_device
from longrl.plan.memory import plan_memory
from longrl.plan.work import Setup, Work
from tests.distributed.conftest import start
from tests.parity.memory import Step

WORK = Work(prompt_tokens=1024, group_size=8, response_tokens=4)
SETUPS = (
    Setup(ulysses=2),
    Setup(ulysses=2, recompute="layer"),
    Setup(ring=2, recompute="layer"),
    Setup(ring=2, recompute="keep_attention"),
)


def measure(rank: int, size: int, folder: str) -> None:
    """Writes the peak of each setup, (live, planned) without what is there at any time, to FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=15))
    alone = [dist.new_group([i]) for i in range(size)][rank]
    found = []
    for setup in SETUPS:
        step = Step(WORK, setup, SequenceGroup(None, alone, dist.group.WORLD) if setup.ring > 1 else SequenceGroup())
        memory = plan_memory(step.shape, WORK, setup, find_device("CPU"))
        steady = sum(memory.phases["optimizer"].values())
        found.append((step.peak_live_bytes() - steady, memory.peak_bytes - steady))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_live_tensors_of_a_rank_peak_where_planned(tmp_path):
    start(measure, 2, str(tmp_path))
    for rank in (0, 1):
        for setup, (live, planned) in zip(SETUPS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert live == pytest.approx(planned, rel=0.15), setup
