"""What every run starts with: its directory with its configuration, threads, logging, and the source of randomness."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

from longrl.config import RunConfig
from longrl.config_files import flatten, read_yaml, save_config
from longrl.flow_config import FlowConfig

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
"""Where a run directory keeps its checkpoints."""
_FREE = (
    *("data.on_error", "data.max_skips"),  # who mends nothing goes on without the rows that are found bad
    *("parallel.", "processes.", "memory.", "cache.", "model.device", "algo.offload_reference"),
    *("gradient_checkpointing", "sampling.max_rows"),
    *("rollout.prompts_in_flight", "rollout.max_streams", "rollout.server", "rollout.vllm.max_model_len"),
    *("rollout.vllm.gpu_memory_utilization", "rollout.vllm.sleep", "rollout.vllm.enforce_eager"),
    *("scoring.workers", "scoring.timeout_s", "scoring.memory_gib", "scoring.max_failures", "scoring.in_process"),
    *("judge.limits.", "judge.dir", "judge.budget_usd"),
    *("scorers.vlm.limits.", "scorers.vlm.dir", "scorers.vlm.budget_usd", "scorers.ocr.threads"),
    *("scorers.max_rows", "scorers.device", "scorers.offload", "scorers.max_failures"),
)
"""Keys that may change when a run is taken up again."""


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is, of those that torchrun starts together; (0, 1) of one started otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_run(config: RunConfig | FlowConfig, *, is_main: bool = True) -> Path:
    """Makes the run directory, writes the resolved configuration into it and sets up torch.

    A directory that already holds this configuration is taken up again (resume), on whatever number of processes.

    Args:
        config: the resolved configuration.
        is_main: whether this process writes for the run; another only sets up torch.

    Returns:
        The run directory.

    Raises:
        ValueError: run_dir is a file, or holds a run with another configuration.
        OSError: run_dir cannot be made or written.
    """
    run_dir = Path(config.run_dir)
    if is_main:
        _claim(run_dir, config)

    import torch

    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    # Nothing of ours draws from the global generator; a library that does is at least repeatable.
    torch.manual_seed(seed_for(config.runtime.seed, "global"))
    return run_dir


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on the parts alone: the one source of randomness in the project.

    The same parts give the same seed on every machine, in any process and in any order of calls, so that data order
    and sampling noise are pure functions of, say, (seed, "rollout", step, example id, rollout number).

    Args:
        parts: whole numbers and texts; 1 and "1" differ.
    """
    if not all(isinstance(part, int | str) for part in parts):
        raise AssertionError(f"seed parts must be int or str, got {parts!r}")
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def set_up_logging() -> None:
    """Log lines to stderr: coloured on a terminal, plain with a time stamp elsewhere; of other ranks than the main one
    warnings alone."""
    rank, _ = rank_and_size()
    which = f"rank {rank}: " if rank else ""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter(f"{which}%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {which}%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, handlers=[handler])


def _claim(run_dir: Path, config: RunConfig | FlowConfig) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"run_dir {run_dir}: it or a parent of it is a file; choose another run_dir") from None
    path = run_dir / CONFIG_NAME
    if path.exists():
        _require_same(config, path)
        logger.info("%s: taking up the run that is there", run_dir)
    elif (run_dir / CHECKPOINTS).is_dir():
        raise ValueError(
            f"run_dir {run_dir} has {CHECKPOINTS}/ but no {CONFIG_NAME}, so what made them is not known; put the file "
            "back, or choose another run_dir"
        )
    else:
        save_config(config, path)


def _require_same(config: RunConfig | FlowConfig, path: Path) -> None:
    """But for where it computes and what it keeps meanwhile, which do not change the results."""
    there, here = flatten(read_yaml(path)), flatten(config.model_dump(mode="json"))
    unset: dict[str, Any] = {}
    keys = [key for key in {**here, **there} if not (key.startswith(_FREE) or _moves(key))]
    differing = [key for key in keys if there.get(key, unset) != here.get(key, unset)]
    if not differing:
        return
    key, more = differing[0], len(differing) - 1
    mend = "choose another run_dir"
    if key == "steps":
        mend += f" with {path.parent}/{CHECKPOINTS}/step_*/model as its model.path to train on"
    was, now = (json.dumps(side[key]) if key in side else "unset" for side in (there, here))
    raise ValueError(
        f"run_dir {path.parent} holds a run with another configuration: {key} is {was} there, {now} here"
        f"{f' (and {more} more)' if more else ''}; {mend}, or delete {path.parent} to start over"
    )


def _moves(key: str) -> bool:
    """Where a judge is reached, rather than which it is."""
    return key.startswith("judge.models.") and key.endswith((".base_url", ".key_env"))


def peak_rss_bytes() -> int:
    """The largest resident memory of this process, or of one that it waited for (they render videos)."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak
