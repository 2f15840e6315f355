"""What each process of the test of flow runs does: one step, in every way of sharing the work."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrl import train_flow as train_flow_module
from longrl.config_files import load_config
from longrl.flow_config import FlowConfig
from longrl.flow_training import FlowTraining
from longrl.optim import Optimizer
from longrl.parallel.ranks import Ranks, make_ranks
from longrl.parallel.shard import whole
from longrl.train_flow import train_flow

TIMEOUT = timedelta(minutes=15)
CASES: dict[str, list[str]] = {
    "adapters": ["flow.kl_coef=0.1"],
    "adapters, an odd number of prompts": ["prompts_per_step=3"],
    "all weights": ["model.lora=null", "flow.kl_coef=0.1"],
    "fast": ["flow.preset=flow_grpo_fast"],
    "mix, videos": ["flow.preset=mix_grpo", "model.path=tiny:wan", "media.frames=5"],
    "nft": ["flow.preset=diffusion_nft", "sampling.guidance=1"],
}
SHARDED = ("adapters", "all weights")


class Kept(FlowTraining):
    """Keeps what each update is made from, and the weights that are evaluated last."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: list[dict[str, torch.Tensor]] = []
        step = Optimizer.step

        def recorded(count: int, *rest: Any) -> Any:
            names = list(self.denoiser.weights)
            grads = {name: x.grad for name, x in self.denoiser.weights.items() if x.grad is not None}
            assert names
            self.gradients.append({name: x.clone() / rest[0] for name, x in whole(grads, True).items()})
            return step(self.optimizer, count, *rest)

        self.optimizer.step = recorded  # type: ignore[method-assign]
        found.append(self)


found: list[Kept] = []


def run_case(case: str, config: Path, folder: Path, ranks: Ranks, shard: bool) -> dict[str, Any]:
    found.clear()
    changes = [
        f"run_dir={folder / case}{' sharded' if shard else ''}",
        *CASES[case],
        f"processes.shard={shard}".lower(),
    ]
    loaded = load_config([config], changes)
    assert isinstance(loaded, FlowConfig)
    train_flow(loaded, ranks)
    [training] = found
    return {"gradients": training.gradients, "weights": training.denoiser.packed()}


def run(rank: int, size: int, folder: str, config: str) -> None:
    torch.set_num_threads(1)
    train_flow_module.FlowTraining = Kept  # type: ignore[misc]
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    ranks = make_ranks(size, 1, TIMEOUT)
    results = {
        (case, shard): run_case(case, Path(config), Path(folder) / "shared", ranks, shard)
        for case in CASES
        for shard in (False, True)
        if case in SHARDED or not shard
    }
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()
