"""Hugging Face folders: read strictly, without transformers' progress bars and random fillings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from longrl.models.folder_files import first, require_weights, require_words

_OBJECTS = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files of which transformers' and our code take for granted that they can be read."""
_OLD_BUFFERS = (r"(^|\.)rotary_(pos_)?emb\.inv_freq$", r"(^|\.)position_ids$")
"""Weights of older files that are computed today."""
_BAD_FILE = (StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
"""What transformers raises of files that are JSON and say what cannot be: "hidden_size": "big"."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What is wrong with a folder becomes a ValueError that names it."""
    for file in [*path.glob("*.json"), *path.glob("*/*.json")]:
        if file.name in _OBJECTS:
            _require_object(path, file)
    try:
        with quiet():
            yield
    except SafetensorError as error:
        raise ValueError(f"model.path {path}: its weights cannot be read ({error}); copy them again") from error
    except ValueError as error:
        raise ValueError(f"model.path {path}: {_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"model.path {path}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n"))


@contextmanager
def _understood(file: Path) -> Iterator[None]:
    """Around transformers' reading of what the file says."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _BAD_FILE):  # tokenizers raises bare ones
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"{file} says what transformers cannot use ({type(error).__name__}: {said}); copy it again"
        ) from error


def _require_object(folder: Path, file: Path) -> None:
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except ValueError as error:
        name = file.relative_to(folder)
        raise ValueError(f"model.path {folder}: its {name} is not a JSON object ({error}); copy it again") from error


def read_model(model_class: Any, path: Path, dtype: torch.dtype, unread: Iterable[str] = (), **kwargs: Any) -> Any:
    """A model with all of its weights from the folder.

    Args:
        model_class: one of transformers', or an Auto class.
        unread: patterns of weights that may be there and have no place in it; transformers has its own too.
        kwargs: for its `from_pretrained`.

    Raises:
        ValueError: some are missing, of another size than config.json says, or too many for it, or config.json is none
            of such a model.
    """
    require_weights(path)
    with _understood(path / "config.json"):
        # sizes that differ are listed rather than raised, so that the message can name them
        model, info = model_class.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    # an error where transformers fills in random numbers
    missing = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
    if missing:
        raise ValueError(
            f"{len(missing)} weights are missing or of another size than config.json says: {first(missing)}; copy "
            "them again"
        )
    known = re.compile("|".join([*_OLD_BUFFERS, *unread]))
    extra = sorted(key for key in info["unexpected_keys"] if not known.search(key))
    if extra:
        raise ValueError(
            f"{len(extra)} weights have no place in the model that config.json describes: {first(extra)}; copy "
            "config.json and the weights of one checkpoint, or take these (of another head, say) out of the file"
        )
    realign(model)
    return model


def realign(model: PreTrainedModel) -> None:
    """As read, tensors lie in memory as in the file, and products round differently by alignment: a resumed run would
    leave the path of one that never stopped."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Of the class that the folder names. AutoTokenizer reads a plain one beside a config.json of Qwen2 as Qwen2's own,
    which splits text differently.

    Raises:
        ValueError: there is none, or one without words.
    """
    about = path / "tokenizer_config.json"
    named = json.loads(about.read_text()).get("tokenizer_class") if about.is_file() else None
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    require_words(path)
    with _understood(path / "tokenizer.json"):
        tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(path)
    if tokenizer.vocab_size <= 1:  # transformers makes one of a single token where it finds nothing
        raise ValueError(f"{path}: its tokenizer has no words; copy it again")
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and table of weights off the terminal; what matters of them is raised."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
