"""Synthetic videos and questions on disk: what training and evaluation read."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from longrl.config import SyntheticConfig
from longrl.data.synthetic import paint, world
from longrl.data.synthetic import render as rendering
from longrl.data.synthetic.questions import Question, ask, response
from longrl.data.synthetic.world import Story, make_story
from longrl.files import write_whole

logger = logging.getLogger(__name__)

HASTY_FRACTION = 0.5
"""Share of demonstrated responses that guess without looking: reinforcement then has something to unlearn."""
MAX_EXTRA_DURATION = 0.05
MAX_STORIES = 100_000
"""Story seeds of a split that belong to one dataset seed."""
MAX_SEED = 20_000
"""So that every story seed here is below 2**32: whoever trains on other stories takes larger ones."""
NUM_WORKERS = 2
LOG_EVERY = 6
TRAIN, TEST = 0, 1
"""Parity of story seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Where everything is."""

    train_sft: Path
    """JSONL; rows carry a demonstrated response."""
    train_rl: Path
    """JSONL; other questions about the same videos."""
    test: Path
    """JSONL; other videos."""
    videos: tuple[Path, ...]
    """Training videos, then test videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the bytes of a video."""

    seed: int
    duration_s: float
    fps: float
    width: int
    height: int
    audio: bool
    code: str
    """Digest of the code that draws and renders."""


def build_dataset(config: SyntheticConfig) -> Dataset:
    """Render the videos that are not there yet, and write the questions.

    Rows hold id, video (relative to the file's folder), question, options, answer, kind and category; train_sft rows
    a response too. A pure function of the config; every file appears whole or not at all.

    Raises:
        ValueError: If the config asks for what cannot be made.
        OSError: If the folder cannot be written.
    """
    train = _stories(config, TRAIN, config.train_videos)
    test = _stories(config, TEST, config.test_videos)
    root = Path(config.dir)
    folder = root / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"{split}-{i:03d}.mp4": s
        for split, stories in (("train", train), ("test", test))
        for i, s in enumerate(stories)
    }
    _render_missing(folder, {name: _recipe(story, config) for name, story in named.items()})

    sft, rl, held_out = [], [], []
    for name, story in named.items():
        if story.seed % 2 == TRAIN:
            # One list of distinct questions, dealt to the two stages.
            questions = ask(story, config.seed, 2 * config.train_questions)
            sft += _sft_rows(name, questions[: config.train_questions], story)
            rl += _rows(name, "rl-", questions[config.train_questions :])
        else:
            held_out += _rows(name, "", ask(story, config.seed, config.test_questions))
    dataset = Dataset(
        train_sft=root / "train_sft.jsonl",
        train_rl=root / "train_rl.jsonl",
        test=root / "test.jsonl",
        videos=tuple(folder / name for name in named),
    )
    for path, rows in ((dataset.train_sft, sft), (dataset.train_rl, rl), (dataset.test, held_out)):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return dataset


def _stories(config: SyntheticConfig, split: int, num: int) -> list[Story]:
    """Stories whose seeds no other split and no other dataset seed uses."""
    if not 0 <= config.seed <= MAX_SEED:
        raise ValueError(f"videos.seed must be 0 to {MAX_SEED}, got {config.seed}")
    if num > MAX_STORIES:
        raise ValueError(f"videos: at most {MAX_STORIES} train or test videos, got {num}")
    seeds = [2 * (config.seed * MAX_STORIES + index) + split for index in range(num)]
    return [make_story(seed, _draw_duration(config.seconds, seed)) for seed in seeds]


def _draw_duration(seconds: float, seed: int) -> float:
    """Between seconds and 5% more; on a whole second where one is in reach."""
    drawn = seconds * np.random.default_rng((seed, 1)).uniform(1.0, 1.0 + MAX_EXTRA_DURATION)
    return max(float(seconds), float(math.floor(drawn)))


def _recipe(story: Story, config: SyntheticConfig) -> Recipe:
    digest = hashlib.sha256()
    for module in (world, paint, rendering):
        digest.update(Path(str(module.__file__)).read_bytes())
    return Recipe(
        seed=story.seed,
        duration_s=story.duration_s,
        fps=config.fps,
        width=config.width,
        height=config.height,
        audio=config.audio,
        code=digest.hexdigest()[:16],
    )


def _render_missing(folder: Path, recipes: dict[str, Recipe]) -> None:
    """Render every video whose file is not the one that the manifest says was made by its recipe."""
    manifest_path = folder / "manifest.json"
    manifest = _read_manifest(manifest_path)
    missing = {}
    for name, recipe in recipes.items():
        path, entry = folder / name, manifest.get(name)
        if entry is None or not path.is_file() or entry != {**asdict(recipe), "bytes": path.stat().st_size}:
            missing[name] = recipe
    logger.info("%s: %d videos to render, %d already there", folder, len(missing), len(recipes) - len(missing))
    if not missing:
        return
    # Spawned, not forked: the caller may hold threads (torch) that a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(NUM_WORKERS, len(missing)), context, initializer=_die_with_parent)
    try:
        with _interrupts_held():
            futures = {pool.submit(_render_recipe, recipe, folder / name): name for name, recipe in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            manifest[name] = {**asdict(missing[name]), "bytes": future.result()}
            write_whole(manifest_path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            if done % LOG_EVERY == 0:
                logger.info("%d of %d videos rendered", done, len(missing))
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while workers start: they inherit that for life, the caller gets it a moment later.

    So workers finish the video in hand, a few seconds, and the caller gives them no other.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _read_manifest(path: Path) -> dict[str, Any]:
    """What was rendered here; nothing if the file is missing or not ours, so that all is rendered again."""
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _render_recipe(recipe: Recipe, path: Path) -> int:
    """Render a video in a worker process; returns its bytes."""
    story = make_story(recipe.seed, recipe.duration_s)
    rendering.render(story, path, fps=recipe.fps, width=recipe.width, height=recipe.height, audio=recipe.audio)
    return path.stat().st_size


def _sft_rows(video: str, questions: list[Question], story: Story) -> Iterator[dict[str, Any]]:
    """Rows with responses: hasty ones exactly HASTY_FRACTION of them, at random places."""
    ranks = np.random.default_rng((story.seed, 2)).permutation(len(questions))
    hasty = ranks < round(HASTY_FRACTION * len(questions))
    for row, question, is_hasty in zip(_rows(video, "sft-", questions), questions, hasty, strict=True):
        thought, answer = (question.hasty, question.hasty_answer) if is_hasty else (question.careful, question.answer)
        yield {**row, "response": response(thought, answer)}


def _rows(video: str, stage: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
    for index, question in enumerate(questions):
        yield {
            "id": f"{Path(video).stem}-{stage}{index:03d}",
            "video": f"videos/{video}",
            "question": question.text,
            "options": list(question.options),
            "answer": question.answer,
            "kind": question.kind,
            "category": question.category,
        }
