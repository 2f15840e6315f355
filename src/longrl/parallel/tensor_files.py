"""Tensors on disk in PyTorch's distributed checkpoint format: each rank writes what it holds of them, and reads what it
needs, on however many ranks they were written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """
    Args:
        tensors: by name; sharded ones are written in parts.
        folder: to be made, the same on every rank.
        group: the ranks that share them out, all of which call this, the process 0 among them; None: this one has all.

    Raises:
        OSError: they cannot be written, here or on another rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        # PyTorch's writer does not say why a file took no more
        said = str(first) if isinstance(first, OSError) else f"{folder} took no more bytes ({first})"
        raise OSError(" ".join(said.split())) from first


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each, in full."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_into(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills them, of sharded ones this rank's part; no other rank need take part."""
    with _quiet():
        load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)


def read(folder: Path) -> dict[str, Tensor]:
    """All of them, in full."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(folder).items()}
    read_into(tensors, folder)
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns of every call that is of one process, meant or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
