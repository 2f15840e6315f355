"""The recipe of the shipped warm start: supervised pre-training of the tiny twin, from random weights.

    python -m longrl.warm_start configs/tiny/warm_start.yaml

It plays the part of a real model's pre-training: the model learns to see, to describe and to explain, but not the
think-and-answer format, and without reinforcement. Stories are painted straight to the tower's input size (no mp4 in
between) and have seeds that data/synthetic/dataset.py never uses. Two stages:

    look    short windows of a story with 1, 2, 3 ... objects, one more each time the last number is mastered; beside
            them, text-only rows that teach the last step of a thought (which option says so). Rows of a plain batch.
    watch   whole stories at 16 tokens to an hour of one token every two seconds; all rows about a story share its
            prefix, as everywhere else.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longrl.config import ModelConfig, WarmStartConfig
from longrl.config_files import load_arguments
from longrl.data.synthetic.paint import paint
from longrl.data.synthetic.questions import LETTERS, ask, captions
from longrl.data.synthetic.world import Event, Story, make_story
from longrl.models import load_family
from longrl.models.family import Family
from longrl.models.streams import make_streams
from longrl.models.trunk import ATTENTION
from longrl.policy import Policy
from longrl.runtime import set_up_logging
from longrl.types import Clip, Example, Frames, MediaEmbeds, Message, Prompt

log = logging.getLogger(__name__)

FIRST_SEED = 1 << 32
HEIGHT, WIDTH, SIDE = 120, 160, 28
PAIRS = 4
"""Different second pairs painted of each stretch without a change."""
NOISE = 3.0
"""Standard deviation of the pixel noise that stands for what h264 does."""
CLIP = Clip(path="painted", fps=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """A story and what it looks like."""

    story: Story
    stretches: tuple[tuple[float, float, tuple[int, ...]], ...]
    """(start_s, end_s, indices into pixels) of each stretch in which nothing changes but the dial."""
    pixels: np.ndarray
    """uint8 [U, 2, SIDE, SIDE, 3], pairs of frames one second apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing to learn: a prompt and its response."""

    task: str
    question: str
    response: str
    given: str = ""
    """The beginning of the response, which is not trained."""


def warm_start(config: WarmStartConfig) -> Path:
    """Trains the twin and writes its Hugging Face folder.

    Returns:
        The folder.
    """
    torch.set_num_threads(config.threads)
    stories = _paint_stories(config.stories)
    trainer = _Trainer(config, stories)
    trainer.look()
    trainer.watch()
    trainer.save()
    return Path(config.out)


class _Trainer:
    def __init__(self, config: WarmStartConfig, stories: list[Painted]) -> None:
        self.config, self.stories = config, stories
        self.rng = np.random.default_rng(config.seed)
        self.family: Family = load_family(ModelConfig(path=config.model), config.seed)
        self.parameters = list(self.family.model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.look_lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.seen: defaultdict[str, list[float]] = defaultdict(list)

    def look(self) -> None:
        """Stage 1. Moves on when every number of objects is mastered, or after look_steps."""
        config, level, mastery = self.config, 1, 0.0
        self.family.model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        for step in range(1, config.look_steps + 1):
            rows: list[tuple[Row, Prompt]] = []
            windows = [self._window(level) for _ in range(config.look_windows)]
            media = self._embed([(painted, start, end, tokens) for painted, start, end, tokens, _ in windows])
            for (*_, events), item in zip(windows, media, strict=True):
                first, *others = _window_rows(events)
                picked = self.rng.permutation(len(others))[:3]
                rows += [(row, self._prompt(row, item)) for row in (first, *(others[i] for i in picked))]
            story = self._story().story
            rows += [(row, self._prompt(row, None)) for row in self._reasoning(story, 2 * config.look_windows)]
            correct = self._batch(rows)
            self._update(config.look_lr * min(1.0, step / 30))
            for (row, _), good in zip(rows, correct, strict=True):
                self.seen[row.task].append(good)
                if row.task == f"list {level}":
                    mastery = 0.97 * mastery + 0.03 * good
            if mastery > config.mastered:
                level, mastery = level + 1, 0.3
            self._report("look", step)
            if level > 7:
                break
        self.family.model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})

    def watch(self) -> None:
        """Stage 2."""
        config, policy = self.config, Policy(self.family)
        for step in range(1, config.watch_steps + 1):
            for _ in range(config.watch_stories):
                painted = self._story()
                story, hours = painted.story, int(painted.story.duration_s / 2)
                dense = self.rng.random() < config.dense_fraction
                tokens = hours if dense else min(hours, int(np.exp(self.rng.uniform(np.log(16), np.log(150)))))
                (media,) = self._embed([(painted, 0.0, story.duration_s, tokens)])
                rows = self._story_rows(story)
                prompts = [self._prompt(row, media) for row in rows]
                prefix = policy.prefix(prompts)
                streams = make_streams(prompts, [self._ids(row.response) for row in rows], prefix.length)

                def loss(logprobs: Tensor, entropy: Tensor, part: slice, rows=rows, kind="D" if dense else "s"):
                    for row, logp in zip(rows[part], logprobs.detach(), strict=True):
                        self.seen[f"{kind} {row.task}"].append(float(logp.sum().exp()))
                    return -logprobs.sum() / 250

                policy.backward(prefix, streams, loss)
            self._update(
                config.watch_lr * min(1.0, step / 30) * (1 + math.cos(math.pi * step / config.watch_steps)) / 2
            )
            self._report("watch", step)

    def save(self) -> None:
        self.family.save(Path(self.config.out))

    # ---- what is learned

    def _story(self) -> Painted:
        return self.stories[self.rng.integers(len(self.stories))]

    def _window(self, level: int) -> tuple[Painted, float, float, int, Sequence[Event]]:
        painted = self._story()
        events = painted.story.events
        most = min(level, len(events))
        count = most if self.rng.random() < 0.7 else int(self.rng.integers(1, most + 1))
        first = int(self.rng.integers(len(events) - count + 1))
        window = events[first : first + count]
        return painted, window[0].start_s, window[-1].end_s, int(self.rng.integers(2 * count, 6 * count + 1)), window

    def _reasoning(self, story: Story, num: int) -> list[Row]:
        """The last sentence of careful thoughts, given all before it; or all but the first."""
        rows = []
        for question in ask(story, int(self.rng.integers(1 << 30)), num, open_fraction=0.0):
            sentences = [f"{sentence}." for sentence in question.careful.rstrip(".").split(". ")]
            cut = 1 if question.category in ("order", "counting") and self.rng.random() < 0.5 else len(sentences) - 1
            given = " ".join(sentences[:cut])
            rows.append(
                Row(
                    task=f"reason {question.category}",
                    question=_asked(question.text, question.options),
                    response=question.careful,
                    given=given,
                )
            )
        return rows

    def _story_rows(self, story: Story) -> list[Row]:
        rows = [
            Row(task="caption", question="describe the video.", response=captions(story)),
            Row(task="list", question="list the colours.", response=_colours(story.events)),
        ]
        for question in ask(story, int(self.rng.integers(1 << 30)), self.config.watch_questions):
            asked = _asked(question.text, question.options)
            rows.append(Row(task=f"explain {question.category}", question=asked, response=question.careful))
        return rows

    # ---- how

    def _embed(self, asked: list[tuple[Painted, float, float, int]]) -> list[MediaEmbeds]:
        """Embeddings, with gradients, of (story, start_s, end_s, tokens): one call of the tower, each look once."""
        pixels, inverse, offset = [], [], 0
        for painted, start, end, tokens in asked:
            times = start + (np.arange(tokens) + self.rng.random()) * (end - start) / tokens
            looks = np.empty(tokens, dtype=np.int64)
            for begin, stop, indices in painted.stretches:
                here = (times >= begin) & (times < stop)
                looks[here] = self.rng.choice(indices, here.sum())
            used, where = np.unique(looks, return_inverse=True)
            pixels.append(painted.pixels[used].reshape(-1, SIDE, SIDE, 3))
            inverse.append(torch.from_numpy(where + offset))
            offset += len(used)
        noisy = np.concatenate(pixels) + self.rng.normal(0, NOISE, (2 * offset, SIDE, SIDE, 3))
        frames = Frames(pixels=np.clip(noisy, 0, 255).astype(np.uint8), timestamps_s=np.zeros(2 * offset))
        embeds, _ = self.family.encode_frames([frames])
        return [
            MediaEmbeds(
                embeds=embeds[where],
                grid_thw=(tokens, 2, 2),
                seconds_per_grid=(end - start) / tokens,
                timestamps_s=torch.zeros(2 * tokens, dtype=torch.float64),
                key="painted",
            )
            for where, (_, start, end, tokens) in zip(inverse, asked, strict=True)
        ]

    def _prompt(self, row: Row, media: MediaEmbeds | None) -> Prompt:
        content = (row.question,) if media is None else (CLIP, row.question)
        example = Example(id=row.task, messages=(Message(role="user", content=content),), answer=None, kind="open")
        return self.family.prompt(example, () if media is None else (media,))

    def _ids(self, text: str) -> list[int]:
        return [*self.family.tokenizer.encode(text, add_special_tokens=False), min(self.family.stop_ids)]

    def _batch(self, rows: Sequence[tuple[Row, Prompt]]) -> list[float]:
        """Backward of the mean cross entropy of a plain padded batch; whether each row is right, token by token."""
        model = self.family.model
        whole = [prompt.followed_by(self._ids(row.response)) for row, prompt in rows]
        length = max(map(len, whole))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        positions = torch.zeros(3, len(rows), length, dtype=torch.int64)
        trained = torch.zeros(len(rows), length, dtype=torch.bool)
        for n, ((row, prompt), full) in enumerate(zip(rows, whole, strict=True)):
            given = len(self._ids(row.given)) - 1 if row.given else 0
            ids[n, : len(full)], positions[:, n, : len(full)] = full.token_ids, full.position_ids
            trained[n, len(prompt) + given : len(full)] = True
        hidden = model.model.language_model.embed_tokens(ids)
        media = torch.cat([item.embeds for _, prompt in rows for item in prompt.media])
        hidden = hidden.masked_scatter((ids == model.config.video_token_id)[..., None], media)
        hidden = model.model.language_model(inputs_embeds=hidden, position_ids=positions, use_cache=False)
        where = trained[:, 1:]
        logits, labels = model.lm_head(hidden.last_hidden_state[:, :-1][where]), ids[:, 1:][where]
        torch.nn.functional.cross_entropy(logits, labels).backward()
        right = torch.ones_like(where)
        right[where] = logits.argmax(-1) == labels
        return right.all(-1).double().tolist()

    def _update(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()

    def _report(self, stage: str, step: int) -> None:
        if step % self.config.log_every:
            return
        means = {task: sum(values) / len(values) for task, values in sorted(self.seen.items())}
        log.info("%s %d: %s", stage, step, "  ".join(f"{task} {mean:.2f}" for task, mean in means.items()))
        self.seen.clear()
        self.save()


def _window_rows(events: Sequence[Event]) -> list[Row]:
    level = len(events)
    rows = [
        Row(task=f"list {level}", question="list the colours.", response=_colours(events)),
        Row(
            task=f"caption {level}",
            question="describe the video.",
            response=", ".join(f"{event.name} {event.place}" for event in events),
        ),
    ]
    rows += [Row(task=f"where {level}", question=f"where is the {e.name}?", response=e.place) for e in events]
    for one, two in pairwise(events):
        after, before = f"what comes right after the {one.name}?", f"what comes right before the {two.name}?"
        rows += [
            Row(task=f"next {level}", question=after, response=two.name),
            Row(task=f"next {level}", question=before, response=one.name),
        ]
    return rows


def _asked(text: str, options: Sequence[str]) -> str:
    return "\n".join([text, *(f"{a}. {b}" for a, b in zip(LETTERS, options, strict=False)), "explain."])


def _colours(events: Sequence[Event]) -> str:
    return ", ".join(event.colour for event in events)


def _paint_stories(num: int) -> list[Painted]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_paint_story, range(FIRST_SEED, FIRST_SEED + num), chunksize=16))


def _paint_story(seed: int) -> Painted:
    """Three in five stories last an hour and a little more, the others two minutes to an hour."""
    torch.set_num_threads(1)
    rng = np.random.default_rng((seed, 1))
    hour = rng.random() < 0.6
    story = make_story(seed, float(rng.integers(3600, 3781) if hour else int(np.exp(rng.uniform(4.8, 8.18)))))
    changes = {0.0, story.duration_s, *(scene.start_s for scene in story.scenes)}
    changes |= {time for event in story.events for time in (event.start_s, event.end_s)}
    cuts, frames, stretches = sorted(changes), [], []
    for start, end in pairwise(cuts):
        first = len(frames)
        for time in start + rng.random(PAIRS) * max(end - start - 1.0, 0.0):
            frames.append([paint(story, t, HEIGHT, WIDTH) for t in (time, min(time + 1.0, end - 1e-3))])
        stretches.append((start, end, tuple(range(first, len(frames)))))
    x = torch.from_numpy(np.array(frames)).flatten(0, 1).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
    pixels = x.permute(0, 2, 3, 1).reshape(len(frames), 2, SIDE, SIDE, 3).contiguous().numpy()
    return Painted(story=story, stretches=tuple(stretches), pixels=pixels)


if __name__ == "__main__":
    set_up_logging()
    warm_start(load_arguments(sys.argv[1:], "warm_start"))  # pyright: ignore[reportArgumentType]
