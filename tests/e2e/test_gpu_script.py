"""The script for GPUs, on a CPU with a tiny body: it runs through, and prints what its page promises."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where nothing of `refused` is installed."""


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


@pytest.mark.parametrize(("part", "paths"), PARTS.items())
def test_every_part_runs_with_torch_transformers_and_peft_alone(part, paths):
    assert {"av", "datasets", "tensorboard"} <= refused()
    program = f"refused = {refused()!r}\n{ALONE}"
    command = [sys.executable, "-c", program, str(SCRIPT), *part.split(), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["path"] for one in found] == paths
    for one in found:
        assert one["prompt_tokens"] == 20 * 9 + 40
        assert set(one["seconds_of"]) >= {"prefill", "decode"} | ({"optimizer"} if one["path"] == "fused" else set())
        assert ("note" in one) == (one["path"] == "plain" and "--one-above" in part)
        assert one["seconds"] >= sum(one["seconds_of"].values())
