"""What is launched where, without Slurm and Ray: those run by `make test-slurm` and `make test-ray`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longrl.config_files import load_arguments
from longrl.launch import ray, slurm
from longrl.launch.work import Work, make_work

CONFIG = (
    "kind: rl\nrun_dir: 'runs/a b%'\nmodel: {path: 'tiny:qwen2_5_vl', device: cpu}\nsteps: 9\ndata: {train: r.jsonl}\n"
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Makes the work of a configuration in tmp_path with changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").touch()
    (tmp_path / "my run.yaml").write_text(CONFIG)

    def make(*changes: str, nodes: int = 2, processes: int = 4) -> Work:
        arguments = ["my run.yaml", *changes]
        return make_work(load_arguments(arguments), arguments, nodes, processes)

    return make


def test_processes_are_numbered_node_by_node(work):
    places = [place for node in range(2) for place in work().environments(node, "10.0.0.1", 29500)]
    assert [place["RANK"] for place in places] == [str(rank) for rank in range(8)]
    assert [place["LOCAL_RANK"] for place in places] == list("01230123")
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert all([place[name] for name in names] == ["8", "4", "10.0.0.1", "29500"] for place in places)


def test_ray_is_asked_for_cores_and_on_gpus_for_one_a_process(work):
    assert ray.bundle(work(), 3) == {"CPU": 12}
    assert ray.bundle(work("model.device=auto"), 3) == {"CPU": 12, "GPU": 4}


def test_the_script_is_bash_and_asks_for_what_was_said(work, tmp_path):
    text = slurm.script(work("model.device=cuda"), "1-12:00", 300, 7)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert sorted(options) == sorted(
        [
            'job-name="a b%"',
            "nodes=2",
            "ntasks-per-node=4",
            "gpus-per-node=4",
            "cpus-per-task=7",
            "time=1-12:00",
            "requeue",
            "signal=B:USR1@300",
            "open-mode=append",
            f'chdir="{tmp_path}"',
            f'output="{tmp_path}/runs/a b%%/slurm/%j.out"',
        ]
    )
    assert text.splitlines()[1 : len(options) + 1] == [f"#SBATCH --{option}" for option in options]  # at the top
    assert bash("-n", text).returncode == 0
    assert "gpus" not in slurm.script(work(), None, 300, None)


def test_a_task_of_slurm_knows_its_place(work, tmp_path):
    """The script with a stand-in for srun, which starts the command of one task."""
    place = "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_LAUNCH_NODE_IPADDR=10.0.0.1"
    stand_ins(tmp_path, srun=f'shift 2; {place} "${{@:1:4}}" env > task')
    assert bash("-", slurm.script(work(), None, 300, None)).returncode == 0
    told = {"RANK=5", "LOCAL_RANK=1", "WORLD_SIZE=8", "LOCAL_WORLD_SIZE=4", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=20017"}
    assert told <= set((tmp_path / "task").read_text().splitlines())


def test_an_evaluation_is_not_queued_again(work, tmp_path):
    (tmp_path / "eval.yaml").write_text(
        "kind: eval\nrun_dir: e\nmodel: {path: 'tiny:qwen2_5_vl'}\ndata: {eval: r.jsonl}\n"
    )
    text = slurm.script(make_work(load_arguments(["eval.yaml"]), ["eval.yaml"], 1, 1), None, 300, None)
    assert "requeue" not in text
    assert "--signal" not in text
    assert bash("-n", text).returncode == 0


def test_a_generator_is_launched_too(work, tmp_path):
    config = (
        "kind: flow\nrun_dir: g\nmodel: {path: 'tiny:sd3', device: cpu}\nprompts: {train: p.txt}\n"
        "media: {height: 16, width: 16}\nsampling: {guidance: 1}\n"
        "rewards: {colour: 1.0}\nsteps: 2\nprocesses: {timeout_s: 7}\n"
    )
    (tmp_path / "flow.yaml").write_text(config)
    loaded = load_arguments(["flow.yaml"])
    with pytest.raises(ValueError, match=r"prompts: .*p\.txt"):
        make_work(loaded, ["flow.yaml"], 1, 2)
    (tmp_path / "p.txt").write_text("a red square\n")
    launched = make_work(loaded, ["flow.yaml"], 1, 2)
    assert launched.command[-2:] == ("flow", "flow.yaml")
    assert (launched.resumes, launched.on_gpus, launched.timeout_s) == (True, False, 7)


@pytest.mark.parametrize(
    ("status", "saves", "again"), [(75, True, True), (75, False, False), (0, True, False), (2, True, False)]
)
def test_what_is_stopped_and_saved_is_queued_again(status, saves, again, work, tmp_path):
    """The script with stand-ins for Slurm's commands: srun ends with a status, scontrol says what it was asked."""
    save = "mkdir -p 'runs/a b%/checkpoints/step_000002';" if saves else ""
    (tmp_path / "runs/a b%/checkpoints/step_000001").mkdir(parents=True)
    commands = {"srun": f'{save} echo "$@" > srun; exit {status}', "scontrol": 'echo "$@" > scontrol'}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = bash("-", slurm.script(work("steps=5"), None, 300, None))
    assert done.returncode == (1 if status == 75 and not saves else status)
    assert (tmp_path / "srun").read_text().endswith("-m longrl rl my run.yaml steps=5\n")
    assert (tmp_path / "scontrol").exists() == again
    assert ("not queued again" in done.stderr) == (status == 75 and not saves)


@pytest.mark.parametrize(
    ("stop_before_s", "ends", "then", "status", "again"),
    [
        (300, 75, None, 75, True),
        (300, 138, None, 75, True),  # told before they listened
        (0, None, signal.SIGTERM, 75, True),  # by the limit, which comes no sooner than that
        (300, None, signal.SIGTERM, 143, False),  # by scancel
        (0, 143, None, 75, True),  # the ranks first, by the limit
        (300, 143, None, 143, False),
        (300, 2, None, 2, False),
    ],
)
def test_a_signal_before_the_limit_is_passed_on_and_the_run_ends_its_step(
    stop_before_s, ends, then, status, again, work, tmp_path
):
    """As above; srun is told by scancel, saves, and ends, or is there until the script is ended."""
    step = "runs/a b%/checkpoints/step_000003"
    end = "touch saved; exec sleep 60" if ends is None else f"exit {ends}"
    stand_ins(
        tmp_path,
        srun=f"touch running; until [ -e told ]; do sleep 0.01; done; mkdir -p '{step}'; {end}",
        scancel='echo "$@" > told',
        scontrol='echo "$@" > scontrol',
    )
    (tmp_path / "job.sbatch").write_text(slurm.script(work(), None, stop_before_s, None))
    # srun outlives a script that is ended, so not its pipes
    with subprocess.Popen(["bash", "job.sbatch"], env=environment(), stderr=subprocess.DEVNULL) as job:
        wait_until((tmp_path / "running").exists)
        job.send_signal(signal.SIGUSR1)
        if then is not None:
            wait_until((tmp_path / "saved").exists)
            job.send_signal(then)
        assert job.wait(timeout=300) == status
    assert (tmp_path / "told").read_text() == "--signal=USR1 17\n"
    assert (tmp_path / "scontrol").exists() == again


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("6", 360), ("5:59", 359), ("1:00:00", 3600), ("1-1", 90000), ("1-1:02", 90120), ("1-01:02:03", 90123)],
)
def test_a_job_has_a_minute_before_it_is_told_to_stop(limit, seconds, work, tmp_path):
    assert f"--time={limit}\n" in slurm.script(work(), limit, seconds - 60, None)
    with pytest.raises(ValueError, match=rf"is {seconds - 59} seconds, but .* has {seconds}, and needs 60"):
        slurm.script(work(), limit, seconds - 59, None)


@pytest.mark.parametrize("limit", ["0", "0-0", "0:00"])
def test_a_time_of_zero_is_no_limit(limit, work):
    assert f"--time={limit}\n" in slurm.script(work(), limit, 300, None)


@pytest.mark.parametrize(("stop_before_s", "at_least"), [(300, 240), (120, 60), (60, 30), (1, 1), (0, 0)])
def test_a_signal_may_come_late(stop_before_s, at_least, work):
    assert f"SECONDS - told)) -ge {at_least} ]" in slurm.script(work(), None, stop_before_s, None)


@pytest.mark.parametrize("limit", ["1h", "12:00:00:00", "-5", "1:2", "10 --partition=x"])
def test_a_time_that_sbatch_does_not_take_is_refused(limit, work):
    with pytest.raises(ValueError, match=r"--time is .*, expected minutes"):
        slurm.script(work(), limit, 300, None)


@pytest.mark.parametrize(
    ("changes", "nodes", "what"),
    [
        (["parallel.sp=3"], 2, "parallel.sp is 3, but there are 8 processes"),
        (["data.train=no.jsonl"], 2, "data.train: no.jsonl does not exist"),
        (["model.path=no"], 2, "model.path: no is not a Hugging Face folder"),
    ],
)
def test_what_cannot_run_is_not_launched(changes, nodes, what, work, tmp_path):
    with pytest.raises(ValueError, match=what):
        work(*changes, nodes=nodes)
    assert not (tmp_path / "runs").exists()


def test_the_commands(longrl, work, tmp_path):
    done = longrl("launch", "slurm", "my run.yaml", "--nodes", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "runs/a b%/slurm/job.sbatch: submit it with sbatch 'runs/a b%/slurm/job.sbatch'\n"
    assert (tmp_path / "runs/a b%/slurm/job.sbatch").read_text() == slurm.script(work(processes=1), None, 600, None)
    (tmp_path / "q.yaml").write_text(
        "kind: quickstart\nvideos: {dir: v}\nmodel: {path: m}\nsft: {steps: 1}\nrl: {steps: 1}\n"
    )
    done = longrl("launch", "ray", "q.yaml")
    assert done.returncode == 2
    assert "got 'quickstart', this command runs sft or rl or eval or flow" in done.stderr


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def stand_ins(folder: Path, **commands: str) -> None:
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


def environment() -> dict[str, str]:
    """Of a job's script, with this folder's bin/ first."""
    return os.environ | {"PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def bash(option: str, text: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", option]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, env=environment())
