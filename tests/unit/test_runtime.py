"""The start of a run: its directory, its configuration, its seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longrl.config import RlConfig
from longrl.config_files import load_config
from longrl.runtime import seed_for, start_run


def config_in(run_dir: Path, **changes) -> RlConfig:
    return RlConfig.model_validate({"run_dir": str(run_dir), "model": {"path": "m"}, "steps": 3, **changes})


def test_the_saved_configuration_reproduces_the_run(tmp_path):
    config = config_in(tmp_path / "a" / "b")
    run_dir = start_run(config)
    assert load_config([run_dir / "config.yaml"]) == config
    before = (run_dir / "config.yaml").stat().st_mtime_ns
    assert start_run(config) == run_dir  # resume
    assert (run_dir / "config.yaml").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_directory_is_refused(tmp_path):
    config = config_in(tmp_path / "run")
    start_run(config)
    other = config_in(tmp_path / "run", steps=4, optim={"lr": 0.5}, rewards={"format": 1.0})
    with pytest.raises(ValueError, match="holds a run with another configuration") as caught:
        start_run(other)
    text = str(caught.value)
    assert "steps is 3 there, 4 here (and 3 more)" in text  # and optim.lr, rewards.format, rewards.answer
    assert "choose another run_dir with " in text
    assert "checkpoints/step_*/model as its model.path to train on, or delete" in text
    assert load_config([tmp_path / "run" / "config.yaml"]) == config


def test_checkpoints_without_a_configuration_are_nobodys(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has checkpoints/ but no config.yaml, so what made them is not known; put"):
        start_run(config_in(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_run_dir_is_a_file(below, tmp_path):
    (tmp_path / "file").touch()
    config = config_in(tmp_path / "file" / below)
    with pytest.raises(ValueError, match="is a file; choose another run_dir"):
        start_run(config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_dir_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    config = config_in(tmp_path / "locked" / "run")
    with pytest.raises(PermissionError, match="locked"):
        start_run(config)


def test_threads_and_the_global_generator(tmp_path):
    before = torch.get_num_threads()
    try:
        config = config_in(tmp_path, runtime={"threads": before + 1, "seed": 5})
        start_run(config)
        assert torch.get_num_threads() == before + 1
        first = torch.rand(3)
        start_run(config)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_num_threads(before)


def test_seeds_are_the_same_in_every_process():
    parts = (7, "rollout", 3, "video-é/q1")
    code = f"from longrl.runtime import seed_for; import sys; sys.stdout.write(str(seed_for(*{parts!r})))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == seed_for(*parts) == 8057711672513801411


def test_seeds_differ_wherever_the_parts_do():
    seeds = [seed_for(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    mixed = [
        seed_for(1, "2"),
        seed_for("1", 2),
        seed_for(12),
        seed_for("1,2"),
        seed_for("1", "2"),
        seed_for(),
        seed_for(""),
    ]
    assert len({*seeds, *mixed}) == len(seeds) + len(mixed)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Spread over the whole range: each of the top 8 bits is set in about half of them. Binomial(1000, 1/2) has a
    # standard deviation of 16; 100 is more than six of them.
    assert all(abs(sum(seed >> bit & 1 for seed in seeds) - 500) < 100 for bit in range(55, 63))


@pytest.mark.parametrize("part", [1.0, None, ("a",), b"a"])
def test_seed_parts_are_whole_numbers_or_text(part):
    with pytest.raises(AssertionError, match="must be int or str"):
        seed_for(1, part)
