"""Which sampling steps are stochastic, and which of those are trained, in each step of a run."""

from __future__ import annotations

import random

from longrl.flow_config import FlowAlgoConfig
from longrl.runtime import seed_for


def stochastic_steps(algo: FlowAlgoConfig, steps: int, iteration: int, seed: int) -> range:
    """The window of training step `iteration` (1, 2, ...); empty for a method that needs no densities.

    random: Flow-GRPO-Fast draws it anew. slide: MixGRPO (arXiv 2507.21802, section 3.3) moves it on by one step every
    window_every iterations, and from the end back to the beginning.

    Args:
        steps: of the sampler.
    """
    if algo.method == "nft":
        return range(steps, steps)
    if algo.window is None:
        return range(*(algo.window_range or (0, steps)))
    starts = algo.window_starts(steps)
    if algo.window_moves == "slide":
        start = starts[(iteration - 1) // algo.window_every % len(starts)]
    else:
        start = random.Random(seed_for(seed, "window", iteration)).choice(starts)
    return range(start, start + algo.window_size(steps))


def trained_steps(algo: FlowAlgoConfig, steps: int, window: range, iteration: int, seed: int) -> list[int]:
    """Those of the window but for the last of all (nearly free of noise), or for a method without a window of all, that
    are trained; ascending, at least one."""
    candidates = [step for step in window if step < steps - 1] if algo.method == "policy" else list(range(steps))
    count = max(round(algo.fraction * len(candidates)), 1)
    return sorted(random.Random(seed_for(seed, "trained", iteration)).sample(candidates, count))
