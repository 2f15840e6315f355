"""What each process of the tests with a rollout server does: runs on two layouts, and one whose server is lost.

The same function on `ALONE` is the slow twin.
"""

from __future__ import annotations

import os
import pickle
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrl import train_rl as train_rl_module
from longrl.config import RlConfig
from longrl.parallel.ranks import Ranks, make_ranks
from longrl.stopping import Stopped, listen
from longrl.train_rl import train_rl
from longrl.training import Training
from tests import in_process

TIMEOUT = timedelta(minutes=15)
STEPS = 3
LAYOUTS = {"dp 2": {"sp": 1}, "sp 2, sharded": {"sp": 2, "shard": True}}
JOBS: dict[str, dict[str, Any]] = {
    "on-policy": {"model": {"path": "tiny:qwen2_5_vl", "dtype": "float64"}},
    "ahead": {"rollout": {"max_staleness": 1}, "algo": {"correction": "truncate"}},
    "taken up": {"rollout": {"max_staleness": 1}, "algo": {"correction": "truncate"}},
    "lost": {"rollout": {"max_staleness": 1}, "algo": {"correction": "truncate"}},
}


def config(folder: Path, job: str, rows: str, url: str | None, **changes: Any) -> RlConfig:
    """fp64, so that what differs is not rounding. url: None: rollouts by the process itself."""
    changes = JOBS[job] | changes
    server = {} if url is None else {"server": {"urls": [url], "retry_s": 2.0}}
    settings: dict[str, Any] = {
        "run_dir": str(folder / job),
        "model": {"path": "tiny:qwen2_5_vl", "dtype": "float64"},
        "data": {"train": rows, "share_media": 2},
        "cache": {"dir": str(folder.parent / "cache")},
        "runtime": {"tensorboard": False, "threads": 1},
        "prompts_per_step": 4,
        "optim": {"lr": 1e-3},
        "steps": STEPS,
        "rewards": {"tests.e2e.rewards:first_token_even": 1.0},
        **changes,
    }
    settings["scoring"] = in_process(settings["rewards"])
    sampling = {"group_size": 4, "max_new_tokens": 4}
    return RlConfig.model_validate(settings | {"rollout": sampling | changes.get("rollout", {}) | server})


class Watched(Training):
    """Is told to stop in one step, or ends the server in it."""

    stop_in = 0
    kill: tuple[int, int] = (0, 0)
    """The step, and whom."""

    def update(self, step: int, *rest: Any) -> Any:
        if step == self.stop_in:
            signal.raise_signal(signal.SIGUSR1)
        if step == self.kill[0] and self.ranks.is_main:
            os.kill(self.kill[1], signal.SIGKILL)
        return super().update(step, *rest)


def run_job(job: str, folder: Path, rows: str, url: str | None, ranks: Ranks, **changes: Any) -> str:
    """The folder of the last model, or why the run stopped."""
    listen()
    train_rl_module.Training = Watched  # pyright: ignore
    try:
        return str(train_rl(config(folder, job, rows, url, **changes), ranks))
    except Stopped as stop:
        return str(stop)


def run(rank: int, size: int, folder: str, rows: str, url: str, server: int) -> None:
    """The process of one rank: writes what it found to FOLDER/RANK.pickle. server: its process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    found = {}
    for name, parallel in LAYOUTS.items():
        ranks = make_ranks(size, parallel["sp"], TIMEOUT)
        for job in ("on-policy", "ahead"):
            found[name, job] = run_job(job, Path(folder, name), rows, url, ranks, parallel=parallel)
    ranks, alone = make_ranks(size, 1, TIMEOUT), Path(folder, "alone")
    found["taken up"] = run_job("taken up", alone, rows, url, ranks)
    Watched.kill = (1, server)
    found["lost"] = run_job("lost", alone, rows, url, ranks)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
