"""The planner's sum of memory = what a fused step (prefill, decode, update, optimizer) really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from longrl import policy
from longrl.plan import memory
from longrl.plan.devices import find_device
from longrl.plan.memory import plan_memory
from longrl.plan.shapes import SHAPES
from longrl.plan.work import Memory, Setup, Work
from tests import LONG
from tests.parity.memory import Step
from tests.unit.media import render

BOUND = 0.15
LINEARS = tuple(SHAPES["tiny:qwen2_5_vl"].linears)
WORK = Work(prompt_tokens=2048, group_size=8, response_tokens=4)
SETUPS = {
    "none": Setup(),
    "layer": Setup(recompute="layer"),
    "keep_attention": Setup(recompute="keep_attention"),
    "layer, offload": Setup(recompute="layer", offload=True),
    "layer, tiles": Setup(recompute="layer", mlp_tile_tokens=256),
    "none, tiles": Setup(mlp_tile_tokens=256),
    "none, bf16": Setup(weight_bytes=2, compute_bytes=2),
    "layer, LoRA": Setup(recompute="layer", lora_rank=8, lora_targets=LINEARS),
    "all, LoRA beside bf16": Setup(
        recompute="keep_attention",
        mlp_tile_tokens=256,
        lora_rank=8,
        lora_targets=LINEARS,
        weight_bytes=2,
        compute_bytes=2,
    ),
}


def planned(step: Step, work: Work, setup: Setup) -> Memory:
    return plan_memory(step.shape, work, setup, find_device("CPU"))


@cache
def live_bytes(work: Work, setup: Setup) -> int:
    return Step(work, setup).peak_live_bytes()


BF16 = ["none, bf16"] if LONG else []
"""Without instructions for it a step takes most of a minute."""


@pytest.mark.parametrize("name", [name for name in SETUPS if name != "none, bf16"] + BF16)
def test_live_tensors_peak_where_planned(name):
    setup = SETUPS[name]
    memory = planned(Step(WORK, setup), WORK, setup)
    # on the CPU, what is offloaded stays in the memory that is counted
    assert live_bytes(WORK, setup) == pytest.approx(memory.peak_bytes + memory.host_bytes, rel=BOUND)


OTHERS = {
    "reference": (replace(WORK, reference=True), SETUPS["none"]),
    "3 in flight": (replace(WORK, prompt_tokens=1024, prefixes=3), Setup(recompute="layer", prompts_in_flight=3)),
}


@pytest.mark.parametrize(("work", "setup"), OTHERS.values(), ids=OTHERS.keys())
def test_live_tensors_peak_where_planned_with_a_reference_or_several_prompts(work, setup):
    assert live_bytes(work, setup) == pytest.approx(planned(Step(work, setup), work, setup).peak_bytes, rel=BOUND)


@pytest.mark.parametrize("name", ["none", "keep_attention", *BF16])
def test_live_tensors_peak_where_planned_with_long_responses(name, monkeypatch):
    """In four micro-batches."""
    monkeypatch.setattr(policy, "STREAM_TOKENS", 256)
    monkeypatch.setattr(memory, "STREAM_TOKENS", 256)
    work, setup = replace(WORK, response_tokens=128), SETUPS[name]
    plan = planned(Step(work, setup), work, setup)
    assert live_bytes(work, setup) == pytest.approx(plan.peak_bytes, rel=BOUND)


@pytest.mark.parametrize("size", [4, 2] if LONG else [4])
def test_live_tensors_peak_where_planned_with_a_tower_that_learns(tmp_path, size):
    """Nine pairs of frames, of which four are run again at a time."""
    work = replace(WORK, prompt_tokens=9 * 216 + 30, video_patches=9 * 864, grid_patches=864)
    setup = Setup(recompute="layer", weight_bytes=size, compute_bytes=size)
    step = Step(work, setup, video=render(tmp_path / "video.mp4"))
    plan = planned(step, work, replace(setup, encoder_parameters=step.shape.tower_parameters))
    assert plan.peak_phase == "encoder"
    assert step.peak_live_bytes() == pytest.approx(plan.peak_bytes, rel=BOUND)


def test_live_tensors_do_not_depend_on_prompts_in_the_batch_or_rollouts():
    setup = SETUPS["layer"]
    work = replace(WORK, prompt_tokens=1024)
    one = live_bytes(work, setup)
    gradients = planned(Step(work, setup), work, setup).parts["gradients"]
    # from the second prompt on the first one's gradients are there, which are planned for any number of prompts
    two = live_bytes(replace(work, prefixes=2), setup)
    assert two <= one + gradients
    assert live_bytes(replace(work, prefixes=3), setup) == pytest.approx(two, rel=1e-3)  # token ids
    assert live_bytes(replace(work, group_size=16), setup) == pytest.approx(one, rel=BOUND)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
@pytest.mark.parametrize("name", ["none", "layer"])
def test_resident_memory_grows_as_planned(name):
    """In a process of its own. Blocks of a megabyte and more go back to the system when they are freed."""
    setup = SETUPS[name]
    arguments = json.dumps({"work": asdict(WORK), "setup": asdict(setup)})
    command = [sys.executable, "-m", "tests.parity.memory", arguments]
    returning = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | returning, capture_output=True, text=True, timeout=300, check=True)
    memory = planned(Step(WORK, setup), WORK, setup)
    before = sum(memory.phases["optimizer"].values()) - memory.parts["gradients"]
    assert int(done.stdout) == pytest.approx(memory.peak_bytes - before, rel=BOUND)
