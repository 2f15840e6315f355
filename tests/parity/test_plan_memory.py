"""The planner's sum of memory = what a fused step (prefill, decode, update) really takes."""

from __future__ import annotations

import pytest

from longrl.plan.devices import find_device
from longrl.plan.memory import plan_memory
from longrl.plan.work import Setup, Work
from tests.parity.memory import Step

WORK = Work(prompt_tokens=4096, group_size=8, response_tokens=32)
SETUPS = {"none": Setup(), "layer": Setup(recompute="layer")}
BOUND = 0.15
CPU = find_device("CPU")


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_live_tensors_peak_where_planned(setup):
    step = Step(WORK, setup)
    assert step.peak_live_bytes() == pytest.approx(plan_memory(step.shape, WORK, setup, CPU).peak_bytes, rel=BOUND)
