"""M-RoPE positions: written out by hand, and against transformers' own, which is wrong after a long video."""

from __future__ import annotations

import pytest
import torch
import transformers

from longrl.models.qwen_vl import Qwen25VL
from longrl.types import MediaEmbeds


@pytest.fixture(scope="module")
def family() -> Qwen25VL:
    return Qwen25VL.tiny(0, torch.float32)


def video(t: int, rows: int, columns: int, seconds_per_grid: float) -> MediaEmbeds:
    """A video of t temporal patches of rows x columns tokens."""
    return MediaEmbeds(
        embeds=torch.zeros(t * rows * columns, 128),
        grid_thw=(t, 2 * rows, 2 * columns),
        seconds_per_grid=seconds_per_grid,
        timestamps_s=torch.zeros(2 * t, dtype=torch.float64),
        key="",
    )


def positions(family: Qwen25VL, *parts: int | MediaEmbeds) -> list[list[int]]:
    """Of so many text tokens, or a video, one after the other; one row an axis."""
    slots, length = [], 0
    for part in parts:
        size = part if isinstance(part, int) else len(part.embeds)
        if not isinstance(part, int):
            slots.append(((length, length + size),))
        length += size
    media = tuple(part for part in parts if not isinstance(part, int))
    return family.positions(length, media, slots).tolist()


def table(*axes: str) -> list[list[int]]:
    """Numbers written with bars where text and videos meet."""
    return [[int(word) for word in axis.replace("|", "").split()] for axis in axes]


def test_text_alone(family):
    assert positions(family, 4) == [[0, 1, 2, 3]] * 3


def test_text_video_text(family):
    """Three pictures of 2 x 2 tokens, two seconds apart; text goes on after the last second."""
    assert positions(family, 3, video(3, 2, 2, 2.0), 3) == table(
        "0 1 2 | 3 3 3 3 5 5 5 5 7 7 7 7 | 8 9 10",
        "0 1 2 | 3 3 4 4 3 3 4 4 3 3 4 4 | 8 9 10",
        "0 1 2 | 3 4 3 4 3 4 3 4 3 4 3 4 | 8 9 10",
    )


def test_video_first_and_wide(family):
    """The columns reach further than the seconds: text goes on after them."""
    assert positions(family, video(2, 1, 4, 1.0), 2) == table(
        "0 0 0 0 1 1 1 1 | 4 5",
        "0 0 0 0 0 0 0 0 | 4 5",
        "0 1 2 3 0 1 2 3 | 4 5",
    )


def test_two_videos(family):
    """With text in between, and side by side."""
    first, second = video(2, 1, 1, 4.0), video(1, 2, 2, 2.0)
    assert positions(family, 1, first, 2, second, 1) == table(
        "0 | 1 5 | 6 7 | 8 8 8 8 | 10",
        "0 | 1 1 | 6 7 | 8 8 9 9 | 10",
        "0 | 1 1 | 6 7 | 8 9 8 9 | 10",
    )
    assert positions(family, first, second, 1) == table(
        "0 4 | 5 5 5 5 | 7",
        "0 0 | 5 5 6 6 | 7",
        "0 0 | 5 6 5 6 | 7",
    )


def test_fractional_seconds(family):
    """Each time is rounded down by itself, so that the clock does not drift: 0, 1.5, 3, 4.5 s and 0, 0.4, .. 1.2 s."""
    assert positions(family, 1, video(4, 1, 1, 1.5), 1)[0] == [0, 1, 2, 4, 5, 6]
    assert positions(family, 1, video(4, 1, 1, 0.4), 1)[0] == [0, 1, 1, 1, 2, 3]


def test_ticks_per_second(family):
    """Of the real checkpoints' vision config: two positions a second."""
    vision = family.model.config.vision_config
    vision.tokens_per_second = 2
    try:
        assert positions(family, 1, video(3, 1, 1, 1.25), 1)[0] == [0, 1, 3, 6, 7]
    finally:
        vision.tokens_per_second = 1


def theirs(family: Qwen25VL, before: int, item: MediaEmbeds, after: int) -> list[list[int]]:
    length = before + len(item.embeds) + after
    kinds = torch.zeros(1, length, dtype=torch.int64)
    kinds[:, before : length - after] = 2  # video
    found, _ = family.model.model.get_rope_index(
        input_ids=torch.zeros(1, length, dtype=torch.int64),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([item.grid_thw]),
        second_per_grid_ts=torch.tensor([item.seconds_per_grid]),
    )
    return found[:, 0].tolist()


@pytest.mark.parametrize(
    "item", [video(2, 2, 3, 1.0), video(3, 3, 1, 1.0), video(5, 4, 4, 0.75)], ids="{0.grid_thw}".format
)
def test_transformers_agrees_on_a_short_video(family, item):
    """Shorter, in positions, than it is wide or high."""
    if transformers.__version__.startswith("5.17.") and item.seconds_per_grid % 1:
        pytest.skip("transformers 5.17 cuts the seconds of a temporal patch down to whole ones")
    assert positions(family, 4, item, 5) == theirs(family, 4, item, 5)


@pytest.mark.parametrize("item", [video(1800, 1, 1, 2.0), video(30, 2, 3, 2.0)], ids="{0.grid_thw}".format)
def test_transformers_collides_after_a_long_video(family, item):
    """Up to the end of the video all is equal; then it gives text the positions of the video's first seconds. When this
    fails, transformers has been mended (seen in 5.17 to 5.24) and `positions` can say so."""
    before, after, tokens = 4, 5, len(item.embeds)
    ours, other = positions(family, before, item, after), theirs(family, before, item, after)
    assert [axis[:-after] for axis in ours] == [axis[:-after] for axis in other]
    seconds, text = set(ours[0][before : before + tokens]), [axis[-after:] for axis in other]
    assert text == [list(range(before + item.grid_thw[2] // 2, before + item.grid_thw[2] // 2 + after))] * 3
    assert seconds & set(text[0])
    assert not seconds & set(ours[0][-after:])
