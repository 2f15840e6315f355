"""What each process of the tests of the presets does: every preset on every layout of up to four ranks, in one start.

The same function on `ALONE` is the slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrl.algo.advantages import ADVANTAGES
from longrl.algo_config import PRESETS
from longrl.config import RlConfig
from longrl.first_update import FirstUpdate, gather
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import cohorts, num_tokens
from longrl.parallel.gradients import sum_gradients
from longrl.parallel.ranks import Ranks, make_ranks
from longrl.policy import Policy
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.totals import Totals
from longrl.training import Batch, Share
from longrl.types import Example, Prompt
from longrl.update import update_again
from tests import LONG, in_process
from tests.parity.test_shared_prefix import make_prompts

TIMEOUT = timedelta(minutes=15)
"""Ranks without a part in a layout wait for those that have one."""
EVEN = "tests.e2e.rewards:first_token_even"
VIDEOS = [["what comes first?", "where is it?"], ["who?"], ["why?"], ["what is last?"], ["when?", "how?"]]
FIRST = 3
"""Videos of the batch; the others are there to be drawn in refills."""
LR = 1e-2
CHANGES: dict[str, dict[str, Any]] = {
    "cispo": {"clip_high": 0.2},
    "dapo": {"max_refills": 2},
    "gspo": {"clip_low": 0.15, "clip_high": 0.6},
}
"""Bounds that one step of a tiny model reaches for some tokens, not for all."""
EXTRA = {
    "corrected": {
        "algorithm": "grpo",
        "algo": {"entropy_coef": 0.05, "correction": "truncate", "correction_level": "sequence"},
    }
}
"""What no preset has."""
EVERY = (*PRESETS, *EXTRA)
TELLING = ("grpo", "dapo", "reinforce_pp", "t_grpo")
"""Whose data-parallel ranks tell each other more than sums."""
JOBS = {(2, 1): TELLING, (4, 1): EVERY, (1, 2): EVERY} if LONG else {(2, 1): EVERY, (4, 1): TELLING, (1, 2): TELLING}
"""By layout."""


def config(name: str) -> RlConfig:
    settings = EXTRA.get(name, {"algorithm": name, "algo": CHANGES.get(name, {})})
    algo = {"updates_per_batch": 2, "accuracy": EVEN, **settings["algo"]}
    return RlConfig.model_validate(
        {
            "run_dir": "run",
            "model": {"path": "m"},
            "steps": 1,
            "prompts_per_step": 4,
            "rollout": {"group_size": 3, "max_new_tokens": 5},
            "rewards": {EVEN: 1.0},
            "scoring": in_process([EVEN]),
            "algorithm": settings["algorithm"],
            "algo": algo,
        }
    )


def deal(examples: Sequence[Example], prompts: Sequence[Prompt], ranks: Ranks) -> Batch:
    together = cohorts(prompts)
    tokens = [num_tokens([prompts[i] for i in members]) for members in together]
    shares = []
    for layout, mine in ranks.deal(tokens, tokens):
        indices = [i for k in mine for i in together[k]]
        chosen, ours = [examples[i] for i in indices], [prompts[i] for i in indices]
        shares.append(Share(ranks=layout, epochs=[0] * len(indices), examples=chosen, prompts=ours))
    return Batch(shares=shares, ids=[example.id for example in examples])


def learn(name: str, ranks: Ranks) -> dict[str, Any]:
    """The gradients of two updates of a batch, in fp64, and what was counted."""
    cfg = config(name)
    family = Qwen25VL.tiny(0, torch.float64)
    videos = [make_prompts(family, 40, texts, seed) for seed, texts in enumerate(VIDEOS)]  # pyright: ignore
    every = [
        (Example(id=f"{v}.{i}", messages=(), answer=None, kind="open"), prompt)
        for v, video in enumerate(videos)
        for i, prompt in enumerate(video)
    ]
    first = [one for one in every if int(one[0].id[0]) < FIRST]
    others = every[len(first) :]
    policy = Policy(family, sp=ranks.sp)
    reference = Policy(Qwen25VL.tiny(1, torch.float64), sp=ranks.sp) if cfg.algo.kl != "off" else None
    engine = NativeEngine(policy, cfg.rollout, greedy=ADVANTAGES[cfg.algo.advantage].greedy)
    side = (
        NativeEngine(policy, cfg.rollout.model_copy(update={"group_size": 2})) if cfg.algo.shuffled_rollouts else None
    )

    def refill(start: int, count: int) -> Batch | None:
        more = others[start : start + count]
        return deal(*zip(*more, strict=True), ranks) if more else None  # pyright: ignore

    learner = FirstUpdate(engine, side, reference, build_rewards(cfg.rewards, cfg.scoring), cfg)
    parts = learner(1, deal(*zip(*first, strict=True), ranks), refill)  # pyright: ignore
    count = sum(gather(parts, lambda part: part.totals.denominator))
    gradients = [take(policy, ranks, count)]
    with torch.no_grad():  # plain descent: AdamW would make the rounding of a gradient of nothing as large as any
        for parameter, gradient in zip(policy.trunk.parameters(), gradients[0].values(), strict=True):
            parameter -= LR * gradient / max(float(gradient.norm()), 1e-3)
    for part in parts:
        for cohort in part.cohorts:
            update_again(policy, cohort, cfg, part.totals)
    gradients.append(take(policy, ranks, count))
    totals = Totals.sum(gather(parts, lambda part: part.totals))
    return {"gradients": gradients, "metrics": totals.metrics(2), "count": count, "kept": totals.kept}


def take(policy: Policy, ranks: Ranks, count: int) -> dict[str, torch.Tensor]:
    """The gradient of all ranks, divided once."""
    if ranks.size > 1:
        sum_gradients(policy.trunk.parameters(), ranks.everyone)
    found = {}
    for name, parameter in policy.trunk.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
        parameter.grad = None
    return found


def run(rank: int, size: int, folder: str) -> None:
    """The process of one rank: writes what it found to FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    found = {}
    for (dp, sp), names in JOBS.items():
        ranks = make_ranks(dp * sp, sp, TIMEOUT)
        if rank < dp * sp:
            for name in names:
                found[name, (dp, sp)] = learn(name, ranks)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
