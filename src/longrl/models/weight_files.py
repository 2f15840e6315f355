"""The files of weights in a Hugging Face folder. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def require_weights(path: Path) -> None:
    """
    Raises:
        ValueError: there are none, or not all that an index names, or a file is cut short.
    """
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise ValueError(f"{path} has no {_WEIGHTS[0]}; copy its weights again")
    shards = {_WEIGHTS[0]}
    if not (path / _WEIGHTS[0]).is_file() and (path / _INDEX).is_file():
        try:
            shards = set(json.loads((path / _INDEX).read_text())["weight_map"].values())
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path / _INDEX} maps no weights to files ({error}); copy it again") from error
        lost = sorted(name for name in shards if not (path / name).is_file())
        if lost:
            raise ValueError(
                f"{path} lacks {len(lost)} of the {len(shards)} files that {_INDEX} names: {first(lost)}; copy them "
                "again"
            )
    for file in (path / name for name in sorted(shards) if (path / name).is_file()):
        try:
            with safe_open(file, framework="np"):
                pass  # reads where each tensor lies, and that the file ends with the last
        except SafetensorError as error:
            raise ValueError(f"{file}: its weights cannot be read ({error}); copy them again") from error


def first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
