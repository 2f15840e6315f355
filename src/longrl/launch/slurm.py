"""`longrl launch slurm`: a batch script whose processes find each other, that is queued again until the run is done.

Nothing in it is of a site: partition, account and the like are given to sbatch, by its options or its environment
(SBATCH_PARTITION, ...). Each process is a task of one srun, so that Slurm's signals and its end of a job reach it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import typer

from longrl.files import write_whole
from longrl.launch.work import Work
from longrl.runtime import CHECKPOINTS
from longrl.stopping import EXIT_STATUS

FOLDER = "slurm"
"""Of a run directory: the script, and a log of each job."""

_TIME = re.compile(r"(?:(?P<days>\d+)-(?=\d+))?(?P<parts>\d+(?::\d\d){0,2})")
LEAST_S = 60
"""Of a job, before it is told to stop: Slurm may tell it so much early."""
LATE_S = 60
"""... or late. What ends the job so long before its limit is taken for the limit."""

_RANKS = """
# Process 0 is on this node, where the others find it. When one ends, the others have a minute to say what they see.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# srun does not take it over from sbatch.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
ranks() {{
  srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={here}
    export MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR
    exec "$@"' rank {command}
}}
"""

_UNTIL_DONE = """
saved() {{ ls -d {checkpoints}/step_*[0-9] 2>/dev/null; }}
begun=$(saved)
again() {{
  if [ "$(saved)" = "$begun" ]; then
    echo "longrl: nothing was saved in this job, so it is not queued again: give it more time, or save more often" >&2
    exit 1
  fi
  scontrol requeue "$SLURM_JOB_ID"
  exit {stopped}
}}

# Some time before the limit the ranks are told to end their step, save, and leave with {stopped}. If they have not by
# then, they are ended, and this script too, in one order or the other: the run goes on from what was saved last. What
# ends them sooner than that is not the limit, but somebody who cancels the job.
told=
trap 'told=$SECONDS; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
at_the_limit() {{ [ -n "$told" ] && [ $((SECONDS - told)) -ge {at_least} ]; }}
trap 'at_the_limit && again; exit 143' TERM
ranks &
while kill -0 $! 2>/dev/null; do wait $!; done  # a signal ends the waiting, not the ranks
wait $!; status=$?
case $status in
  {stopped}) again ;;
  138) [ -z "$told" ] || again ;;  # told before they listened
  137 | 143) at_the_limit && again ;;
esac
exit "$status"
"""


def launch_slurm(work: Work, time: str | None, stop_before_s: int, cpus: int | None, submit: bool) -> None:
    """Writes the script, and submits it if asked to.

    Args:
        time: the limit of a job, as sbatch takes it; None: the partition's.
        stop_before_s: how long before the limit the run is told to stop; its longest step should take less.
        cpus: cores of each process; None: what Slurm gives a task.

    Raises:
        ValueError: time is none, or too short.
        OSError: the script cannot be written.
        RuntimeError: there is no sbatch, or it refused.
    """
    folder = Path(work.config.run_dir, FOLDER)
    (work.folder / folder).mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    write_whole(path, script(work, time, stop_before_s, cpus))
    if not submit:
        typer.echo(f"{path}: submit it with sbatch {shlex.quote(str(path))}")
        return
    if shutil.which("sbatch") is None:
        raise RuntimeError(f"no sbatch here; on a machine that submits to Slurm: sbatch {shlex.quote(str(path))}")
    done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    typer.echo(f"{path}: submitted as job {job}, logs to {folder / job}.out")


def script(work: Work, time: str | None, stop_before_s: int, cpus: int | None) -> str:
    """The text of the batch script.

    Raises:
        ValueError: time is none, or too short.
    """
    if time is not None and 0 < (limit_s := _seconds(time)) < stop_before_s + LEAST_S and work.resumes:
        raise ValueError(
            f"--stop-before is {stop_before_s} seconds, but a job of --time {time} has {limit_s}, and needs {LEAST_S} "
            "before it is told to stop; lower --stop-before, or give more --time"
        )
    run_dir = work.folder / work.config.run_dir
    options: dict[str, object] = {
        "job-name": _quoted(run_dir.name),
        "nodes": work.nodes,
        "ntasks-per-node": work.processes_per_node,
        "chdir": _quoted(str(work.folder)),
        "output": _quoted(str(run_dir / FOLDER).replace("%", "%%") + "/%j.out"),
        "open-mode": "append",
    }
    if time is not None:
        options["time"] = time
    if work.on_gpus:
        options["gpus-per-node"] = work.processes_per_node
    if cpus is not None:
        options["cpus-per-task"] = cpus
    body = _RANKS.format(here=work.processes_per_node, command=shlex.join(work.command))
    if work.resumes:
        options |= {"requeue": None, "signal": f"B:USR1@{stop_before_s}"}
        checkpoints = shlex.quote(str(run_dir / CHECKPOINTS))
        # Slurm looks for jobs to signal now and then: a signal that comes late leaves less time before the limit
        at_least = stop_before_s - min(LATE_S, stop_before_s // 2)
        body += _UNTIL_DONE.format(checkpoints=checkpoints, stopped=EXIT_STATUS, at_least=at_least)
    else:
        body += "ranks\n"
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    return "\n".join(["#!/bin/bash", *lines, body])


def _seconds(time: str) -> int:
    """Minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"--time is {time!r}, expected minutes, [HH:]MM:SS or D-HH[:MM[:SS]], as sbatch takes it")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is None and len(parts) < 3:
        parts.insert(0, 0)  # hours
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _quoted(text: str) -> str:
    """For a line that sbatch reads."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
