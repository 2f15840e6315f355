"""The command line: how fast it answers, what it imports, and what a person sees when something fails."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from longrl.errors import run_guarded
from longrl.stopping import Stopped

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = {"torch", "transformers", "av", "matplotlib", "tensorboard", "numpy"}
BASE = "kind: rl\nrun_dir: runs/x\nmodel: {path: 'tiny:qwen2_5_vl'}\nsteps: 10\ndata: {train: me/rows@train}\n"
"""Rows of the hub, which a plan does not read."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture
def keep_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("command", ["--help", "rl --help", "check base.yaml"])
def test_answers_without_what_takes_seconds_to_import(command, base):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "longrl", *command.split()],
        cwd=base.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "pydantic" in imported  # the list was read at all
    assert not imported & HEAVY


def test_check_summarises(longrl, base):
    done = longrl("check", base, "rollout.group_size=4")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "rl run into runs/x" in done.stdout
    assert "10, each of 8 prompts x 4 rollouts" in done.stdout


def test_check_names_all_that_is_missing(longrl, base):
    done = longrl("check", base, "data.train=no.jsonl", "model.path=tiny:qwen2_5_vll", "data.eval=none.jsonl")
    assert done.returncode == 2
    assert done.stderr == (
        "longrl: error: the run cannot start: model.path: no model family 'qwen2_5_vll'; did you mean 'qwen2_5_vl'?; "
        "data.train: no.jsonl does not exist; data.eval: none.jsonl does not exist\n"
    )


def test_check_of_a_quickstart(longrl, tmp_path):
    (tmp_path / "q.yaml").write_text(
        "kind: quickstart\nvideos: {dir: videos}\nmodel: {path: 'tiny:qwen2_5_vl'}\nsft: {steps: 2}\nrl: {steps: 3}\n"
    )
    done = longrl("check", "q.yaml")
    assert done.returncode == 0
    assert "3, each of 8 prompts x 8 rollouts" in done.stdout
    done = longrl("check", "q.yaml", "model.path=elsewhere")
    assert done.returncode == 2
    assert "model.path: elsewhere is not a Hugging Face folder" in done.stderr


def test_check_of_an_rl_run_that_evaluates_needs_questions(longrl, base):
    done = longrl("check", base, "eval_every_steps=5")
    assert done.returncode == 2
    assert "data.eval: not set" in done.stderr


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_check_of_every_shipped_configuration(longrl, path):
    """All that may be wrong is that files it names are not there yet, seen from another folder."""
    done = longrl("check", path)
    assert done.returncode in (0, 2)
    assert done.stderr == "" or done.stderr.startswith("longrl: error: the run cannot start: ")
    assert "model" in done.stdout


def test_a_file_for_another_command(longrl, base):
    done = longrl("sft", base)
    assert done.returncode == 2
    assert done.stderr == f"longrl: error: {base}: kind: got 'rl', this command runs sft\n"


def test_traceback_only_when_asked(longrl, base, monkeypatch):
    line = f"longrl: error: {base.parent}/no.yaml: no such configuration file\n"
    assert longrl("check", base.parent / "no.yaml").stderr == line
    asked = longrl("check", base.parent / "no.yaml", "--traceback").stderr
    assert asked.startswith("Traceback")
    assert asked.endswith(line)
    monkeypatch.setenv("LONGRL_TRACEBACK", "1")
    assert longrl("check", base.parent / "no.yaml").stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nope"], "No such command 'nope'; see longrl --help"),
        (["score", "--model", "m"], "Missing option '--prompt'; see longrl score --help"),
        (["launch", "slurm", "c.yaml", "--nodes", "0"], "Invalid value for '--nodes'"),
        (["check"], "Missing argument 'CONFIG'; see longrl check --help"),
        (["export", "run", "--steps", "2"], "No such option: --steps"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(arguments, line, longrl):
    done = longrl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"longrl: error: {line}")
    assert done.stderr.count("\n") == 1


def test_without_arguments_there_is_help(longrl):
    for arguments in ([], ["launch"]):
        done = longrl(*arguments)
        assert done.returncode == 2
        assert "Commands:" in done.stderr


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ValueError("a: got 1,\nexpected 2"), "error: a: got 1, expected 2", 2),
        (RuntimeError("no device"), "error: no device", 1),
        (ImportError("install longrl[x]"), "error: install longrl[x]", 1),
        (MemoryError(), "error: out of memory", 1),
        (OSError("one line of ours"), "error: one line of ours", 1),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"),
            "error: /a/b: No space left on device (the disk is",
            1,
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"), "error: /a/b: Read-only file system (", 1),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "error: /a: Permission denied (no permission", 1),
        (AssertionError("odd"), "internal error: AssertionError: odd (a bug in longrl: --traceback shows where)", 70),
        (KeyError("x"), "internal error: KeyError: 'x'", 70),
        (NotImplementedError("y"), "internal error: NotImplementedError: y", 70),
        (Stopped("stopped after step 2"), "stopped after step 2", 75),
    ],
)
def test_one_line_and_a_status(error, line, status, capsys, keep_sigterm):
    def fail() -> None:
        raise error

    assert run_guarded(fail, show_traceback=False) == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"longrl: {line}")
    assert shown.count("\n") == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "longrl: interrupted\n"), (signal.SIGTERM, 143, "longrl: terminated\n")],
)
def test_signals(number, status, line, tmp_path):
    # Opening the other end of a pipe waits until the command reads its configuration: then it is surely running.
    os.mkfifo(tmp_path / "pipe.yaml")
    command = [sys.executable, "-m", "longrl", "check", "pipe.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        with open(tmp_path / "pipe.yaml", "w"):
            process.send_signal(number)
            _, shown = process.communicate(timeout=300)
        assert (process.returncode, shown) == (status, line)


def test_a_closed_pipe_is_quiet(base):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longrl", "check", str(base)]
    done = subprocess.run(command, cwd=base.parent, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout(base):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "longrl", "check", str(base)]
        done = subprocess.run(command, cwd=base.parent, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("longrl: error: No space left on device (the disk is full")
    assert done.stderr.count("\n") == 1


def test_check_of_several_processes(longrl, base, tmp_path, monkeypatch):
    done = longrl("check", base, "parallel.sp=2", "parallel.shard=true")
    assert done.returncode == 0
    assert "start it with torchrun --nproc-per-node 2" in done.stdout
    assert "2 for each prompt (Ulysses 2 x ring 1), weights shared out" in done.stdout
    assert "shard is true, but sp is 1" in longrl("check", base, "parallel.shard=true").stderr
    assert "(Ulysses 2 x ring 2)" in longrl("check", base, "parallel.sp=4", "parallel.ring=2").stdout
    chosen = longrl("check", base, "parallel.sp=auto", "--processes", "4")
    assert "(Ulysses 1 x ring 1)" in chosen.stdout  # a short prompt has a process to itself
    assert (
        "sp is auto, which chooses the ring too" in longrl("check", base, "parallel.sp=auto", "parallel.ring=2").stderr
    )
    assert "shard is true, but sp is auto" in longrl("check", base, "parallel.sp=auto", "parallel.shard=true").stderr
    wrong = longrl("check", base, "parallel.sp=6", "parallel.ring=4").stderr
    assert "ring is 4, but sp is 6, expected a multiple of it: 6 = 1 x 4 + 2" in wrong
    (tmp_path / "model").mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 100, "model_type": "qwen2"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    save_file({"a": np.zeros(1)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").touch()
    wrong = longrl("check", base, "parallel.sp=12", "parallel.ring=2", "model.path=model").stderr
    assert "4 KV heads cannot be dealt to 6 sequence-parallel ranks (12 in rings of 2)" in wrong
    assert longrl("check", base, "parallel.sp=6", "parallel.ring=3", "model.path=model").returncode == 0
    monkeypatch.setenv("WORLD_SIZE", "8")
    done = longrl("check", base, "parallel.sp=6", "model.path=model")
    assert done.returncode == 2
    assert "parallel.sp: 4 KV heads cannot be dealt to 6 sequence-parallel ranks" in done.stderr
    assert "parallel.sp is 6, but there are 8 processes, expected a multiple of 6; start so many" in done.stderr


def test_check_plans_for_a_device(longrl, base):
    model = "model.path=models/Qwen2.5-VL-7B-Instruct"
    done = longrl("check", base, model, "video.max_pixels=50176", "--device", "H200", "--processes", "8")
    assert done.returncode == 2
    assert "download it from https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct" in done.stdout
    assert "fits       no" in done.stdout
    changes = re.search(r"a step needs .* too few; .* GiB with (.+)\n", done.stderr)
    assert changes is not None
    done = longrl("check", base, model, "video.max_pixels=50176", *changes[1].split(), "--device=H200", "--processes=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "ok: the configuration is valid and fits; the model has yet to be downloaded from https://hugg" in done.stdout
    )
    refused = longrl("check", base, model, "parallel.sp=3", "--processes", "8")
    assert "parallel.sp is 3, but there are 8 processes, expected a multiple of 3" in refused.stderr
    assert "parallel.sp: 4 KV heads cannot be dealt to 3 sequence-parallel ranks" in refused.stderr
    done = longrl("check", base, "--device", "TPU")
    assert (done.stdout, done.stderr) == ("", "longrl: error: no device 'TPU'; known: A100-80G, H100, H200, CPU\n")


def test_what_would_fit_is_said_as_it_is_typed(longrl, base):
    model = "model.path=models/Qwen2.5-VL-7B-Instruct"
    done = longrl("check", base, model, "video.max_pixels=50176", "--device", "h100")
    changes = re.search(r"too few; .* GiB with (--processes .+)\n", done.stderr)
    assert changes is not None
    done = longrl("check", base, model, "video.max_pixels=50176", "--device", "h100", *changes[1].split())
    assert (done.returncode, done.stderr) == (0, "")
    done = longrl("check", base, model, "--device", "h100")  # frames as large as they may be
    assert "an eighth of the frames would make it fit; set video.max_pixels" in done.stderr


def test_check_says_what_bfloat16_needs(longrl, base):
    needs = "in bfloat16 engine and trainer log-probs round differently, and a run stops"
    assert needs not in longrl("check", base).stdout
    assert needs in longrl("check", base, "model.compute_dtype=bfloat16").stdout
    assert needs not in longrl("check", base, "model.compute_dtype=bfloat16", "algo.max_logprob_diff=0.5").stdout


def test_check_says_when_a_run_is_saved(longrl, base):
    assert "saved      only after the last step: a run that ends before starts over" in longrl("check", base).stdout
    assert "saved      every 5 steps, the newest 2 stay" in longrl("check", base, "checkpoint.every_steps=5").stdout


def test_version(longrl):
    assert longrl("--version").stdout == f"{version('longrl')}\n"


def test_a_run_refuses_a_model_that_is_not_there(longrl, base):
    (base.parent / "rows.jsonl").write_text('{"id": 1, "video": "v.mp4", "question": "q", "answer": "a"}')
    (base.parent / "v.mp4").touch()
    done = longrl("rl", base, "data.train=rows.jsonl", "model.path=models/Qwen2.5-VL-7B-Instruct")
    assert done.returncode == 2
    assert "(no config.json); download https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct" in done.stderr


def test_several_processes_need_to_be_started(longrl, base):
    done = longrl("rl", base, "parallel.sp=2")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "longrl: error: parallel.sp is 2, but there is 1 process, expected a multiple of 2; start so"
    )
