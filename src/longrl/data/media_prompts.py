"""Prompts of image and video generation: files, their order in training, and those that are too long."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from longrl.flow_types import MediaPrompt
from longrl.runtime import seed_for

log = logging.getLogger(__name__)


def load_prompts(path: str | Path) -> list[MediaPrompt]:
    """Reads a file of prompts; ids are line numbers where a line has none.

    .txt: a prompt a line. .jsonl: a mapping a line, with `prompt` and perhaps `id`; the other columns go to the rewards
    (GenEval's evaluation_metadata.jsonl is such a file). Empty lines are passed over, and counted in the log.

    Raises:
        ValueError: the file cannot be read, a line is malformed or has an empty prompt, an id stands twice, or there
            is nothing; names the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a file of prompts that ends in .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a file of prompts") from error
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    prompts: dict[str, MediaPrompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = parse(line, number, f"{path}:{number}")
        if prompt.id in prompts:
            raise ValueError(f"{path}:{number}: id {prompt.id!r} stands twice; make ids differ")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected one a line")
    if empty := sum(not line.strip() for line in lines):
        log.warning("%s: %d empty lines were passed over", path, empty)
    return list(prompts.values())


def _from_text(line: str, number: int, where: str) -> MediaPrompt:
    return MediaPrompt(id=str(number), text=line.strip())


def _from_json(line: str, number: int, where: str) -> MediaPrompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got {str(row)[:60]}, expected a mapping such as {{"prompt": "a red picture"}}')
    text, name = row.get("prompt"), row.get("id", number)
    if not isinstance(text, str) or not text.strip():
        got = "missing" if text is None else repr(text)[:60]
        raise ValueError(f"{where}: prompt is {got}, expected a text that is not empty")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{where}: id is {str(name)[:60]}, expected a text or a whole number")
    rest = {key: value for key, value in row.items() if key not in ("prompt", "id")}
    return MediaPrompt(id=str(name), text=text.strip(), extra=rest)


def step_prompts(prompts: Sequence[MediaPrompt], step: int, per_step: int, seed: int) -> list[tuple[int, MediaPrompt]]:
    """(epoch, prompt) of step 1, 2, ...: consecutive pieces of an endless sequence of shuffled epochs."""
    picked = []
    for place in range((step - 1) * per_step, step * per_step):
        epoch, index = divmod(place, len(prompts))
        order = list(range(len(prompts)))
        random.Random(seed_for(seed, "order", epoch)).shuffle(order)
        picked.append((epoch, prompts[order[index]]))
    return picked


def whole_prompts(
    prompts: Sequence[MediaPrompt],
    lengths: Callable[[str], list[tuple[str, int, int]]],
    too_long: Literal["raise", "skip", "cut"],
    where: str = "prompts",
) -> tuple[list[MediaPrompt], list[str]]:
    """Looks whether the text encoders can take every prompt whole.

    Args:
        lengths: text -> (tokenizer, tokens, most it takes) of each encoder.
        too_long: what a longer prompt does; `cut`: the encoders that must cut it do.
        where: their file, for messages.

    Returns:
        The prompts to use, and the ids of those that were skipped or will be cut, which the log names.

    Raises:
        ValueError: a prompt is too long and too_long is raise; or all were skipped.
    """
    kept, named = [], []
    for prompt in prompts:
        if over := _over(lengths(prompt.text)):
            said = f"{where}: prompt {prompt.id} ({prompt.text[:40]!r}...) {over}"
            if too_long == "raise":
                raise ValueError(f"{said}; shorten it, or set prompts.too_long to skip or cut")
            log.warning("%s: %s", said, "skipped" if too_long == "skip" else "cut there")
            named.append(prompt.id)
        if not over or too_long == "cut":
            kept.append(prompt)
    if not kept:
        raise ValueError(f"{where}: all {len(prompts)} prompts are too long for the text encoders; shorten them")
    return kept, named


def require_negative(text: str, lengths: Callable[[str], list[tuple[str, int, int]]], too_long: str) -> list[str]:
    """Looks whether the text encoders can take the negative prompt whole; arguments as of `whole_prompts`.

    Returns:
        Its name, if it will be cut, or nothing.

    Raises:
        ValueError: it is too long, and too_long is not cut.
    """
    over = _over(lengths(text))
    if over and too_long != "cut":
        raise ValueError(f"prompts.negative {over}; shorten it, or set prompts.too_long to cut")
    if over:
        log.warning("prompts.negative %s: cut there", over)
    return ["negative"] if over else []


def _over(counted: Sequence[tuple[str, int, int]]) -> str:
    """What is said of a text that is too long, or nothing."""
    return next((f"has {tokens} tokens, {name} takes {limit}" for name, tokens, limit in counted if tokens > limit), "")
