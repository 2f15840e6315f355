"""Which examples a step trains on: a pure function of (seed, step), so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longrl.runtime import seed_for
from longrl.types import Clip, Example


def step_examples(examples: Sequence[Example], step: int, per_step: int, share: int, seed: int) -> list[Example]:
    """The examples of step 1, 2, ...: consecutive pieces of an endless sequence of shuffled epochs.

    Within an epoch every example comes once. Examples about the same media stay together in blocks of `share`, so that
    a step computes their media once.

    Args:
        per_step: examples a step.
        share: block size; 1 shuffles freely.
    """
    start, stop = (step - 1) * per_step, step * per_step
    picked: list[Example] = []
    for epoch in range(start // len(examples), (stop - 1) // len(examples) + 1):
        order = _epoch(examples, epoch, share, seed)
        offset = epoch * len(examples)
        picked += [examples[i] for i in order[max(start - offset, 0) : stop - offset]]
    return picked


def _epoch(examples: Sequence[Example], epoch: int, share: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed_for(seed, "order", epoch))
    by_media: dict[tuple[Clip, ...], list[int]] = {}
    for index in rng.permutation(len(examples)).tolist():
        by_media.setdefault(examples[index].clips, []).append(index)
    blocks = [block[i : i + share] for block in by_media.values() for i in range(0, len(block), share)]
    return [index for b in rng.permutation(len(blocks)).tolist() for index in blocks[b]]
