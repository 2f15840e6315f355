"""Which moments of a clip are asked for, and which real frames are nearest to them. Arithmetic only."""

from __future__ import annotations

import math

import numpy as np

MAX_FRAMES = 8192
"""Most frames that one clip may be sampled at."""

_EPSILON = 1e-6
"""Float noise: a sample this close to the end is at the end; distances (in seconds) this close are equal."""


def sample_times(
    start_s: float, end_s: float, *, fps: float | None = None, num_frames: int | None = None
) -> np.ndarray:
    """Lists the times to sample in a span.

    By `fps`: start_s + i / fps, as long as that is before end_s. By `num_frames`: evenly from start_s to end_s, both
    included; a single frame comes from the middle.

    Args:
        start_s: Start of the span, in seconds.
        end_s: End of the span, in seconds, not before start_s.
        fps: Samples a second. Exactly one of fps and num_frames is given.
        num_frames: Number of samples.

    Returns:
        float64 [F], ascending, at least one.

    Raises:
        ValueError: More than MAX_FRAMES samples are asked for.
    """
    if (fps is None) == (num_frames is None):
        raise ValueError(f"set exactly one of fps (got {fps}) and num_frames (got {num_frames})")
    if num_frames is not None:
        if not 1 <= num_frames <= MAX_FRAMES:
            raise ValueError(f"num_frames must be 1 to {MAX_FRAMES}, got {num_frames}")
        return np.linspace(start_s, end_s, num_frames) if num_frames > 1 else np.array([(start_s + end_s) / 2])
    assert fps is not None
    wanted = (end_s - start_s) * fps
    if wanted > MAX_FRAMES + _EPSILON:
        raise ValueError(
            f"fps {fps:g} over {end_s - start_s:.3f} s asks for {wanted:.0f} frames, the limit is {MAX_FRAMES}; "
            f"use a lower fps, a shorter span, or num_frames"
        )
    return start_s + np.arange(max(1, math.ceil(wanted - _EPSILON))) / fps


def nearest(times_s: np.ndarray, asked_s: np.ndarray) -> np.ndarray:
    """Finds the nearest time to each asked one; of two equally near, the earlier.

    Args:
        times_s: float64 [N], ascending, at least one.
        asked_s: float64 [F].

    Returns:
        int64 [F], indices into times_s.
    """
    right = np.searchsorted(times_s, asked_s).clip(1, max(1, len(times_s) - 1))
    left = right - 1
    right = np.minimum(right, len(times_s) - 1)
    return np.where(asked_s - times_s[left] <= times_s[right] - asked_s + _EPSILON, left, right)
