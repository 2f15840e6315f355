"""Trains the quickstart's SFT model with presets of `algorithm`, two updates a batch, and says what it brought.

    python benchmarks/presets.py                 all presets
    python benchmarks/presets.py dapo gspo       some; arguments with a = change the quickstart: rl.steps=40

Videos, embeddings and SFT model are made once and shared; only the RL stage is a preset's own. What was interrupted
goes on where it stopped. Accuracy is that on the held-out choice questions; the standard error is that of the gain,
paired by question. Prints JSON, one line a preset.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from longrl.algo_config import PRESETS
from longrl.config import QuickstartConfig, RlConfig
from longrl.config_files import load_config
from longrl.data.examples import Skips
from longrl.data.synthetic.dataset import build_dataset
from longrl.evals.runner import evaluate, load_questions
from longrl.models import load_family
from longrl.policy import Policy
from longrl.quickstart import stages
from longrl.report.metrics import read_metrics
from longrl.rewards.compose import build_rewards
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft

ROOT = Path(__file__).parents[1]
PACE: dict[str, float] = {}
"""Learning rates, if not the quickstart's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="PRESET | KEY=VALUE", help="no preset: all")
    parser.add_argument("--dir", type=Path, default=Path("runs/presets"))
    asked = parser.parse_args()
    names = [one for one in asked.given if "=" not in one] or list(PRESETS)
    common = [
        *(f"{key}={asked.dir / name}" for key, name in (("videos.dir", "videos"), ("cache.dir", "cache"))),
        *("rl.steps=20", "rl.algo.updates_per_batch=2", "runtime.tensorboard=false"),
        *(one for one in asked.given if "=" in one),
    ]
    sft, rl = configure([f"run_dir={asked.dir}", *common])
    model = train_sft(sft)
    before = measure(rl, model, asked.dir / "sft.json")
    for name in names:
        pace = [f"rl.optim.lr={PACE[name]}"] if name in PACE else []
        _, rl = configure([f"run_dir={asked.dir / name}", f"rl.algorithm={name}", *pace, *common])
        trained = train_rl(rl.model_copy(update={"model": rl.model.at(model)}))
        print(json.dumps(row(name, rl, before, measure(rl, trained, asked.dir / f"{name}.json"))), flush=True)


def configure(changes: list[str]) -> Any:
    """The two stages of the quickstart with such changes."""
    config = load_config([ROOT / "configs" / "tiny" / "quickstart.yaml"], changes)
    assert isinstance(config, QuickstartConfig)
    return stages(config, build_dataset(config.videos))


def measure(config: RlConfig, model: Path, path: Path) -> list[float]:
    """The share of right samples of each held-out choice question, kept in a file."""
    if not path.exists():
        skips = Skips(config.data)
        policy, rewards = Policy(load_family(config.model.at(model))), build_rewards(config.rewards, config.scoring)
        evaluate(policy, load_questions(config, skips), config, skips, rewards, stage=path.stem).write(path)
    asked = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return [
        statistics.mean(response["correct"] for response in one["responses"])
        for one in asked
        if one["kind"] == "choice"
    ]


def row(name: str, config: RlConfig, before: list[float], after: list[float]) -> dict[str, Any]:
    gains = [late - early for early, late in zip(before, after, strict=True)]
    steps = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    clipped = [step["clip/low"] + step["clip/high"] for step in steps if step["loss"] is not None]
    found = {
        "before": statistics.mean(before),
        "after": statistics.mean(after),
        "gain": statistics.mean(gains),
        "standard_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "clipped_mean": statistics.mean(clipped),
        "clipped_max": max(clipped),
        "train_s": sum(step["wall_s"] for step in steps),
    }
    settings = {"preset": name, "lr": config.optim.lr, "steps": len(steps), "questions": len(gains)}
    return settings | {key: round(value, 5) for key, value in found.items()}


if __name__ == "__main__":
    main()
