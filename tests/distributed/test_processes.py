"""Processes that make one call together: what they return, and what happens when one fails."""

from __future__ import annotations

import pytest
import torch

from longrl.parallel.processes import in_processes
from longrl.parallel.sequence import SequenceGroup

pytestmark = pytest.mark.distributed


def total(sp: SequenceGroup | None, x: int, *, broken: int | None = None) -> tuple[int, int]:
    """This rank's number, and the sum over the ranks of x times theirs."""
    if sp is None:
        return 0, x
    if sp.rank == broken:
        raise ValueError(f"rank {broken} is broken")
    parts = sp.all_gather(torch.tensor([x * sp.rank]), "scores")  # waits for all
    return sp.rank, int(sum(parts))


def test_each_rank_returns():
    assert in_processes(1, total, 5) == [(0, 5)]
    assert in_processes(2, total, 5) == [(0, 5), (1, 5)]


def test_one_that_fails_ends_all():
    with pytest.raises(RuntimeError, match="one of 2 processes failed: ValueError: rank 1 is broken"):
        in_processes(2, total, 5, broken=1)
