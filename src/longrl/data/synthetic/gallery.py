"""A picture of several videos: a strip of frames each, with their times."""

from __future__ import annotations

from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

NUM_FRAMES = 8
FRAME_WIDTH = 168
MARGIN, GUTTER, ROW_GAP = 28, 8, 22
TITLE_HEIGHT, TIME_HEIGHT = 28, 22
PAGE, INK, QUIET = (250, 249, 246), (38, 38, 40), (124, 122, 118)


def gallery(videos: list[Path], out: Path) -> None:
    """Write a PNG with a row for each video: its name, its length and frames spread evenly over it.

    Args:
        videos: Files to show, at least one.
        out: The PNG to write.
    """
    if not videos:
        raise ValueError(f"{out}: a gallery needs at least one video, got none")
    rows = [(path, *_strip(path)) for path in videos]
    frame_height = max(frame.height for _, _, frames in rows for _, frame in frames)
    row_height = TITLE_HEIGHT + frame_height + TIME_HEIGHT
    width = 2 * MARGIN + NUM_FRAMES * FRAME_WIDTH + (NUM_FRAMES - 1) * GUTTER
    height = 2 * MARGIN + len(rows) * row_height + (len(rows) - 1) * ROW_GAP
    page = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(page)
    title_font, time_font = ImageFont.load_default(17), ImageFont.load_default(13)
    for index, (path, duration_s, frames) in enumerate(rows):
        top = MARGIN + index * (row_height + ROW_GAP)
        draw.text((MARGIN, top), path.stem, INK, title_font)
        draw.text((width - MARGIN, top + 3), _clock(duration_s), QUIET, time_font, anchor="ra")
        for column, (time_s, frame) in enumerate(frames):
            left = MARGIN + column * (FRAME_WIDTH + GUTTER)
            page.paste(frame, (left, top + TITLE_HEIGHT))
            below = top + TITLE_HEIGHT + frame_height + 5
            draw.text((left + FRAME_WIDTH / 2, below), _clock(time_s), QUIET, time_font, anchor="ma")
    page.save(out, format="PNG")


def _strip(path: Path) -> tuple[float, list[tuple[float, Image.Image]]]:
    """Length in seconds, and NUM_FRAMES frames with their true times."""
    with av.open(str(path)) as container:
        duration_s = float(container.duration or 0) / av.time_base
        frames = []
        for index in range(NUM_FRAMES):
            wanted_s = (index + 0.5) / NUM_FRAMES * duration_s
            container.seek(int(wanted_s * av.time_base))
            frame = next(f for f in container.decode(video=0) if f.time is not None and f.time + 1 > wanted_s)
            size = (FRAME_WIDTH, round(FRAME_WIDTH * frame.height / frame.width))
            frames.append((frame.time, frame.to_image().resize(size, Image.Resampling.LANCZOS)))
    return duration_s, frames


def _clock(time_s: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(time_s), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
