"""Measures training steps of `longrl flow` on a twin: full Flow-GRPO against presets that train a window. Prints JSON.

    python benchmarks/flow.py            two minutes on two cores
    python benchmarks/flow.py --twin wan

What a window costs depends on its place: the steps before it are computed once for a group. MixGRPO's moves in order,
and is measured at the first place, the middle one and the last; Flow-GRPO-Fast's is drawn anew each step, from all
places. Steps of the presets take turns, so that each round gives a paired ratio. Sampling, decoding, reward and update
count; equal prompts, group size, sampling steps and guidance. CPU seconds of the process beside wall-clock seconds: the
former do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from longrl.config_files import load_config
from longrl.data.media_prompts import load_prompts
from longrl.flow_config import FlowConfig
from longrl.flow_training import FlowTraining, begin_run, load_family
from longrl.report.metrics import Metrics
from longrl.rewards.media import MediaRewards
from longrl.train_flow import learn_step, sample_step

ROOT = Path(__file__).parents[1]
RUNS = {"flow_grpo": 0.0, "flow_grpo_fast": 0.0, "mix_grpo": 0.0, "mix_grpo, middle": 0.5, "mix_grpo, end": 1.0}
"""Preset -> how far a window that moves in order has come."""


class Run:
    """One preset's training, a step at a time."""

    def __init__(self, name: str, twin: str, folder: Path, steps: int, group: int) -> None:
        preset = name.partition(",")[0]
        changes = [f"run_dir={folder / name}", f"model.path=tiny:{twin}",
                   f"flow.preset={preset}", f"flow.group_size={group}", "flow.kl_coef=0",
                   f"sampling.steps={steps}", "warm_up_steps=0", "runtime.tensorboard=false",
                   f"prompts.train={ROOT / 'configs/tiny/colours.txt'}"]  # fmt: skip
        config = load_config([ROOT / "configs" / "tiny" / f"{twin}.yaml"], changes)
        assert isinstance(config, FlowConfig)
        self.training = FlowTraining(config, begin_run(config, load_family(config)))
        self.sampler = self.training.sampler(steps, config.flow.shared_start)
        self.prompts, self.rewards = load_prompts(config.prompts.train), MediaRewards(config.rewards)
        algo = config.flow
        places = len(algo.window_starts(steps)) if algo.window else 1
        self.metrics, self.step = Metrics(None), algo.window_every * int(RUNS[name] * (places - 1))

    def __call__(self) -> tuple[float, float]:
        """One step: CPU and wall-clock seconds."""
        self.step += 1
        cpu, wall = time.process_time(), time.perf_counter()
        with self.metrics.step(self.step):
            totals, samples, ids = sample_step(
                self.training, self.sampler, self.prompts, self.step, self.rewards, self.metrics
            )
            learn_step(self.training, self.sampler, samples, totals, self.step, ids, self.metrics)
        return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", choices=("sd3", "wan"), default="sd3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--group", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Run(name, given.twin, Path(folder), given.steps, given.group) for name in RUNS}
        for run in runs.values():
            run()  # the first step encodes the prompts
        rounds = [{name: run() for name, run in runs.items()} for _ in range(given.rounds)]
    for name in RUNS:
        for i, clock in enumerate(("cpu", "wall")):
            ratios = [one[name][i] / one["flow_grpo"][i] for one in rounds]
            seconds = statistics.median(one[name][i] for one in rounds)
            row = {"twin": given.twin, "preset": name, "clock": clock, "seconds": round(seconds, 4)}
            row |= {name: round(f(ratios), 3) for name, f in (("ratio", statistics.median), ("ratio_most", max))}
            print(json.dumps(row | {"rounds": given.rounds, "steps": given.steps, "group_size": given.group}))


if __name__ == "__main__":
    main()
