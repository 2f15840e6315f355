"""What each process of the tests of the loops does: every run on every layout of up to four ranks, in one start.

The same functions on `ALONE` are the slow twin: one process, the same configuration.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longrl import train_rl as train_rl_module
from longrl import train_sft as train_sft_module
from longrl.config import EvalRunConfig, ParallelConfig, RlConfig, RolloutConfig, SftConfig
from longrl.evals.runner import run_eval
from longrl.parallel.ranks import Ranks, make_ranks, start_ranks
from longrl.parallel.shard import local
from longrl.policy import Policy
from longrl.rollout import engine as engine_module
from longrl.rollout.native import NativeEngine
from longrl.stopping import Stopped, listen
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.training import Training
from longrl.types import Example, Prefix, Prompt, Rollout
from tests import LONG, in_process
from tests.distributed.ranks import CASES, make_family, make_prompts

TIMEOUT = timedelta(minutes=15)
"""Ranks without a part in a layout wait for those that have one."""


@dataclass(frozen=True)
class Layout:
    dp: int
    sp: int
    shard: bool = False
    ring: int = 1
    auto: bool = False

    def __str__(self) -> str:
        if self.auto:
            return f"{self.dp} processes, laid out by prompt"
        ring = f" in rings of {self.ring}" if self.ring > 1 else ""
        return f"dp {self.dp}, sp {self.sp}{ring}" + (", sharded" if self.shard else "")


LAYOUTS = [
    Layout(2, 1),
    Layout(1, 2),
    *([Layout(2, 2), Layout(1, 2, True)] if LONG else []),
    Layout(2, 2, True),
    Layout(1, 4, True, ring=2),
    Layout(4, 1, auto=True),
]


def degree(tokens: int) -> tuple[int, int]:
    """A made-up rule: short prompts stay on one process, the next longer are shared by two, ..."""
    return next(degree for most, degree in DEGREES if tokens <= most)


DEGREES = [(60, (1, 1)), (63, (2, 1)), (64, (2, 2))]
"""Prompts of up to so many tokens; the longest about a video have 56, 63 or 64."""

JOBS: dict[str, dict[str, Any]] = {
    "recorded": {"kind": "rl", "steps": 10, "algo": {"max_logprob_diff": 1e9}},  # a test is to say what is wrong
    "live": {
        "kind": "rl",
        "steps": 4,
        "model": {"dtype": "float64"},
        "memory": {"recompute": "layer"},
        "algo": {"kl": "k3", "kl_coef": 0.1, "normalise": "sequence", "updates_per_batch": 2},
        "rewards": {"tests.e2e.rewards:late_for_some": 1.0},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "prompts_in_flight": 2},
        "eval_every_steps": 2,
        "eval": {"samples": 2},
        "checkpoint": {"every_steps": 2, "keep": 9},
    },
    "resumed": {"kind": "rl", "steps": 4, "model": {"dtype": "float64"}},  # saved only where it is stopped
    "sft": {"kind": "sft", "steps": 4, "model": {"dtype": "float64"}},
    "bfloat16": {"kind": "sft", "steps": 3, "model": {"compute_dtype": "bfloat16"}},
    "encoder": {
        "kind": "sft",
        "steps": 3,
        "model": {"dtype": "float64", "train": ["language", "projector", "tower"]},
    },
    "adapters": {
        "kind": "rl",
        "steps": 4,
        "model": {"dtype": "float64", "lora": {"rank": 4}},
        "memory": {"recompute": "layer"},
        "algo": {"kl": "k3", "kl_coef": 0.1},
        "checkpoint": {"every_steps": 1},
    },
    "eval": {"kind": "eval", "model": {"dtype": "float64"}, "eval": {"samples": 2}},
}
"""What is changed in `base`. `live` draws its own responses; `recorded` gets those that one process drew."""


SAMPLE = {
    "ring": ["recorded", "eval"],
    "auto": ["recorded", "live", "eval"],
    "whole": ["recorded", "live", "adapters", "encoder", "eval"],
}


def jobs(layout: Layout) -> list[str]:
    """Those done on a layout. `resumed` changes it, and is done apart."""
    if not LONG and layout.dp * layout.sp > 2:
        return SAMPLE["auto" if layout.auto else "ring" if layout.ring > 1 else "whole"]
    return [job for job in JOBS if job != "resumed"]


def base(job: str, folder: Path, rows: dict[str, str]) -> dict[str, Any]:
    """A run's configuration; rows: train, eval, sft -> JSONL file."""
    changes = JOBS[job]
    kind = changes["kind"]
    settings: dict[str, Any] = {
        "run_dir": str(folder / job),
        "model": {"path": "tiny:qwen2_5_vl", **changes.get("model", {})},
        "data": {
            "train": rows["sft" if kind == "sft" else "train"],
            "eval": rows["eval"],
            "on_error": "skip",
            "share_media": 3,
        },
        "cache": {"dir": str(folder / "cache")},
        "runtime": {"tensorboard": False, "threads": 1},
    }
    if kind != "eval":
        settings |= {"prompts_per_step": 4, "optim": {"lr": 1e-3}}
    if kind != "sft":
        settings["rollout"] = {"group_size": 4, "max_new_tokens": 6}
        settings["rewards"] = {"tests.e2e.rewards:first_token_even": 1.0}
    settings |= {name: value for name, value in changes.items() if name != "model"}
    return settings | ({} if kind == "sft" else {"scoring": in_process(settings["rewards"])})


RESUMED = {"alone": 1, "dp 2, sp 2, sharded": 2, "dp 1, sp 2": 3, "alone again": 4}
"""Which layouts take a run up one after the other, and the step in which the last rank of each is told to stop."""
TAKEN_UP = {"resumed": "resumed", "adapters taken up": "adapters"}
"""Folder of a run that is taken up so -> its job."""


class Engine(NativeEngine):
    """Notes what it draws, by seed; hands out what was recorded instead, where there is something."""

    drawn: ClassVar[dict[int, list[Rollout]]] = {}
    recorded: ClassVar[dict[int, list[Rollout]]] = {}

    def _decode_in_turns(
        self, prefixes: Sequence[Prefix], prompts: Sequence[Sequence[Prompt]], seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        groups = (
            [self.recorded[s] for s in seeds] if self.recorded else super()._decode_in_turns(prefixes, prompts, seeds)
        )
        self.drawn.update(zip(seeds, groups, strict=True))
        return groups


class Kept(Training):
    """Notes what each step gave this rank to do, and is found after the run."""

    last: ClassVar[Kept]
    stop_in: ClassVar[int] = 99

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Kept.last, self.shares, self.degrees = self, [], set()

    def draw(self, examples: Any, step: int) -> Any:
        if step == self.stop_in and self.ranks.rank == self.ranks.size - 1:
            signal.raise_signal(signal.SIGUSR1)
        batch = super().draw(examples, step)
        self.shares.append([example.id for share in batch.shares for example in share.examples])
        self.degrees |= {(share.ranks.dp_size, share.ranks.sp and share.ranks.sp.heads.size) for share in batch.shares}
        return batch


def watch(put: Callable[[Any, str, Any], None] = setattr) -> None:
    put(engine_module, "NativeEngine", Engine)
    for module in (train_rl_module, train_sft_module):
        put(module, "Training", Kept)


def run_job(
    job: str, folder: Path, rows: dict[str, str], ranks: Ranks, layout: Layout, name: str | None = None
) -> dict[str, Any]:
    """One run, and what this rank knows after it. name: of its folder, if not the job's."""
    parallel = {"sp": layout.sp, "ring": layout.ring, "shard": layout.shard}
    settings = base(job, folder, rows) | {"parallel": parallel, "run_dir": str(folder / (name or job))}
    recording = folder.parent / "recorded.pickle"
    Engine.drawn, Engine.recorded = {}, {}
    if job == "recorded" and recording.exists():
        Engine.recorded = pickle.loads(recording.read_bytes())
    if settings["kind"] == "eval":
        return {"result": run_eval(EvalRunConfig.model_validate(settings), ranks)}
    if settings["kind"] == "sft":
        model = train_sft(SftConfig.model_validate(settings), ranks)
    else:
        model = train_rl(RlConfig.model_validate(settings), ranks)
    return {
        "model": str(model),
        "drawn": Engine.drawn,
        "shares": Kept.last.shares,
        "degrees": Kept.last.degrees,
        "digest": digest(Kept.last),
    }


def digest(training: Training) -> str:
    """Of all weights that a rank has: equal on ranks that have the same bits."""
    found = hashlib.sha256()
    for parameter in training.policy.trunk.parameters():
        full = getattr(parameter, "full_tensor", lambda p=parameter: p)()
        found.update(full.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def resume(name: str, folder: Path, rows: dict[str, str], ranks: Ranks, layout: Layout) -> None:
    """Takes the runs up for one step."""
    listen()
    for taken_up, job in TAKEN_UP.items():
        Kept.stop_in = step = RESUMED[name]
        with pytest.raises(Stopped, match=f"after step {step} of 4 and saved") if step < 4 else nullcontext():
            run_job(job, folder / "taken up", rows, ranks, layout, taken_up)
        Kept.stop_in = 99


class Messages(TorchDispatchMode):
    """Counts messages by their operation."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kinds[func._schema.name] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def held(ranks: Ranks) -> dict[str, Any]:
    """What a rank holds of sharded weights, and how often they are gathered: (decoded tokens, passes) -> times."""
    assert ranks.sp is not None
    policy = Policy(make_family(None, 2, torch.float32), sp=ranks.sp, sharded=True)
    parameters = list(policy.trunk.parameters())
    case = CASES["twin"]
    prompts = make_prompts(policy.family, case)  # pyright: ignore
    examples = [Example(id=str(i), messages=(), answer=None, kind="open") for i in range(len(prompts))]
    gathers = {}
    for tokens in (3, 3, 9):  # once to begin with
        engine = NativeEngine(policy, RolloutConfig(group_size=2, max_new_tokens=tokens))
        with torch.no_grad(), Messages() as messages:
            [(_, prefix)] = engine.rollout(examples, prompts, range(len(prompts)))
        prefix.release()
        gathers[tokens] = messages.kinds["c10d::_allgather_base_"]
    return {
        "elements": (sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)),
        "gathers": gathers,
        "blocks": len(policy.trunk.blocks),
    }


def missing(ranks: Ranks) -> tuple[str, float]:
    """What a rank of several hears, and after how many seconds, when the last one does not come."""
    if ranks.rank == ranks.size - 1:
        time.sleep(2.5)
        return "", 0.0
    began = time.perf_counter()
    try:
        ranks.gather(None)
    except RuntimeError as error:
        return str(error), time.perf_counter() - began
    return "nothing", 0.0


def run(rank: int, size: int, folder: str, rows: dict[str, str]) -> None:
    """The process of one rank: writes what it found to FOLDER/RANK.pickle."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    watch()
    found: dict[Any, Any] = {}
    for layout in LAYOUTS:
        rule = degree if layout.auto else None
        ranks = make_ranks(layout.dp * layout.sp, layout.sp, TIMEOUT, layout.ring, rule)
        if rank < layout.dp * layout.sp:
            for job in jobs(layout):
                began = time.perf_counter()
                found[job, layout] = run_job(job, Path(folder, str(layout)), rows, ranks, layout)
                found[job, layout]["seconds"] = time.perf_counter() - began
    for name in list(RESUMED)[1:3]:
        layout = next(layout for layout in LAYOUTS if str(layout) == name)
        ranks = make_ranks(layout.dp * layout.sp, layout.sp, TIMEOUT, layout.ring)
        if rank < layout.dp * layout.sp:
            resume(name, Path(folder), rows, ranks, layout)
    found["held"] = held(make_ranks(size, 2, TIMEOUT))
    found["missing"] = missing(make_ranks(size, 1, timedelta(seconds=1)))
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))


def main(folder: str, sp: str) -> None:
    """What torchrun starts: a run on recorded responses."""
    watch()
    rows = json.loads(Path(folder, "rows.json").read_text())
    with start_ranks(ParallelConfig(sp=int(sp))) as ranks:
        layout = Layout(ranks.dp_size, int(sp), shard=True)
        run_job("recorded", Path(folder, "torchrun"), rows, ranks, layout)


if __name__ == "__main__":
    main(*sys.argv[1:])
