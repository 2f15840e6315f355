"""`longrl` under torchrun, as a user starts it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longrl.config import ParallelConfig, RlConfig
from longrl.config_files import load_config, save_config
from longrl.parallel.layout import balanced, require_world
from longrl.parallel.ranks import ALONE, start_ranks
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from tests import LONG
from tests.distributed import loops
from tests.distributed.test_flow import CONFIG as FLOW
from tests.distributed.test_loops import distance, farthest
from tests.e2e.conftest import rl_config
from tests.media_scoring import ScoringServer

pytestmark = pytest.mark.distributed


def torchrun(
    root: Path, *arguments: object, module: str = "longrl", processes: int = 2, timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """`tests` can be imported there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=root, capture_output=True, text=True, timeout=timeout_s, env=environment
    )


def run_config(dataset, tmp_path: Path, run: str, **changes) -> RlConfig:
    settings = {
        "run_dir": str(tmp_path / run),
        "steps": 4,
        "model": {"path": "tiny:qwen2_5_vl", "dtype": "float64"},
        "rewards": {"tests.e2e.rewards:first_token_even": 1.0},
        "checkpoint": {"every_steps": 2},
        "eval_every_steps": 2,
        "eval": {"samples": 1},
        "cache": {"dir": str(tmp_path / run / "cache")},
    }
    return rl_config(dataset, tmp_path, **{**settings, **changes})


def test_a_run_under_torchrun_is_that_of_one_process_and_goes_on_in_one(dataset, tmp_path, root):
    alone = run_config(dataset, tmp_path, "alone")
    theirs = train_rl(alone)
    config = run_config(dataset, tmp_path, "run", parallel={"sp": 2, "shard": True})
    save_config(config, tmp_path / "run.yaml")
    done = torchrun(root, "rl", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rl 4/4: loss") == 1  # one rank speaks
    run = tmp_path / "run"
    assert load_config([run / "config.yaml"]) == config
    ours = run / "checkpoints" / "step_000004" / "model"
    assert farthest(read_metrics(run / "metrics.jsonl"), read_metrics(tmp_path / "alone" / "metrics.jsonl")) < 1e-9
    assert distance(str(ours), str(theirs))[1] < 1e-9

    shutil.rmtree(run / "checkpoints" / "step_000004")
    assert train_rl(config.model_copy(update={"parallel": ParallelConfig()})) == ours
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (run, tmp_path / "alone")]
    for line in (*lines[0], *lines[1]):
        del line["cache/hit_rate"]  # of each process
    assert farthest(*lines) < 1e-9
    assert distance(str(ours), str(theirs))[1] < 1e-9


@pytest.mark.skipif(not LONG, reason="make test-long")
@pytest.mark.parametrize(("dp", "sp"), [(1, 2), (2, 2)])
def test_recorded_responses_give_the_weights_of_one_process(dataset, tmp_path, root, monkeypatch, dp, sp):
    """After ten steps in fp32. test_loops.py tests the same, and more, in processes that it starts itself."""
    rows = {"train": str(dataset.train_rl), "eval": str(dataset.test)}
    loops.watch(monkeypatch.setattr)
    alone = loops.run_job("recorded", tmp_path / "alone", rows, ALONE, loops.Layout(1, 1))
    (tmp_path / "recorded.pickle").write_bytes(pickle.dumps(alone["drawn"]))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = torchrun(root, tmp_path, sp, module="tests.distributed.loops", processes=dp * sp)
    assert done.returncode == 0, done.stderr
    ours = tmp_path / "torchrun" / "recorded" / "checkpoints" / "step_000010" / "model"
    assert distance(str(ours), alone["model"])[0] < 1e-6


# sharing a prompt, the other waits in the middle of attention; with auto each process takes its own short prompts
SHARED = {"sharing a prompt": {"sp": 2, "shard": True}} | ({"apart": {"sp": "auto"}} if LONG else {})


@pytest.mark.parametrize("parallel", SHARED.values(), ids=SHARED)
def test_a_rank_that_fails_ends_the_run_and_only_its_own_line_says_why(dataset, tmp_path, root, parallel):
    loss = "tests.distributed.losses:broken_on_rank_1"
    config = run_config(dataset, tmp_path, "run", algo={"loss": loss}, parallel=parallel)
    save_config(config, tmp_path / "run.yaml")
    done = torchrun(root, "rl", tmp_path / "run.yaml")
    assert done.returncode == 1  # torchrun's own; it prints the rank's
    lines = [line for line in done.stderr.splitlines() if line.startswith("longrl:")]
    assert [line for line in lines if "error" in line] == ["longrl: rank 1: error: the loss of rank 1 is broken"]
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in cause
    assert "exitcode  : 2 " in cause


@pytest.mark.parametrize("parallel", SHARED.values(), ids=SHARED)
def test_a_rank_that_dies_ends_the_run_long_before_the_timeout(dataset, tmp_path, root, parallel):
    """As by the system, when memory runs out: it says nothing; torchrun names it."""
    loss = "tests.distributed.losses:killed_on_rank_1"
    config = run_config(dataset, tmp_path, "run", algo={"loss": loss}, parallel=parallel)
    save_config(config, tmp_path / "run.yaml")
    done = torchrun(root, "rl", tmp_path / "run.yaml")  # in fifteen minutes at most, of parallel.timeout_s's thirty
    assert done.returncode == 1
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in cause
    assert "exitcode  : -9 " in cause


def test_a_service_is_asked_by_one_rank_at_the_start_and_its_refusal_ends_all(tmp_path, root):
    (tmp_path / "prompts.txt").write_text("a red picture\na green picture\n")
    config, folder = tmp_path / "run.yaml", tmp_path / "answers"
    with ScoringServer() as server:
        server.behave = lambda body, headers: (400, b"no")
        det = f"rewards: {{det: 1.0}}\nscorers: {{services: {{det: {{url: '{server.url}', dir: '{folder}'}}}}}}\n"
        text = FLOW.replace("PROMPTS", str(tmp_path / "prompts.txt")).replace("rewards: {colour: 1.0}\n", det)
        config.write_text(text)
        done = torchrun(root, "flow", config, f"run_dir={tmp_path / 'run'}")
        assert server.asked == 1
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("longrl:") and "error" in line]
    assert len(lines) == 1
    assert "rank 0: error: scorers.services.det: HTTP 400: no" in lines[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def agent(root: Path, port: int, folder: Path, name: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Of one of two nodes: a torchrun with one process. It says into FOLDER/NAME.log."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
    rendezvous += ["--rdzv-conf", f"is_host={int(name == 'first')}"]  # all are at that address here
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "2", *rendezvous]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "-m", "longrl", *map(str, arguments)],
            cwd=root,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )


def end(one: subprocess.Popen[bytes]) -> None:
    """Ends an agent and its process as a machine does that loses power."""
    if one.poll() is None:
        for child in Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        one.kill()
        one.wait()


def test_a_node_that_dies_and_comes_back_takes_the_run_up(dataset, tmp_path, root):
    """Two agents on loopback."""
    changes = {"steps": 12, "eval_every_steps": 0, "checkpoint": {"every_steps": 1}}
    theirs = train_rl(run_config(dataset, tmp_path, "alone", **changes))
    save_config(run_config(dataset, tmp_path, "run", **changes, parallel={"sp": 2}), tmp_path / "run.yaml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = [agent(root, port, tmp_path, name, "rl", tmp_path / "run.yaml") for name in ("first", "second")]
    try:
        while not (tmp_path / "run" / "checkpoints" / "step_000002").exists():
            assert agents[0].poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        end(agents[1])
        assert not (tmp_path / "run" / "checkpoints" / "step_000012").exists()
        agents.append(agent(root, port, tmp_path, "second again", "rl", tmp_path / "run.yaml"))
        assert [agents[i].wait(timeout=900) for i in (0, 2)] == [0, 0], (tmp_path / "first.log").read_text()
    finally:
        for one in agents:
            end(one)
    said = (tmp_path / "first.log").read_text() + (tmp_path / "second again.log").read_text()
    assert "taking up the run that is there" in said
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("run", "alone")]
    for line in (*lines[0], *lines[1]):
        del line["cache/hit_rate"]  # of each process
    assert farthest(*lines) < 1e-9
    ours = tmp_path / "run" / "checkpoints" / "step_000012" / "model"
    assert distance(str(ours), str(theirs))[1] < 1e-9


@pytest.mark.parametrize(("rank", "seen"), [(0, "1/2 clients joined"), (1, "timed out")])
def test_a_node_that_never_comes_is_said_within_the_timeout(rank, seen, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=rf"not all 2 processes came within 1 s .*{seen}.*127\.0\.0\.1:{port}"),
        start_ranks(ParallelConfig(timeout_s=1)),
    ):
        pass
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("size", "sp", "why"),
    [(1, 2, "1 process, expected a multiple of 2"), (6, 4, "6 processes, expected a multiple of 4")],
)
def test_wrong_numbers_of_processes_are_refused(size, sp, why):
    with pytest.raises(ValueError, match="start so many") as refusal:
        require_world(size, sp)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with start_ranks(ParallelConfig()) as ranks:
        assert ranks is ALONE
    with (
        pytest.raises(ValueError, match=r"parallel\.sp is 2, but there is 1 process"),
        start_ranks(ParallelConfig(sp=2)),
    ):
        pass


def test_work_is_dealt_out_evenly():
    assert balanced([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]
    assert balanced([3, 9], 4) == [[1], [0], [], []]
    assert balanced([], 2) == [[], []]
