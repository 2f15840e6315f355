"""What files a Hugging Face folder must have: weights and words. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

_SAFE, _BIN = "model.safetensors", "pytorch_model.bin"
_WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def require_weights(path: Path) -> None:
    """
    Raises:
        ValueError: there are none, or not all that an index names, or a file is cut short.
    """
    names = (_SAFE, f"{_SAFE}.index.json", _BIN, f"{_BIN}.index.json")  # as transformers looks for them
    name = next((name for name in names if (path / name).is_file()), None)
    if name is None:
        raise ValueError(f"{path} has no {_SAFE}; copy its weights again")
    shards = _shards(path, name) if name.endswith(".index.json") else {name}
    for file in (path / shard for shard in sorted(shards) if shard.endswith(".safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass  # reads where each tensor lies, and that the file ends with the last
        except SafetensorError as error:
            raise ValueError(f"{file}: its weights cannot be read ({error}); copy them again") from error


def _shards(path: Path, index: str) -> set[str]:
    try:
        shards = set(map(str, json.loads((path / index).read_text())["weight_map"].values()))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path / index} maps no weights to files ({error}); copy it again") from error
    if lost := sorted(name for name in shards if not (path / name).is_file()):
        raise ValueError(
            f"{path} lacks {len(lost)} of the {len(shards)} files that {index} names: {first(lost)}; copy them again"
        )
    return shards


def require_words(path: Path) -> None:
    """
    Raises:
        ValueError: there is no tokenizer.
    """
    there = {name for name in _WORDS if (path / name).is_file()}
    if not there or there in ({"vocab.json"}, {"merges.txt"}):
        raise ValueError(
            f"{path} has no words in tokenizer.json (or vocab.json with merges.txt); copy its tokenizer again"
        )


def read_texts(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Those of the named files that are there."""
    return {name: (path / name).read_text() for name in names if (path / name).exists()}


def first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
