"""Rewards of images and videos: `Media -> [N]`, one call for all samples of a prompt.

A number, or None where a sample could not be scored. A slow judge returns a `concurrent.futures.Future` of that list:
nothing waits for it before the step's other prompts have been sampled.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from longrl.flow_types import Media, MediaPrompt, ScoredMedia
from longrl.registry import resolve
from longrl.rewards.media_scorer import Scorer, Scores
from longrl.scorers_config import CLIPS, ScorersConfig
from longrl.scoring_config import require_weights
from longrl.totals import Totals

logger = logging.getLogger(__name__)

MediaReward = Callable[[Media], "Scores | Future[Scores]"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
    "white": (1, 1, 1),
    "black": (0, 0, 0),
}


def colour(media: Media) -> list[float]:
    """1 - mean |pixel - the colour that the prompt names|: 1 for a flat picture of it, 0 for its opposite.

    Raises:
        ValueError: the prompt names no colour, or several.
    """
    named = [word for word in re.findall(r"[a-z]+", media.prompt.text.lower()) if word in COLOURS]
    if len(set(named)) != 1:
        raise ValueError(f"the prompt names {', '.join(named) or 'none'} of the colours {', '.join(COLOURS)}, not one")
    away = np.abs(media.pixels / 255.0 - np.array(COLOURS[named[0]]))
    return (1 - away.mean((1, 2, 3, 4))).tolist()


def brightness(media: Media) -> list[float]:
    """Mean of all pixels, 0 to 1."""
    return (media.pixels / 255.0).mean((1, 2, 3, 4)).tolist()


def jpeg_size(media: Media) -> list[float]:
    """Thousand bytes of a frame as JPEG of quality 95, averaged over frames; a negative weight asks for compressible
    pictures.

    Reference: DDPO, arXiv 2305.13301, section 5.1 (compressibility).
    """
    return [sum(map(_jpeg_bytes, frames)) / (1000 * len(frames)) for frames in media.pixels]


def smoothness(media: Media) -> list[float]:
    """1 - mean |frame - the one before it|, of videos.

    Raises:
        ValueError: there is one frame.
    """
    if media.pixels.shape[1] < 2:
        raise ValueError("smoothness in time is of videos, and this is an image")
    return (1 - np.abs(np.diff(media.pixels / 255.0, axis=1)).mean((1, 2, 3, 4))).tolist()


MEDIA_REWARDS: dict[str, MediaReward] = {
    "brightness": brightness,
    "colour": colour,
    "jpeg_size": jpeg_size,
    "smoothness": smoothness,
}

_LOOKED_BACK = 1000
"""Samples of a reward of which `scorers.max_failures` may fail."""


class MediaRewards:
    """Scores samples. `failures` counts, by reward name, the samples that it did not score."""

    def __init__(self, weights: Mapping[str, float], scorers: ScorersConfig | None = None, processes: int = 1) -> None:
        """
        Args:
            weights: reward name -> weight.
            scorers: what those need that are models or services.
            processes: that score, each its own samples: they divide the limits of services.

        Raises:
            ValueError: an unknown name, nothing with a weight, or a scorer whose files or key are not there.
            ImportError: a scorer's extra is not installed.
            OSError, RuntimeError: a service's `dir` cannot be used.
        """
        require_weights(weights)
        self.weights, self.scorers = dict(weights), scorers or ScorersConfig()
        self.failures: Counter[str] = Counter()
        self._recent: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=_LOOKED_BACK))
        names = sorted(weights, key=lambda name: name not in self.scorers.asked_elsewhere)  # those are late: first
        self._rewards: dict[str, MediaReward] = {
            name: _scorer(name, self.scorers, processes)
            if name in self.scorers.names
            else resolve(name, {**dict.fromkeys(self.scorers.names), **MEDIA_REWARDS}, "reward")  # all, for the message
            for name in names
        }
        self._loaded = [reward for reward in self._rewards.values() if isinstance(reward, Scorer)]

    def require(self, prompts: Sequence[MediaPrompt]) -> None:
        """Looks whether all prompts can be scored.

        Raises:
            ValueError: one cannot.
        """
        for scorer in self._loaded:
            scorer.require(prompts)

    def check(self, sample: Media) -> None:
        """Looks whether the scorers are there; raises as Scorer.check."""
        for scorer in self._loaded:
            scorer.check(sample)

    def take(self) -> Totals:
        """What was asked elsewhere since this was last called, and what it cost."""
        return Totals.sum([scorer.take() for scorer in self._loaded])

    def score(self, batch: Sequence[Media]) -> list[ScoredMedia]:
        """One reward after the other, each of all media: a scorer is loaded once. Waits for those that are late.

        Raises:
            RuntimeError: a reward has failed too often.
        """
        made: dict[str, list[Any]] = {}
        for name, reward in self._rewards.items():
            made[name] = [_attempted(lambda reward=reward, media=media: reward(media)) for media in batch]
            if isinstance(reward, Scorer):
                reward.rest()
        return [self._finish(media, {name: parts[i] for name, parts in made.items()}) for i, media in enumerate(batch)]

    def __call__(self, media: Media) -> ScoredMedia:
        return self.score([media])[0]

    def _finish(self, media: Media, made: Mapping[str, Any]) -> ScoredMedia:
        known = {name: self._values(name, media, made[name]) for name in self.weights}
        return ScoredMedia(rewards=known, total=[self._total(known, i) for i in range(len(media))])

    def _values(self, name: str, media: Media, made: Any) -> list[float | None]:
        values: list[float | None] | Exception = _attempted(lambda: _numbers(made, len(media)))
        if isinstance(values, Exception):
            said = f"{type(values).__name__}: {values}"
            logger.warning("reward %s of prompt %s failed: %s", name, media.prompt.id, said)
            values = [None for _ in range(len(media))]
        self._count(name, values)
        return values

    def _total(self, rewards: Mapping[str, list[float | None]], i: int) -> float | None:
        weighted = []
        for name, weight in self.weights.items():
            if not weight:  # only watched
                continue
            value = rewards[name][i]
            if value is None:
                return None
            weighted.append(weight * value)
        return math.fsum(weighted)

    def _count(self, name: str, values: Sequence[float | None]) -> None:
        failed = [value is None for value in values]
        recent = self._recent[name]
        recent.extend(failed)
        if not any(failed):
            return
        self.failures[name] += sum(failed)
        if (count := sum(recent)) > self.scorers.max_failures:
            raise RuntimeError(
                f"reward {name} has failed on {count} of its last {len(recent)} samples, scorers.max_failures allows "
                f"{self.scorers.max_failures}; the log says how"
            )


def _scorer(name: str, config: ScorersConfig, processes: int) -> Scorer:
    """Imports what a run uses, and no more."""
    if name == "ocr":
        from longrl.rewards.media_ocr import Ocr

        return Ocr(config.ocr.threads, config.frames)
    if name in CLIPS:
        from longrl.rewards.media_clip import load_scorer

        return load_scorer(name, config)
    from longrl.rewards.media_remote import Service, Vlm

    if name == "vlm":
        assert config.vlm is not None
        return Vlm(config.vlm, config.frames, processes)
    return Service(name, config.services[name], config.frames, processes)


def _attempted(make: Callable[[], Any]) -> Any:
    """What is made, or the exception."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - a reward is user code: its failure must not end the run, nor pass for a 0
        return error


def _numbers(made: Any, count: int) -> list[float | None]:
    if isinstance(made, Exception):
        raise made
    values = made.result() if isinstance(made, Future) else made
    if len(values) != count:
        raise ValueError(f"a reward gave {len(values)} values for {count} samples")
    wrong = [value for value in values if value is not None and not math.isfinite(value)]
    if wrong:
        raise ValueError(f"a reward must be finite numbers, got {wrong[0]}")
    return [None if value is None else float(value) for value in values]


def _jpeg_bytes(frame: np.ndarray) -> int:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame).save(out, format="JPEG", quality=95)
    return out.tell()
