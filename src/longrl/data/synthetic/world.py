"""What happens in a synthetic video: objects that appear one after another, over scenes that change by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan", "white", "black")
"""The corners of the RGB cube: no eight colours are further apart."""
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
TONES = ("grey", "brown", "green", "slate", "sand")
"""Muted backgrounds; two scenes in a row differ."""
NUM_EVENTS = (4, 5, 6, 7)

MIN_EVENT_SHARE = 0.04
GAP_SHARES = (0.01, 0.03)
LONGEST_TO_SHORTEST = 4.0
"""About how much longer the longest event is than the shortest."""
WHOLE_SECONDS_FROM_S = 60.0
"""Videos at least this long change on whole seconds, so that one frame a second sees every change exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An object is shown, at one place, during [start_s, end_s)."""

    colour: str
    shape: str
    place: str
    start_s: float
    end_s: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A background, from start_s to the next scene."""

    tone: str
    texture: int
    """Seed of the background's texture."""
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that happens in one video. Events are in order and never overlap; a colour appears at most once."""

    seed: int
    duration_s: float
    events: tuple[Event, ...]
    scenes: tuple[Scene, ...]

    def event_at(self, time_s: float) -> Event | None:
        """The object shown at a time, if any."""
        for event in self.events:
            if event.start_s <= time_s < event.end_s:
                return event
        return None

    def scene_at(self, time_s: float) -> Scene:
        """The scene at a time."""
        for scene in reversed(self.scenes):
            if scene.start_s <= time_s:
                return scene
        return self.scenes[0]


def make_story(seed: int, duration_s: float, num_events: int | None = None) -> Story:
    """Draw a story: a pure function of its arguments.

    Args:
        seed: Seed of everything that is random.
        duration_s: Length of the video in seconds, at least 10.
        num_events: Objects that appear, 4 to 7; None draws the number uniformly.

    Raises:
        ValueError: If the duration or the number of events is out of range.
    """
    if not 10 <= duration_s < float("inf"):
        raise ValueError(f"story {seed}: duration_s must be at least 10 seconds and finite, got {duration_s}")
    if num_events is not None and num_events not in NUM_EVENTS:
        raise ValueError(f"story {seed}: num_events must be {NUM_EVENTS[0]} to {NUM_EVENTS[-1]}, got {num_events}")
    rng = np.random.default_rng(seed)
    # Times are counted in ticks, so that neighbours meet exactly and no float error opens or closes a gap.
    ticks_per_s = 1 if duration_s >= WHOLE_SECONDS_FROM_S else 10
    num_ticks = int(duration_s * ticks_per_s)
    drawn = int(rng.choice(NUM_EVENTS))
    spans = _draw_spans(rng, num_ticks, drawn if num_events is None else num_events)
    colours = rng.permutation(COLOURS)
    events = tuple(
        Event(
            colour=str(colours[index]),
            shape=str(rng.choice(SHAPES)),
            place=str(rng.choice(PLACES)),
            start_s=start / ticks_per_s,
            end_s=end / ticks_per_s,
        )
        for index, (start, end) in enumerate(spans)
    )
    scenes = _draw_scenes(rng, num_ticks, ticks_per_s)
    return Story(seed=seed, duration_s=float(duration_s), events=events, scenes=scenes)


def _draw_spans(rng: np.random.Generator, num_ticks: int, num_events: int) -> list[tuple[int, int]]:
    """Half-open tick spans of the events: a gap before, between and after them."""
    shortest = int(np.ceil(MIN_EVENT_SHARE * num_ticks))
    while True:
        gaps = np.maximum(1, np.rint(rng.uniform(*GAP_SHARES, size=num_events + 1) * num_ticks)).astype(int)
        weights = LONGEST_TO_SHORTEST ** rng.uniform(size=num_events)
        shown = num_ticks - int(gaps.sum())
        lengths = np.diff(np.rint(np.concatenate(([0.0], np.cumsum(weights / weights.sum()))) * shown)).astype(int)
        if lengths.min() >= shortest:
            break
    ends = np.cumsum(gaps[:-1] + lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


def _draw_scenes(rng: np.random.Generator, num_ticks: int, ticks_per_s: int) -> tuple[Scene, ...]:
    """Three to five scenes whose changes know nothing of the events."""
    weights = rng.uniform(1.0, 2.5, size=rng.integers(3, 6))
    starts = np.rint(np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum() * num_ticks).astype(int)
    scenes: list[Scene] = []
    for start in starts:
        tones = [tone for tone in TONES if not scenes or tone != scenes[-1].tone]
        texture = int(rng.integers(2**31))
        scenes.append(Scene(tone=str(rng.choice(tones)), texture=texture, start_s=int(start) / ticks_per_s))
    return tuple(scenes)
