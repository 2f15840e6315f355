"""`longrl launch ray`: Ray finds the nodes and starts the processes; what they do, they do as under torchrun.

driver       asks for a bundle of resources on each of N nodes, starts an actor in each, and waits
actor        runs the node's processes, children of its own, and ends all when one fails
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from longrl.launch.work import Work
from longrl.parallel.layout import JOIN_S

_GRACE_S = 10.0
"""So long after one process has failed the others may still say what they see of it."""


class Node:
    """An actor's work on its node."""

    def address(self) -> tuple[str, int]:
        """Where its first process can listen."""
        with socket.create_server(("", 0)) as free:
            return _ray().util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: Sequence[str], folder: Path, environments: Sequence[Mapping[str, str]]) -> list[int]:
        """Runs the processes to their end; of the first that fails the others are ended.

        Returns:
            The exit status of each, negative for a signal, in the order in which they ended.

        Raises:
            FileNotFoundError: this node has no such folder, or no such program.
        """
        running = [subprocess.Popen(command, cwd=folder, env=os.environ | one) for one in environments]
        ended: list[int] = []
        deadline = None
        while running:
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                ended.append(process.returncode)
            if any(ended) and deadline is None:
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                for process in running:
                    process.kill()
            time.sleep(0.1)
        return ended


def bundle(work: Work, cpus: int) -> dict[str, float]:
    """What a node must have.

    Args:
        cpus: cores of each process.
    """
    needs = {"CPU": float(cpus * work.processes_per_node)}
    return needs | ({"GPU": float(work.processes_per_node)} if work.on_gpus else {})


def launch_ray(work: Work, address: str | None, cpus: int) -> None:
    """Runs the processes on a Ray cluster, and waits for them. What they say is shown.

    Args:
        address: of the cluster; None: the one that this machine is part of, or RAY_ADDRESS.
        cpus: cores of each process.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: there is no such cluster, it has not so many nodes within the time that processes may take to
            come, a node was lost, or a process failed.
    """
    ray = _ray()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError("not HOST:PORT")
            socket.create_connection((host, int(port)), timeout=_GRACE_S).close()
        ray.init(address=address or "auto", log_to_driver=True)
    except (OSError, RuntimeError, ValueError) as error:
        where = address or "this machine"
        raise RuntimeError(
            f"no Ray cluster at {where} ({error}); give HOST:PORT of one, or make one: ray start"
        ) from error
    signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there, which exits
    try:
        _run(work, cpus)
    finally:
        ray.shutdown()


def _run(work: Work, cpus: int) -> None:
    ray = _ray()
    needs = bundle(work, cpus)
    group = ray.util.placement_group([needs] * work.nodes, strategy="STRICT_SPREAD")
    patience_s = min(JOIN_S, work.timeout_s)
    if not group.wait(patience_s):
        raise RuntimeError(
            f"no {work.nodes} nodes with {_listed(needs)} each came within {patience_s:g} s; the cluster has "
            f"{'; '.join(_listed(node['Resources']) for node in ray.nodes() if node['Alive'])}; free or add some, or "
            "launch on fewer"
        )
    actors: list[Any] = []
    for index in range(work.nodes):
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index
        )
        options = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "scheduling_strategy": place}
        actors.append(ray.remote(Node).options(**options).remote())
    first, port = ray.get(actors[0].address.remote())
    threads = {"OMP_NUM_THREADS": str(cpus)}  # Ray's own is that of the actor
    runs = {}
    for index, actor in enumerate(actors):
        environments = [threads | one for one in work.environments(index, first, port)]
        runs[actor.run.remote(work.command, work.folder, environments)] = index
    while runs:
        [run], _ = ray.wait(list(runs))
        index = runs.pop(run)
        try:
            statuses = ray.get(run)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"node {index}: {' '.join(str(error).split())}") from error
        if failed := [status for status in statuses if status]:
            raise RuntimeError(f"a process on node {index} ended with status {failed[0]}; see what it said")
    typer.echo(f"{work.config.kind} on {work.nodes} nodes: done")  # pyright: ignore


def _ray() -> Any:
    """
    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.util.scheduling_strategies  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("longrl launch ray needs Ray: pip install 'longrl[ray]'") from error
    return ray


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
