"""What is launched: a command, and how many processes of it on how many nodes. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrl.check import require_files, require_model
from longrl.check_flow import flow_rows
from longrl.config import DataRunConfig, TrainConfig
from longrl.flow_config import FlowConfig
from longrl.parallel.layout import require_world


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The same command on every process; process i is on node i // processes_per_node."""

    config: DataRunConfig | FlowConfig
    command: tuple[str, ...]
    """Its words. Paths in it are relative to `folder`."""
    folder: Path
    """Where it runs, on every node."""
    nodes: int
    processes_per_node: int

    @property
    def size(self) -> int:
        return self.nodes * self.processes_per_node

    def environments(self, node: int, address: str, port: int) -> list[dict[str, str]]:
        """What each process of a node must know, as torchrun tells it. Neighbours in a group that shares prompts are
        neighbours on a node.

        Args:
            node: which, from 0.
            address: of node 0, where process 0 listens on `port`.
        """
        here = self.processes_per_node
        common = {"WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(here)}
        common |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return [{"RANK": str(node * here + local), "LOCAL_RANK": str(local)} | common for local in range(here)]

    @property
    def on_gpus(self) -> bool:
        """Whether each process is given a GPU."""
        return self.config.model.device != "cpu"

    @property
    def resumes(self) -> bool:
        """Whether the run goes on where it stopped when it is started again."""
        return isinstance(self.config, TrainConfig | FlowConfig)

    @property
    def timeout_s(self) -> float:
        """How long a process waits for the others."""
        return (
            self.config.processes.timeout_s if isinstance(self.config, FlowConfig) else self.config.parallel.timeout_s
        )


def make_work(
    config: DataRunConfig | FlowConfig, arguments: Sequence[str], nodes: int, processes_per_node: int
) -> Work:
    """
    Args:
        config: of a run, which says what command it is.
        arguments: it was read from them.

    Raises:
        ValueError: what the run needs is not there, or it cannot be done by so many processes.
    """
    if isinstance(config, FlowConfig):
        if problems := [f"{what}: {problem}" for what, _, problem in flow_rows(config) if problem]:
            raise ValueError("; ".join(problems))
    else:
        require_world(nodes * processes_per_node, 1 if config.parallel.sp == "auto" else config.parallel.sp)
        require_model(config.model, config.parallel, trained=isinstance(config, TrainConfig))
        require_files(config)
    return Work(
        config=config,
        command=(sys.executable, "-m", "longrl", config.kind, *arguments),  # pyright: ignore
        folder=Path(os.getcwd()),
        nodes=nodes,
        processes_per_node=processes_per_node,
    )
