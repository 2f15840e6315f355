"""Processes that make one call together: what they return, and what happens when one fails."""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest
import torch

from longrl.config import ParallelConfig, RlConfig
from longrl.parallel.processes import in_processes
from longrl.parallel.ranks import start_ranks
from longrl.parallel.sequence import SequenceGroup
from longrl.plan.devices import host_share_bytes
from longrl.plan.plan import degree_rule, max_prompt_tokens
from tests.distributed.conftest import start

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


def on_uneven_machines(rank: int, size: int, config: RlConfig, port: int, tokens: int) -> None:
    """Of two machines, the second of which has four processes."""
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, LOCAL_WORLD_SIZE="14"[rank])
    with start_ranks(config.parallel, partial(degree_rule, config)) as ranks:
        assert ranks.others is not None
        assert ranks.others.degree(tokens) == (2, 1)


def test_all_lay_processes_out_as_the_one_with_the_least_memory_must():
    given = {"run_dir": "run", "steps": 1, "model": {"path": "tiny:qwen2_5_vl", "device": "cpu"}}
    config = RlConfig.model_validate(given | {"parallel": {"sp": "auto"}})
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    first, second = (max_prompt_tokens(alone, 2, None, host_share_bytes() // count) for count in (1, 4))
    assert first > second
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(on_uneven_machines, 2, config, port, second + 1)
