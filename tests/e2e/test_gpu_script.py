"""The script for GPUs, on a CPU with a tiny body: it runs through, and prints what its page promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from longrl.plan.choose import fits
from longrl.plan.cost import plan_cost
from longrl.plan.devices import GIB, GPUS
from longrl.plan.shapes import SHAPES
from longrl.plan.work import Setup, Work
from tests import LONG

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_hour_video.py"
SMALL = ["--body", "tiny", "--frames", "40", "--tokens", "180", "--response-tokens", "6", "--mlp-tile", "64"]


PARTS = {
    "hour": ["fused"],
    "curve": ["fused", "plain"],
    "curve --one-above 100": ["fused", "plain"],
    "full": ["fused"],
}


ALONE = """
import runpy, sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in refused else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
assert find_spec("av") is find_spec("datasets") is None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where nothing of `refused` is found."""


def needed(*names: str) -> set[str]:
    """These distributions and all that they require."""
    found: set[str] = set()
    while names:
        found |= (new := {canonicalize_name(name) for name in names} - found)
        names = tuple(r.name for one in new for r in required(one) if r.marker is None or r.marker.evaluate())
    return found


def required(name: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:  # of CUDA, say
        return []


def refused() -> set[str]:
    """Modules of packages that torch, transformers and peft do not bring with them: PyAV, vLLM, Ray, diffusers, ..."""
    there = needed("torch", "transformers", "peft")
    return {
        module
        for module, names in packages_distributions().items()
        if not any(canonicalize_name(name) in there | {"longrl"} for name in names)
    }


@pytest.mark.parametrize(("part", "paths"), list(PARTS.items())[: None if LONG else 1])
def test_every_part_runs_with_torch_transformers_and_peft_alone(part, paths):
    assert {"av", "datasets", "tensorboard"} <= refused()
    program = f"refused = {refused()!r}\n{ALONE}"
    command = [sys.executable, "-c", program, str(SCRIPT), *part.split(), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["path"] for one in found] == paths
    for one in found:
        assert one["prompt_tokens"] == 20 * 9 + 40
        assert set(one["seconds_of"]) >= {"prefill", "decode"} | ({"optimizer"} if one["path"] == "fused" else set())
        assert ("note" in one) == (one["path"] == "plain" and "--one-above" in part)
        assert one["seconds"] >= sum(one["seconds_of"].values())


LORA = Setup(
    weight_bytes=2,
    compute_bytes=2,
    recompute="keep_attention",
    offload=True,
    mlp_tile_tokens=16384,
    lora_rank=16,
    lora_targets=tuple(SHAPES["tiny:qwen2"].linears),
)
FULL = replace(LORA, weight_bytes=4, lora_rank=0, lora_targets=())
PLANNED = {
    "hour": ("7B", LORA, {218_000: 0}),
    "curve": ("7B", LORA, {16_384: 8, 65_536: 8, 131_072: 1}),
    "full": ("3B", FULL, {65_536: 0}),
}
"""Body, how it is run, and tokens of the video -> separate sequences that `plain` runs."""
START_S = 20
"""To make a model of random weights on the GPU, and its prompt."""


@pytest.mark.parametrize("part", PLANNED)
def test_every_part_is_planned_to_fit_an_h200_and_to_take_less_than_eight_minutes(part):
    """By the estimates of `longrl check`, on a host of 128 GiB: nothing here was measured."""
    size, setup, lengths = PLANNED[part]
    shape, device = SHAPES[f"Qwen/Qwen2.5-VL-{size}-Instruct"], replace(GPUS["H200"], host_bytes=128 * GIB)
    total = 0.0
    for tokens, separate in lengths.items():
        work = Work(prompt_tokens=tokens + 40, group_size=8, response_tokens=513)
        assert fits(shape, work, setup, device)
        seconds = plan_cost(shape, work, setup, device).seconds
        total += START_S + sum(seconds.values())
        if separate:  # its rollout, then old log-probs, forward and backward of each
            total += START_S + seconds["prefill"] + seconds["decode"]
            total += separate * (2 * seconds["prefill"] + seconds["prefix backward"])
    assert total < 480
