"""Records refuse what is inconsistent when they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from longrl import Audio, Image, Video
from longrl.types import Clip, Message

VIDEO, SOUND = Video("v.mp4", start_s=1.0, end_s=9.0), Audio("v.mp4", start_s=1.0, end_s=9.0, with_video=True)


@pytest.mark.parametrize("name", ["num_frames", "max_pixels"])
@pytest.mark.parametrize("value", [0, -5, 1.5, 8.0, float("nan"), True, "8"])
def test_counts_are_whole_numbers(name, value):
    sampling: dict[str, Any] = {"num_frames": 8} | {name: value}
    with pytest.raises(ValueError, match=rf"^clip v\.mp4: {name} must be a (whole )?number.*, got [^\n]+$"):
        Clip(path="v.mp4", **sampling)


def test_counts_of_numpy():
    clip = Clip(path="v.mp4", num_frames=np.int64(8), max_pixels=np.int32(784))  # pyright: ignore[reportArgumentType]
    assert clip == Clip(path="v.mp4", num_frames=8, max_pixels=784)


def test_no_truth_value_is_a_number():
    with pytest.raises(ValueError, match="fps must be a number, got True"):
        Video("v.mp4", fps=True)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            (VIDEO, Audio("u8.wav", with_video=True), "x"),
            r"sound u8\.wav \(0\.0 to None s\) .* the video v\.mp4 \(1\.0",
        ),
        ((VIDEO, Audio("v.mp4", start_s=2.0, end_s=9.0, with_video=True)), r"v\.mp4 \(2\.0 to 9\.0 s\) .*\(1\.0 to 9"),
        (("hi", SOUND), "what is before it is 'hi', expected the video"),
        ((SOUND,), "what is before it is nothing"),
        ((Audio("v.mp4", start_s=1.0, end_s=9.0), SOUND), r"is the audio v\.mp4"),
        ((Image("v.mp4"), Audio("v.mp4", with_video=True)), r"is the image v\.mp4"),
        ((VIDEO, "and", SOUND), "is 'and'"),
        ((VIDEO, SOUND, SOUND), r"is the audio v\.mp4"),
    ],
)
def test_sound_follows_its_video(content: Any, found):
    with pytest.raises(ValueError, match=found) as caught:
        Message(role="user", content=content)
    assert "\n" not in str(caught.value)


def test_sound_right_behind_its_video():
    Message(role="user", content=("see", VIDEO, SOUND, "why?", Audio("u8.wav")))
