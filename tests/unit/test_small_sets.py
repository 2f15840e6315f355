"""Small synthetic sets: what they say is true, and tests hold out what training has not seen."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longrl.config import DataConfig, ModelConfig, VideoConfig
from longrl.data.examples import load_examples
from longrl.data.synthetic.paint import RGB
from longrl.data.synthetic.small import CELL_PX, COLOURS, GRID, SPLITS, make_small
from longrl.models import load_family
from longrl.rewards.format import format_reward, parse_answer, parse_thought
from longrl.types import Example, Rollout

SIZE = {"train": 60, "test": 20, "seed": 3}


@pytest.fixture(scope="module", params=["arithmetic", "counting"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    files = make_small(request.param, folder, **SIZE)
    load = {split: load_examples(path, DataConfig(), VideoConfig(), demonstrations=split == "train_sft")
            for split, path in files.items()}  # fmt: skip
    return request.param, folder, load


def seen(path: str) -> list[tuple[str, str]]:
    """(colour, shape) of the things in a picture, by its pixels: how much each fills of the box around it."""
    pixels, found = np.asarray(Image.open(path)), []
    for cell in range(GRID * GRID):
        top, left = cell // GRID * CELL_PX, cell % GRID * CELL_PX
        part = pixels[top : top + CELL_PX, left : left + CELL_PX]
        for colour in COLOURS:
            mask = (part == RGB[colour]).all(-1)
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                filled = mask.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
                found.append((colour, "square" if filled > 0.95 else "circle" if filled > 0.7 else "triangle"))
    return found


def question(example: Example) -> str:
    return "".join(part for part in example.messages[0].content if isinstance(part, str))


def truth(task: str, example: Example) -> int:
    text = question(example)
    if task == "arithmetic":
        first, *pairs = re.fullmatch(r"what is (\d) ([+-]) (\d) ([+-]) (\d)\?", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
        return int(first) + sum(int(sign + term) for sign, term in zip(pairs[::2], pairs[1::2], strict=True))
    asked = text.split()[2].removesuffix("s")
    return sum(asked in thing for thing in seen(example.clips[0].path))


def test_answers_are_true(made):
    task, _, load = made
    for split in SPLITS:
        for example in load[split]:
            assert (example.kind, example.answer) == ("number", str(truth(task, example))), example.id
    counts = Counter(example.answer for example in load["train_rl"])
    assert len(counts) > 3
    assert max(counts.values()) < 30  # of 60: a constant answer is mostly wrong


def test_a_picture_is_asked_about_once_for_each_count(made):
    """So that questions share its prefix, and how often says nothing about the answer."""
    task, _, load = made
    if task == "counting":
        for split in SPLITS:
            pictures: dict[str, list[str]] = {}
            for example in load[split]:
                pictures.setdefault(example.clips[0].path, []).append(str(example.answer))
            assert all(sorted(answers) == ["0", "1", "2", "3"] for answers in pictures.values())


def test_the_shipped_model_sees_every_cell(made, root):
    """One token each: pictures are not shrunk."""
    task, _, load = made
    if task == "counting":
        family = load_family(ModelConfig(path=str(root / "assets" / "warm_start")))
        (clip,) = load["test"][0].clips
        assert family.measure(clip).num_tokens == GRID * GRID


def test_the_thought_ends_at_the_answer(made):
    _, _, load = made
    for example in load["train_sft"]:
        thought = str(parse_thought(example.response))
        assert ("guess" in thought) != thought.endswith(f" {example.answer}"), example.id


def test_half_of_the_demonstrations_guess(made):
    _, _, load = made
    rollouts = [
        (example, Rollout(token_ids=(), logprobs=(), text=example.response, finish_reason="stop", policy_version=0))
        for example in load["train_sft"]
    ]
    assert all(format_reward(*one) == 1.0 for one in rollouts)
    right = Counter(
        ("guess" in rollout.text, parse_answer(rollout.text) == example.answer) for example, rollout in rollouts
    )
    assert right[(False, False)] == 0
    assert 0.3 < right[(False, True)] / 60 < 0.7
    assert right[(True, False)] > right[(True, True)]


def test_a_test_asks_what_training_did_not(made):
    task, _, load = made
    assert [len(load[split]) for split in SPLITS] == [60, 60, 20]
    keys = [
        {question(e) if task == "arithmetic" else Path(e.clips[0].path).read_bytes() for e in load[split]}
        for split in SPLITS
    ]
    assert not keys[2] & (keys[0] | keys[1])


def test_the_same_seed_makes_the_same_files(made, tmp_path):
    task, folder, _ = made
    make_small(task, tmp_path, **SIZE)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == (3 if task == "arithmetic" else 3 + 15 + 15 + 5)
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_an_unknown_task_is_refused(longrl, tmp_path):
    done = longrl("data", "make", "geometry", "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "no small set 'geometry'; expected one of arithmetic, counting" in done.stderr
