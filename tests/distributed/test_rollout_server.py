"""Several ranks with one rollout server = one process: weights, metrics, and what is taken up."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from longrl.parallel.ranks import ALONE
from longrl.report.metrics import read_metrics
from tests.distributed import served
from tests.distributed.conftest import start
from tests.distributed.served import LAYOUTS
from tests.distributed.test_loops import distance, farthest
from tests.rollout_server import ServerProcess

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(dataset, tmp_path_factory) -> tuple[Path, dict[str, str], list[dict[Any, str]]]:
    """Where runs are, and what they came to: of one process, and of each rank."""
    folder, rows = tmp_path_factory.mktemp("served"), str(dataset.train_rl)
    alone, mine = {}, folder / "alone"
    with (
        ServerProcess(served.config(mine, "on-policy", rows, None), folder / "server") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(served.train_rl_module, "Training", served.Watched)
        patch.setattr(served.Watched, "stop_in", 0)
        alone["on-policy"] = served.run_job("on-policy", mine, rows, None, ALONE)
        alone["ahead"] = served.run_job("ahead", mine, rows, server.url, ALONE)
        patch.setattr(served.Watched, "stop_in", 2)
        alone["stopped"] = served.run_job("taken up", mine, rows, server.url, ALONE)
        patch.setattr(served.Watched, "stop_in", 0)
        start(served.run, 2, str(folder), rows, server.url, server.process.pid)
        server.process.wait()
        server.start()
        alone["lost"] = served.run_job("lost", mine, rows, server.url, ALONE)
    return folder, alone, [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def same(folder: Path, ours: str, theirs: str) -> None:
    """fp64: what is left is the order of sums."""
    whole, largest = distance(ours, theirs)
    assert whole < 1e-12
    assert largest < 1e-9
    mine, other = (measured(Path(model).parents[2]) for model in (ours, theirs))
    assert len(mine) == served.STEPS
    assert farthest(mine, other) < 1e-9


def measured(run: Path) -> list[dict[str, Any]]:
    """But for times, which have other names where a server draws, and the cache of each process."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: x for name, x in line.items() if not name.startswith(("time/", "cache/"))} for line in lines]


@pytest.mark.parametrize("job", ["on-policy", "ahead"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_make_the_run_of_one_process(found, layout, job):
    folder, alone, ranks = found
    assert ranks[0][layout, job] == ranks[1][layout, job]
    same(folder, ranks[0][layout, job], alone[job])


def test_rollouts_that_one_process_had_drawn_ahead_go_on_with_two(found):
    folder, alone, ranks = found
    assert "stopped after step 2 of 3 and saved" in alone["stopped"]
    same(folder, ranks[0]["taken up"], alone["ahead"])


def test_all_ranks_stop_when_the_server_is_lost_and_the_run_goes_on(found):
    folder, alone, ranks = found
    for rank in ranks:
        assert "is away" in rank["lost"]
        assert "and saved; start it again" in rank["lost"]
    same(folder, alone["lost"], alone["ahead"])
