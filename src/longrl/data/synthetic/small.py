"""Small sets of questions that one look or one line of thought answers: counting in pictures, sums of three numbers.

Rows as those of the long videos: demonstrations of which half guess, questions to reinforce, and others to test.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from longrl.data.synthetic.dataset import HASTY_FRACTION
from longrl.data.synthetic.paint import RGB, TONE_RGB
from longrl.data.synthetic.questions import response
from longrl.files import write_whole

SPLITS = ("train_sft", "train_rl", "test")
GRID, CELL_PX = 3, 28
"""A picture is GRID x GRID cells: a tiny vision tower makes one token of a cell."""
COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square", "triangle")
NUM_TERMS, MAX_TERM, MAX_COUNT = 3, 9, 3
HASTY = "a guess."


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question with its truth."""

    text: str
    answer: int
    guesses: int
    """A guess is below this."""
    careful: str
    """A thought that ends at the answer."""
    category: str


Task = Callable[[np.random.Generator], tuple[Image.Image | None, list[Item]]]
"""Draws questions, about a picture perhaps."""


def make_small(task: str, folder: str | Path, train: int, test: int, seed: int = 0) -> dict[str, Path]:
    """Writes a set: a pure function of its arguments.

    Args:
        task: A name in TASKS.
        folder: Where; rows name pictures relative to it.
        train: Questions to demonstrate, and as many others to reinforce.
        test: Held-out questions.
        seed: Of all draws.

    Returns:
        Split -> JSONL file.
    """
    if task not in TASKS:
        raise ValueError(f"no small set {task!r}; expected one of {', '.join(TASKS)}")
    folder, files = Path(folder), dict[str, Path]()
    folder.mkdir(parents=True, exist_ok=True)
    for index, split in enumerate(SPLITS):
        rows, rng = list[dict[str, Any]](), np.random.default_rng((seed, index))
        size = test if split == "test" else train
        while len(rows) < size:
            picture, items = TASKS[task](rng)
            about: dict[str, Any] = {}
            if picture is None:  # a text is of the training sets or of the test set, by its hash; pictures all differ
                items = [item for item in items if (crc32(item.text.encode()) % 5 == 0) == (split == "test")]
            else:
                about = {"image": f"images/{split}-{len(rows):04d}.png"}
                (folder / "images").mkdir(exist_ok=True)
                picture.save(folder / about["image"])
            for item in items:
                row = {"id": f"{split}-{len(rows):04d}"} | about | _columns(item)
                rows.append(row | _demonstrated(item, rng) if split == "train_sft" else row)
        files[split] = folder / f"{split}.jsonl"
        write_whole(files[split], "".join(json.dumps(row) + "\n" for row in rows[:size]))
    return files


def _columns(item: Item) -> dict[str, Any]:
    return {"question": item.text, "answer": str(item.answer), "kind": "number", "category": item.category}


def _demonstrated(item: Item, rng: np.random.Generator) -> dict[str, Any]:
    is_hasty = rng.random() < HASTY_FRACTION
    guess = str(rng.integers(item.guesses))
    return {"response": response(HASTY, guess) if is_hasty else response(item.careful, str(item.answer))}


def arithmetic(rng: np.random.Generator) -> tuple[None, list[Item]]:
    """Numbers up to MAX_TERM added and taken away from left to right, never below zero. Who knows what two of them give
    can answer questions never seen."""
    total, *terms = rng.integers(0, MAX_TERM + 1, size=NUM_TERMS).tolist()
    text, thoughts, signs = f"{total}", list[str](), set[str]()
    for term in terms:
        sign = "-" if term <= total and rng.random() < 0.5 else "+"
        after = total + term if sign == "+" else total - term
        thoughts.append(f"{total} {sign} {term} = {after}")
        text, total = f"{text} {sign} {term}", after
        signs.add(sign)
    return None, [
        Item(
            text=f"what is {text}?",
            answer=total,
            guesses=NUM_TERMS * MAX_TERM + 1,
            careful=", ".join(thoughts),
            category={"+": "sum", "-": "difference"}[signs.pop()] if len(signs) == 1 else "mixed",
        )
    ]


def counting(rng: np.random.Generator) -> tuple[Image.Image, list[Item]]:
    """How many things of a colour, or of a shape, are in a picture of a few (after CLEVR, arXiv 1612.06890): of every
    picture, in any order, one question for each count. There are as many colours as shapes, so a question alone says
    nothing about its answer."""
    while True:
        cells = sorted(rng.choice(GRID * GRID, size=rng.integers(4, 8), replace=False).tolist())
        things = [(cell, str(rng.choice(COLOURS)), str(rng.choice(SHAPES))) for cell in cells]
        counts = Counter(name for _, colour, shape in things for name in (colour, shape))
        asked = [[name for name in (*COLOURS, *SHAPES) if counts[name] == n] for n in range(MAX_COUNT + 1)]
        if all(asked):
            break
    order = rng.permutation(MAX_COUNT + 1).tolist()
    seen = "i see " + ", ".join(f"{colour} {shape}" for _, colour, shape in things)
    return _draw(things, rng), [_count(str(rng.choice(asked[n])), n, seen) for n in order]


def _count(asked: str, answer: int, seen: str) -> Item:
    by_colour = asked in COLOURS
    return Item(
        text=f"how many {asked} things are there?" if by_colour else f"how many {asked}s are there?",
        answer=answer,
        guesses=MAX_COUNT + 1,
        careful=f"{seen}. of {asked} {answer}",
        category="colour" if by_colour else "shape",
    )


def _draw(things: list[tuple[int, str, str]], rng: np.random.Generator) -> Image.Image:
    side = GRID * CELL_PX
    picture = Image.new("RGB", (side, side), TONE_RGB[str(rng.choice(list(TONE_RGB)))])
    draw = ImageDraw.Draw(picture)
    for cell, colour, shape in things:
        size = int(rng.integers(18, 23))
        left = cell % GRID * CELL_PX + int(rng.integers(0, CELL_PX - size))
        top = cell // GRID * CELL_PX + int(rng.integers(0, CELL_PX - size))
        right, bottom = left + size, top + size
        if shape == "circle":
            draw.ellipse((left, top, right, bottom), RGB[colour])
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), RGB[colour])
        else:
            draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], RGB[colour])
    return picture


TASKS: dict[str, Task] = {"arithmetic": arithmetic, "counting": counting}
