"""What a story looks like: one function of story, time and size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from longrl.data.synthetic.world import Event, Scene, Story

RGB = {
    "red": (226, 24, 28),
    "green": (16, 196, 44),
    "blue": (24, 40, 232),
    "yellow": (248, 232, 24),
    "pink": (248, 48, 212),
    "cyan": (24, 224, 240),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
TONE_RGB = {
    "grey": (122, 122, 124),
    "brown": (124, 98, 78),
    "green": (92, 112, 88),
    "slate": (96, 106, 122),
    "sand": (140, 126, 104),
}
OBJECT_SHARE = 0.42
"""Width of an object as a share of the frame's smaller side."""
DIAL_SHARE = 0.14
DIAL_TICKS = 60
"""The hand ticks once a second and turns once a minute: it moves, and says nothing of the order within an hour."""
FACE_RGB, RIM_RGB, HAND_RGB = (176, 174, 168), (70, 68, 66), (44, 42, 40)

Look = tuple[Scene, Event | None, int]
"""Scene, object or none, tick of the dial: all that a frame shows."""


def look_at(story: Story, time_s: float) -> Look:
    """What a frame at a time shows; frames with equal looks are identical."""
    return story.scene_at(time_s), story.event_at(time_s), int(time_s) % DIAL_TICKS


def paint(story: Story, time_s: float, height: int, width: int) -> np.ndarray:
    """Paint the frame of a story at a time.

    Args:
        story: What happens.
        time_s: When, in seconds from the start.
        height: Pixels.
        width: Pixels.

    Returns:
        uint8 [height, width, 3], RGB; the caller's own copy.
    """
    return paint_look(look_at(story, time_s), height, width)


def paint_look(look: Look, height: int, width: int) -> np.ndarray:
    """Paint a look: uint8 [height, width, 3], RGB; the caller's own copy."""
    scene, event, tick = look
    frame = _layer(scene, event, height, width).copy()
    top, left, hand = _hand(tick, height, width)
    patch = frame[top : top + hand.shape[0], left : left + hand.shape[1]]
    patch[:] = np.rint(patch + (np.asarray(HAND_RGB, np.float32) - patch) * hand[..., None])
    return frame


@lru_cache(maxsize=128)
def _layer(scene: Scene, event: Event | None, height: int, width: int) -> np.ndarray:
    """Everything but the dial's hand: uint8 [height, width, 3]."""
    frame = _background(scene, height, width)
    rows, cols = _offsets(height, width, height / 2, width / 2)
    radius = DIAL_SHARE * min(height, width) / 2
    distance = np.hypot(rows, cols)
    frame = _blend(frame, RIM_RGB, distance - radius - 1)
    frame = _blend(frame, FACE_RGB, distance - radius)
    if event is not None:
        vertical, horizontal = event.place.split()
        rows, cols = _offsets(
            height,
            width,
            height * (0.25 if vertical == "top" else 0.75),
            width * (0.25 if horizontal == "left" else 0.75),
        )
        frame = _blend(
            frame, RGB[event.colour], _distance(event.shape, rows, cols, OBJECT_SHARE * min(height, width) / 2)
        )
    return np.rint(frame).astype(np.uint8)


def _background(scene: Scene, height: int, width: int) -> np.ndarray:
    """A muted colour with a slow gradient and soft blotches: float32 [height, width, 3]."""
    rng = np.random.default_rng(scene.texture)
    down, across = rng.uniform(-14, 14, size=2)
    blotches = rng.normal(0, 7, size=(7, 9)).astype(np.float32)
    rows, cols = np.linspace(0, 6, height), np.linspace(0, 8, width)
    soft = _interpolate(_interpolate(blotches, rows).T, cols).T
    light = soft + down * np.linspace(-1, 1, height)[:, None] + across * np.linspace(-1, 1, width)
    return (np.asarray(TONE_RGB[scene.tone], np.float32) + light[..., None]).astype(np.float32)


def _interpolate(grid: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of a grid [N, M] at fractional places [K], eased so that no edges show: [K, M]."""
    low = np.minimum(at.astype(int), len(grid) - 2)
    share = (at - low)[:, None]
    share = share * share * (3 - 2 * share)
    return grid[low] * (1 - share) + grid[low + 1] * share


def _offsets(height: int, width: int, row: float, col: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of all pixel centres from a point: [height, 1] and [1, width]."""
    return (
        (np.arange(height, dtype=np.float32) + 0.5 - row)[:, None],
        (np.arange(width, dtype=np.float32) + 0.5 - col)[None],
    )


def _blend(frame: np.ndarray, colour: tuple[int, int, int], distance: np.ndarray) -> np.ndarray:
    """Lay a colour over a frame wherever the distance to a shape [H, W] is negative, its edge one pixel soft."""
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    return frame + (np.asarray(colour, np.float32) - frame) * cover


def _distance(shape: str, rows: np.ndarray, cols: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to a shape's edge, negative inside; all shapes fit a square of side 2 x radius."""
    down, aside = np.abs(rows), np.abs(cols)
    if shape == "circle":
        return np.hypot(rows, cols) - radius
    if shape == "square":
        return np.maximum(down, aside) - radius
    if shape == "cross":
        arm = 0.3 * radius
        return np.minimum(np.maximum(down - radius, aside - arm), np.maximum(down - arm, aside - radius))
    # A triangle on its base: two slopes from the apex, which fall 2 for every 1 aside, and the base line.
    return np.maximum((2 * aside - (rows + radius)) / np.sqrt(5), rows - radius)


@lru_cache(maxsize=256)
def _hand(tick: int, height: int, width: int) -> tuple[int, int, np.ndarray]:
    """Top row, left column and cover [h, w] of the dial's hand."""
    radius = DIAL_SHARE * min(height, width) / 2
    top, left = int(height / 2 - radius), int(width / 2 - radius)
    side = int(2 * radius) + 2
    rows, cols = _offsets(side, side, height / 2 - top, width / 2 - left)
    angle = 2 * np.pi * tick / DIAL_TICKS
    along = np.clip(cols * np.sin(angle) - rows * np.cos(angle), 0, 0.85 * radius)
    distance = np.hypot(cols - along * np.sin(angle), rows + along * np.cos(angle))
    return top, left, np.clip(0.5 - (distance - 0.12 * radius), 0, 1).astype(np.float32)
