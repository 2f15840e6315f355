"""Checkpoints: complete or ignored, exact, and Hugging Face folders."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrl.checkpoint import Checkpoints, pack_optimizer, read_optimizer
from longrl.parallel import tensor_files


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_text(text: str = "weights"):
    def write(path: Path) -> None:
        (path / "deep").mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "deep" / "model.bin").write_text(text)

    return write


def nothing(path: Path) -> None:
    path.mkdir()


def write_state(optimizer: torch.optim.Optimizer):
    return partial(tensor_files.write, pack_optimizer(optimizer))


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    tensor_files.write(tensors, folder)
    return folder


def save(checkpoints: Checkpoints, step: int, **state: Any) -> Path:
    tensors = {"a": torch.full((5,), float(step))}
    write_trainer = partial(tensor_files.write, tensors)
    return checkpoints.save(step, write_text(f"weights {step}"), write_trainer, {"step": step, **state})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Exactness


def test_tensors_and_state_come_back_exactly(tmp_path):
    shared = torch.randn(4, 6)
    tensors = {
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "half": torch.randn(3, 5).bfloat16(),
        "strange": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "whole": torch.tensor([2**62, -1]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "matrix": shared,
        "rows": shared[1:3],
        "transposed": shared.T,
    }
    state = {"step": 3, "lr": 1e-6 / 3, "epochs": [1, 2], "name": "ü", "done": False, "best": None}
    Checkpoints(tmp_path, keep=1).save(3, write_text(), partial(tensor_files.write, tensors), state)

    checkpoint = Checkpoints(tmp_path, keep=1).latest()
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert checkpoint.path == tmp_path / "step_000003"
    assert checkpoint.state == state
    got = tensor_files.read(checkpoint.trainer_path)
    assert {name: bits(tensor) for name, tensor in got.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_a_resumed_run_is_bit_identical_and_its_folder_loads_in_transformers(tmp_path):
    whole = make_model()
    optimizer = make_optimizer(whole)
    train(whole, optimizer, range(3))
    Checkpoints(tmp_path, keep=1).save(3, whole.save_pretrained, write_state(optimizer), {})
    tokens = torch.arange(20)[None]
    logits_at_3 = whole(tokens).logits
    train(whole, optimizer, range(3, 6))

    checkpoint = Checkpoints(tmp_path, keep=1).latest()
    assert checkpoint is not None
    resumed = LlamaForCausalLM.from_pretrained(checkpoint.model_path)
    assert torch.equal(resumed(tokens).logits, logits_at_3)
    resumed.train()
    optimizer = make_optimizer(resumed)
    read_optimizer(optimizer, checkpoint.trainer_path)
    train(resumed, optimizer, range(3, 6))
    for (name, expected), got in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(got, expected), name

    # And it is the optimizer state that makes it so.
    forgetful = LlamaForCausalLM.from_pretrained(checkpoint.model_path).train()
    train(forgetful, make_optimizer(forgetful), range(3, 6))
    assert not torch.equal(forgetful.lm_head.weight, whole.lm_head.weight)


def test_resuming_does_not_write_into_the_checkpoint(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, model.save_pretrained, write_state(optimizer), {})
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    read_optimizer(optimizer, checkpoint.trainer_path)
    train(model, optimizer, range(1, 3))
    assert checkpoints.latest() == checkpoint


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    packed = pack_optimizer(optimizer)
    wider = make_optimizer(torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match="another model"):
        read_optimizer(wider, written(tmp_path / "all", packed))
    first = {name: tensor for name, tensor in packed.items() if name.startswith("optimizer.0.")}
    with pytest.raises(ValueError, match=r"shape \[32, 16\], the model has shape \[5, 3\]"):
        read_optimizer(wider, written(tmp_path / "first", first))
    with pytest.raises(ValueError, match="no such parameter"):
        read_optimizer(wider, written(tmp_path / "ninth", {"optimizer.9.step": torch.tensor(1.0)}))


def test_state_that_json_would_change_is_a_bug_of_the_caller(tmp_path):
    for state in ({"pair": (1, 2)}, {1: "key"}):
        with pytest.raises(AssertionError, match="does not survive JSON"):
            Checkpoints(tmp_path, keep=1).save(1, write_text(), nothing, state)
    assert names(tmp_path) == []


# Which ones there are


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 100, 1_000_000):
        save(checkpoints, step)
    assert names(tmp_path) == ["step_000100", "step_1000000"]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.state) == (1_000_000, {"step": 1_000_000})
    assert checkpoints.at(100).step == 100
    with pytest.raises(ValueError, match=r"no checkpoint of step 5; there are: 100, 1000000"):
        checkpoints.at(5)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_damaged_ones_do_not_count_as_kept(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        save(checkpoints, step)
    damage(tmp_path / "step_000002" / "trainer" / "__0_0.distcp")
    save(checkpoints, 3)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    save(checkpoints, 4)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_the_one_just_written_is_never_removed(tmp_path):
    save(Checkpoints(tmp_path, keep=1), 9)
    save(Checkpoints(tmp_path, keep=1), 4)
    assert "step_000004" in names(tmp_path)


def test_a_step_may_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for attempt in (1, 2):
        save(checkpoints, 7, attempt=attempt)
    assert checkpoints.at(7).state["attempt"] == 2
    (tmp_path / "step_000007" / "state.json").unlink()
    save(checkpoints, 7, attempt=3)
    assert checkpoints.at(7).state["attempt"] == 3
    assert names(tmp_path) == ["step_000007"]


def test_a_crash_while_a_step_is_replaced_loses_neither(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    final = save(checkpoints, 7, attempt=1)
    replaced = final.rename(tmp_path / "step_000007.replaced")  # as far as one crashed save got
    assert checkpoints.at(7).state["attempt"] == 1
    shutil.copytree(replaced, final)  # as far as another one got
    save(checkpoints, 7, attempt=2)
    assert checkpoints.at(7).state["attempt"] == 2
    assert names(tmp_path) == ["step_000007"]


# Damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _add_beside(path: Path) -> None:
    path.with_name("adapter_config.json").write_text("{}")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, _flip, _empty, _add_beside])
def test_a_damaged_folder_is_named_and_passed_over(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    good = save(checkpoints, 2)
    files = [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()]
    assert len(files) == 6
    for file in files:
        shutil.copytree(good, tmp_path / "backup")
        damage(good / file)
        caplog.clear()
        latest = checkpoints.latest()
        assert latest is not None
        assert latest.step == 1, file
        assert str(good) in caplog.text
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.at(2)
        shutil.rmtree(good)
        (tmp_path / "backup").rename(good)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2


def test_a_folder_under_another_step_is_passed_over(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    shutil.copytree(save(checkpoints, 1), tmp_path / "step_000002")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    assert "written for step 1" in caplog.text


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("no weights"), OSError(28, "No space left on device")]
)
def test_an_interrupted_save_changes_nothing(tmp_path, error):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "model.bin").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        checkpoints.save(2, fail, nothing, {})
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step_000001"]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1


SAVE = """
import resource, sys, time, torch
from functools import partial
from longrl.checkpoint import Checkpoints
from longrl.parallel import tensor_files
from longrl.runtime import CHECKPOINTS
def write(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, write, partial(tensor_files.write, {"a": torch.zeros(5)}), {})
"""
HANG = """
def hang(path):
    write(path)
    time.sleep(600)
checkpoints.save(2, hang, print, {})
"""
FILL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, write, partial(tensor_files.write, {"a": torch.zeros(100_000)}), {})
except OSError as error:
    print(error)
"""


def command(script: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", script, str(folder)]


def test_a_failing_disk_is_one_line_and_changes_nothing(tmp_path):
    done = subprocess.run(command(SAVE + FILL_DISK, tmp_path), capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "step_000002" in line
    assert "took no more bytes" in line
    assert names(tmp_path) == ["step_000001"]
    assert Checkpoints(tmp_path, keep=1).at(1).step == 1


def test_a_killed_save_is_named_ignored_and_cleared_by_the_next(tmp_path, caplog):
    process = subprocess.Popen(command(SAVE + HANG, tmp_path))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".unfinished-*/step_000002/model/config.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    checkpoints = Checkpoints(tmp_path, keep=1)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    assert ".unfinished-" in caplog.text
    save(checkpoints, 2)
    assert names(tmp_path) == ["step_000002"]
