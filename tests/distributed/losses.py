"""Losses of the tests, named in configurations as `tests.distributed.losses:NAME`."""

from __future__ import annotations

import os
import signal

from longrl.algo.losses import clip
from longrl.config import AlgoConfig
from longrl.types import LossInputs, LossOutput


def broken_on_rank_1(inputs: LossInputs, algo: AlgoConfig) -> LossOutput:
    if os.environ["RANK"] == "1":
        raise ValueError("the loss of rank 1 is broken")
    return clip(inputs, algo)


def killed_on_rank_1(inputs: LossInputs, algo: AlgoConfig) -> LossOutput:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(inputs, algo)
