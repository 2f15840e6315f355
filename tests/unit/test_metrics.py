"""Metrics on disk, exact over a resume, and the live display."""

import io
import json
import logging
import re
import time

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longrl.report.metrics import Metrics, read_metrics
from longrl.report.progress import Progress


def run_steps(run_dir, first, last, **kwargs):
    with Metrics(run_dir, tensorboard=False, resume_from=first, **kwargs) as metrics:
        for step in range(first, last + 1):
            with metrics.step(step):
                metrics.log("loss", 1 / (3 * step))


def without_times(path):
    return [{k: v for k, v in record.items() if k != "wall_s"} for record in read_metrics(path)]


def test_a_line_a_step_at_once(tmp_path):
    with Metrics(tmp_path / "new" / "run", tensorboard=False) as metrics:
        with metrics.step(1):
            metrics.log("loss", torch.tensor(0.5))
            metrics.log("tokens", 12)
            metrics.log("reward/mean", None)
        line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # not yet closed: it was flushed
        assert json.loads(line) == metrics.last
        assert metrics.last == {
            "step": 1,
            "wall_s": metrics.last["wall_s"],
            "loss": 0.5,
            "tokens": 12,
            "reward/mean": None,
        }
        assert '"tokens": 12' in line  # an int stays an int


def test_time_accumulates_and_counts_failures(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics, metrics.step(1):
        for _ in range(2):
            with metrics.time("decode"):
                time.sleep(0.02)
        with pytest.raises(KeyError), metrics.time("broken"):
            raise KeyError
    assert 0.04 <= metrics.last["time/decode"] <= metrics.last["wall_s"]
    assert metrics.last["time/broken"] >= 0


def test_a_failed_step_leaves_no_line(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        with pytest.raises(ZeroDivisionError), metrics.step(1):
            metrics.log("loss", 1 / 0)
        with metrics.step(1):
            metrics.log("loss", 2.0)
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_not_finite_is_null_with_a_warning(tmp_path, caplog):
    with Metrics(tmp_path, tensorboard=True) as metrics, metrics.step(3):
        metrics.log("loss", float("nan"))
        metrics.log("grad_norm", float("inf"))
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert "step 3: loss is nan" in caplog.text


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    run_steps(tmp_path / "whole", 1, 9)
    run_steps(tmp_path / "resumed", 1, 6)  # the checkpoint was at 4: steps 5 and 6 run again
    run_steps(tmp_path / "resumed", 5, 9)
    assert without_times(tmp_path / "resumed/metrics.jsonl") == without_times(tmp_path / "whole/metrics.jsonl")


def test_a_fresh_start_drops_everything(tmp_path):
    run_steps(tmp_path, 1, 5)
    run_steps(tmp_path, 1, 2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_line_cut_by_a_crash_is_dropped(tmp_path, caplog, cut):
    run_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[: -1 - cut])
    run_steps(tmp_path, 3, 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert "line 3 is left out" in caplog.text


def test_logging_outside_a_step_or_twice_is_our_bug(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        with pytest.raises(AssertionError, match="loss was logged outside a step"):
            metrics.log("loss", 1.0)
        with metrics.step(1):
            metrics.log("loss", 1.0)
            with pytest.raises(AssertionError, match="loss was logged twice in step 1"):
                metrics.log("loss", 1.0)


def test_tensorboard_has_the_same_numbers(tmp_path):
    for first, last in ((1, 4), (3, 5)):
        with Metrics(tmp_path, tensorboard=True, resume_from=first) as metrics:
            for step in range(first, last + 1):
                with metrics.step(step):
                    metrics.log("reward/mean", step / 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(s, s / 8) for s in range(1, 6)]


RECORD = {
    "wall_s": 2.0,
    "loss": 0.25,
    "reward/mean": 0.5,
    "reward/answer": None,
    "time/decode": 1.0,
    "time/update": 0.5,
}


def test_progress_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, _environ={"TERM": "xterm"})
    with Progress("rl", total_steps=50, console=console) as progress:
        for step in range(1, 21):
            progress.update({"step": step, **RECORD, "reward/mean": step / 20})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    for expected in (
        "20/50",
        "2.00 s a step, 1:00 to go",
        "reward ",
        "▁",
        "█",
        "decode 1.00 s",
        "update 0.50 s",
        "none",
    ):
        assert expected in shown
    assert "entropy" not in shown  # this run does not log it


def test_progress_without_a_terminal_logs_now_and_then(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Progress("rl", total_steps=25, log_every=10, console=console) as progress:
        for step in range(1, 26):
            progress.update({"step": step, **RECORD})
    assert console.file.getvalue() == ""
    assert [message.split(":")[0] for message in caplog.messages] == ["rl 10/25", "rl 20/25", "rl 25/25"]
    assert caplog.messages[0] == "rl 10/25: loss 0.25, reward 0.5, answer reward none, 0:30 to go"
