"""Which moments are asked for, checked against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from media import slow_nearest

from longrl.video.sample import MAX_FRAMES, nearest, sample_times


@pytest.mark.parametrize(
    ("start", "end", "fps", "expected"),
    [
        (0, 3, 1, [0, 1, 2]),
        (0, 3.2, 1, [0, 1, 2, 3]),
        (0.5, 2, 2, [0.5, 1, 1.5]),
        (10, 10.4, 1, [10]),
        (0, 0.3, 10, [0, 0.1, 0.2]),  # 0.3 * 10 is 3.0000000000000004 in floats elsewhere: still three
        (1, 1.7, 10, [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]),
    ],
)
def test_by_fps(start: float, end: float, fps: float, expected: list[float]) -> None:
    np.testing.assert_allclose(sample_times(start, end, fps=fps), expected, atol=1e-12)


def test_by_fps_counts_like_exact_fractions() -> None:
    """Spans whose length is a whole number of samples are where float error would add or lose one."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        fps = Fraction(int(rng.integers(1, 60)), int(rng.integers(1, 8)))
        start, num = Fraction(int(rng.integers(0, 10**6)), 997), int(rng.integers(1, 3000))
        times = sample_times(float(start), float(start + num / fps), fps=float(fps))
        assert len(times) == num
        assert times[-1] == pytest.approx(float(start + (num - 1) / fps), abs=1e-9)


@pytest.mark.parametrize(("num", "expected"), [(1, [4]), (2, [2, 6]), (5, [2, 3, 4, 5, 6])])
def test_by_number(num: int, expected: list[float]) -> None:
    np.testing.assert_allclose(sample_times(2, 6, num_frames=num), expected)


def test_limits() -> None:
    assert len(sample_times(0, MAX_FRAMES, fps=1)) == MAX_FRAMES
    assert len(sample_times(0, 1, num_frames=MAX_FRAMES)) == MAX_FRAMES
    with pytest.raises(ValueError, match=str(MAX_FRAMES)):
        sample_times(0, MAX_FRAMES + 1, fps=1)
    with pytest.raises(ValueError, match=str(MAX_FRAMES)):
        sample_times(0, 1, num_frames=MAX_FRAMES + 1)
    with pytest.raises(ValueError, match=str(MAX_FRAMES)):
        sample_times(0, 1e9, fps=1e9)  # refused before anything of that size is allocated
    with pytest.raises(ValueError, match="exactly one"):
        sample_times(0, 1)


def test_nearest_prefers_the_earlier_of_two() -> None:
    times = np.array([0.0, 0.1, 0.3])
    assert nearest(times, np.array([0.05, 0.0500011, 0.2, 0.21, 7, -1])).tolist() == [0, 1, 1, 2, 2, 0]
    assert nearest(np.array([5.0]), np.array([0.0, 9.0])).tolist() == [0, 0]


def test_nearest_equals_trying_all() -> None:
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(1, 50, 200)) / 600
    asked = rng.uniform(-0.1, times[-1] + 0.1, 300)
    assert nearest(times, asked).tolist() == [slow_nearest(times, time_s) for time_s in asked]
