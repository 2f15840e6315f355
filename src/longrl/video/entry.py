"""The file of a cache entry: safetensors, written piece by piece, by one process or by several at once.

    0      8         2048          2048 + 8 F
    | size | header   | timestamps_s | embeds | deepstack |

Every tensor has its place before any of it is known, so each process writes its rows straight to where they belong and
nothing of their size is ever held, gathered or sent. The header comes last; without it, nothing is an entry.

Reference: the layout of safetensors, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longrl.types import MediaEmbeds, MediaSize

SCHEMA = 1
"""Of the file and of the key: raise it when the meaning of either changes, and no old entry is ever read again."""

HEADER_BYTES = 2048
"""What the header may take up; the rest of it is blank."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_READ_BYTES = 2**20


class BadEntryError(Exception):
    """An entry is not what its writer wrote; the message says how it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process has written of an entry; all that the one that seals it is told."""

    num_tokens: int
    grid_t: int
    about: dict[str, Any]
    """What must be the same in all parts: grid_hw, seconds_per_grid, tensors (name -> dtype, shape)."""


class EntryFile:
    """An entry on its way: first its rows, in any order, then the header."""

    def __init__(self, path: Path, size: MediaSize) -> None:
        """path: of an existing file that nobody takes for an entry yet."""
        self.path, self.size, self.sealed = path, size, False

    def write(self, chunks: Iterable[MediaEmbeds], first_chunk: int = 0) -> Part:
        """Writes consecutive chunks, at least one, and syncs them to disk.

        Args:
            first_chunk: where they belong, by `MediaSize.chunk_frames`.
        """
        frame, token = first_chunk * self.size.chunk_frames, first_chunk * self.size.chunk_tokens
        first_token, grid_t, about = token, 0, {}
        with open(self.path, "r+b") as file:
            for chunk in chunks:
                about = about or self._about(chunk)
                starts, levels = self._starts(about["tensors"]), [] if chunk.deepstack is None else chunk.deepstack
                _write_rows(file, starts["timestamps_s"], frame, chunk.timestamps_s)
                _write_rows(file, starts["embeds"], token, chunk.embeds)
                for k, level in enumerate(levels):
                    _write_rows(file, starts["deepstack"], k * self.size.num_tokens + token, level)
                frame, token, grid_t = (
                    frame + len(chunk.timestamps_s),
                    token + len(chunk.embeds),
                    grid_t + chunk.grid_thw[0],
                )
            file.flush()
            os.fsync(file.fileno())
        return Part(num_tokens=token - first_token, grid_t=grid_t, about=about)

    def seal(self, key: str, parts: Sequence[Part]) -> None:
        """Makes it an entry: all rows are written, by whomever."""
        assert sum(part.num_tokens for part in parts) == self.size.num_tokens, (key, self.size, parts)
        about = parts[0].about
        tensors, starts = about["tensors"], self._starts(about["tensors"])
        ends = {name: starts[name] + _num_bytes(*tensors[name]) for name in tensors}
        total = hashlib.sha256()
        for name in sorted(tensors):
            _hash_bytes(total, self.path, starts[name], ends[name])
        entry = {
            "schema": SCHEMA,
            "key": key,
            "grid_thw": [sum(part.grid_t for part in parts), *about["grid_hw"]],
            "seconds_per_grid": about["seconds_per_grid"],
            "layout": {name: [str(dtype), *shape] for name, (dtype, shape) in tensors.items()},
            "sha256": total.hexdigest(),
        }
        text = json.dumps(entry, sort_keys=True)
        header: dict[str, Any] = {
            "__metadata__": {"entry": text, "entry_sha256": hashlib.sha256(text.encode()).hexdigest()}
        }
        for name, (dtype, shape) in tensors.items():
            offsets = [starts[name] - HEADER_BYTES, ends[name] - HEADER_BYTES]
            header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        blank = HEADER_BYTES - 8
        text = json.dumps(header)
        assert len(text) <= blank, text
        with open(self.path, "r+b") as file:
            file.write(blank.to_bytes(8, "little") + text.ljust(blank).encode())
            file.flush()
            os.fsync(file.fileno())
        self.sealed = True

    def _about(self, chunk: MediaEmbeds) -> dict[str, Any]:
        num_tokens, (width,) = self.size.num_tokens, chunk.embeds.shape[1:]
        tensors = {
            "timestamps_s": (chunk.timestamps_s.dtype, [self.size.num_frames]),
            "embeds": (chunk.embeds.dtype, [num_tokens, width]),
        }
        if chunk.deepstack is not None:
            tensors["deepstack"] = (chunk.deepstack.dtype, [len(chunk.deepstack), num_tokens, width])
        return {"grid_hw": chunk.grid_thw[1:], "seconds_per_grid": chunk.seconds_per_grid, "tensors": tensors}

    @staticmethod
    def _starts(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, int]:
        starts, here = {}, HEADER_BYTES
        for name, (dtype, shape) in tensors.items():
            starts[name], here = here, here + _num_bytes(dtype, shape)
        return starts


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Maps an entry and checks all of its structure, but not the bytes of its tensors (that is `checksum`).

    Raises:
        FileNotFoundError: There is no such entry.
        BadEntryError: It is truncated, its header was altered, or it is another entry under this name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise BadEntryError(str(error)) from error
    text = metadata.get("entry", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("entry_sha256"):
        raise BadEntryError("its header was altered, or this program did not write it")
    about = json.loads(text)
    if about["schema"] != SCHEMA:
        raise BadEntryError(f"it has schema {about['schema']}, this version reads {SCHEMA}")
    if about["key"] != path.stem:
        raise BadEntryError(f"it is the entry of {about['key']}")
    layout = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    if about["layout"] != layout:
        raise BadEntryError(f"it has tensors {layout}, written were {about['layout']}")
    yield tensors, about


def checksum(tensors: dict[str, Tensor]) -> str:
    """What `EntryFile.seal` has written down of the bytes of the tensors."""
    total = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        total.update(_bytes(tensor))
    return total.hexdigest()


def read_media(tensors: dict[str, Tensor], about: dict[str, Any], rows: slice | None) -> MediaEmbeds:
    embeds, deepstack = tensors["embeds"], tensors.get("deepstack")
    if rows is not None:
        start, stop, step = rows.indices(len(embeds))
        if step != 1 or start > stop or rows.stop not in (None, stop):
            raise AssertionError(f"{rows} of {len(embeds)} embeddings")
        embeds, deepstack = embeds[rows], None if deepstack is None else deepstack[:, rows]
    return MediaEmbeds(
        embeds=embeds,
        grid_thw=tuple(about["grid_thw"]),
        seconds_per_grid=about["seconds_per_grid"],
        timestamps_s=tensors["timestamps_s"],
        key=about["key"],
        deepstack=deepstack,
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _num_bytes(dtype: torch.dtype, shape: list[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write_rows(file: Any, start: int, row: int, rows: Tensor) -> None:
    """Writes rows of the tensor that starts at byte `start`, from its row `row` on."""
    data = _bytes(rows)
    file.seek(start + row * (data.nbytes // len(rows)))
    file.write(data)


def _hash_bytes(total: Any, path: Path, start: int, end: int) -> None:
    """By reading, not by mapping: mapped pages count as this process's memory."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < end:
            data = file.read(min(_READ_BYTES, end - start))
            assert data, f"{path} ends at {start}, expected {end}"
            total.update(data)
            start += len(data)
