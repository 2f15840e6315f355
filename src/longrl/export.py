"""`longrl export`: the model of a run's checkpoint as a folder of its own."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import torch
import typer
from safetensors import SafetensorError

from longrl.checkpoint import Checkpoints
from longrl.config import ModelConfig, TrainConfig
from longrl.config_files import load_config, read_yaml
from longrl.models import base_path, load_family
from longrl.runtime import CHECKPOINTS, CONFIG_NAME


def export_command(run: str | Path, step: int | None, out: str | Path | None, merge_lora: bool = False) -> None:
    """Copies the Hugging Face folder of a run's checkpoint, or writes the diffusers folder of a generator's; of the
    former no more than a few tensors are in memory at once.

    Args:
        run: The run directory.
        step: Which checkpoint; None: the latest complete one.
        out: Where to; must not exist or be empty. None: export/step_N of the run.
        merge_lora: Merge adapters into their base; otherwise theirs is a folder that peft reads, which names the base.

    Raises:
        ValueError: There is no such checkpoint, out is not empty, or there are no adapters to merge.
        OSError: out cannot be written; nothing is left there.
    """
    run = Path(run)
    checkpoints = Checkpoints(run / CHECKPOINTS, keep=1)
    checkpoint = checkpoints.latest() if step is None else checkpoints.at(step)
    if checkpoint is None:
        inside = sorted(str(folder.parent) for folder in run.glob(f"*/{CHECKPOINTS}"))
        mend = f"give {' or '.join(inside)}" if inside else "give the directory of a run that has saved one"
        raise ValueError(f"{checkpoints.dir}: no complete checkpoint; {mend}")
    model = checkpoint.model_path
    out = run / "export" / checkpoint.path.name if out is None else Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: not an empty folder; choose another --out or empty it")
    generates = read_yaml(run / CONFIG_NAME).get("kind") == "flow"
    if merge_lora and generates:
        raise ValueError(f"{run} is of a generator, whose adapters are always merged; leave --merge-lora out")
    if merge_lora and base_path(str(model)) == str(model):
        raise ValueError(f"{run} trained no adapters (model.lora), its weights are whole; leave --merge-lora out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out.parent, ignore_cleanup_errors=True) as temp:
            folder = Path(temp, "model")
            if generates:
                from longrl.flow_export import write_pipeline  # needs diffusers

                model = write_pipeline(run, model, Path(temp, "pipeline"))
            if merge_lora:
                _merge(run, model, folder, Path(temp))
            else:
                # Contents only: safetensors makes files that nobody but their owner can read; an export is for others.
                shutil.copytree(model, folder, copy_function=shutil.copyfile)
            os.replace(folder, out)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        if (of := getattr(error, "filename", None)) is not None and not Path(of).absolute().is_relative_to(
            out.parent.absolute()
        ):
            what = f"{of}: {what}"
        free = "free space there or " if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(f"cannot export to {out}: {what}; {free}choose another --out") from error
    typer.echo(f"step {checkpoint.step} of {run} -> {out}")


def _merge(run: Path, adapter: Path, out: Path, temp: Path) -> None:
    """In the run's dtype."""
    from longrl.models.merging import merge_folder  # needs peft

    config = load_config([run / CONFIG_NAME])
    assert isinstance(config, TrainConfig)
    base = base_path(str(adapter))
    if base.startswith("tiny:"):
        load_family(ModelConfig(path=base, dtype=config.model.dtype, device="cpu")).save(temp / "twin")
        base = str(temp / "twin")
    if not Path(base).is_dir():
        raise ValueError(
            f"{adapter} holds adapters of {base}, which is not there; put the base back, or correct "
            "base_model_name_or_path in its adapter_config.json"
        )
    merge_folder(Path(base), adapter, out, getattr(torch, config.model.dtype))
