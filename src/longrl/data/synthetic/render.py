"""A story as a real file: h264 in mp4, with an AAC tone for each object if asked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from longrl.data.synthetic.paint import Look, look_at, paint_look
from longrl.data.synthetic.world import COLOURS, Story

KEY_FRAME_EVERY_S = 10
X264_OPTIONS = {"preset": "ultrafast", "crf": "20"}
AUDIO_RATE = 8_000
SCALE_HZ = (262, 294, 330, 349, 392, 440, 494, 523)
"""One note of the C major scale for each colour."""
VOLUME = 0.3
FADE_S = 0.02
"""Tones fade in and out, so that they do not click."""


def render(story: Story, path: Path, *, fps: float, width: int, height: int, audio: bool = False) -> None:
    """Write a story as an mp4 file. Equal arguments give equal bytes.

    Frame i is shown at exactly i / fps seconds; the last one starts before story.duration_s. The file appears whole or
    not at all: an error or an interrupt leaves nothing behind.

    Args:
        story: What happens.
        path: Where; an existing file is replaced.
        fps: Frames a second.
        width: Pixels, even.
        height: Pixels, even.
        audio: Add a mono track with a tone while an object is shown, its pitch by colour.

    Raises:
        ValueError: If the size is odd, which h264 in yuv420p cannot hold.
        OSError: If the file cannot be written.
    """
    if width % 2 or height % 2:
        raise ValueError(
            f"{path}: h264 needs an even width and height, got {width} x {height}; use a size divisible by 2"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            _write(container, story, Fraction(fps).limit_denominator(1001), width, height, audio)
        os.replace(partial, path)
    except FFmpegError as error:
        raise OSError(f"{path}: cannot write the video: {error}; check the folder and the space on its disk") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(container: OutputContainer, story: Story, rate: Fraction, width: int, height: int, audio: bool) -> None:
    video = container.add_stream("libx264", rate=rate, options=X264_OPTIONS)
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    video.codec_context.time_base = 1 / rate
    video.codec_context.gop_size = max(1, round(KEY_FRAME_EVERY_S * rate))
    # One thread: the same bytes on every machine, and the caller renders several videos side by side.
    video.codec_context.thread_count = 1
    sound = container.add_stream("aac", rate=AUDIO_RATE, layout="mono", options={"b": "24k"}) if audio else None
    tones = _tones(story) if sound else iter(())
    heard_s = 0
    for index, frame in enumerate(_frames(story, rate, width, height)):
        # The sound runs up to a second ahead of the picture, so that the muxer never has to hold one back for long.
        while sound and index >= heard_s * rate:
            container.mux(sound.encode(next(tones)))
            heard_s += 1
        container.mux(video.encode(frame))
    container.mux(video.encode(None))
    if sound:
        for tone in tones:
            container.mux(sound.encode(tone))
        container.mux(sound.encode(None))


def _frames(story: Story, rate: Fraction, width: int, height: int) -> Iterator[av.VideoFrame]:
    """All frames in order, in yuv420p; each distinct picture is painted and converted once a scene or event."""
    converter = VideoReformatter()
    painted: dict[Look, av.VideoFrame] = {}
    before: Look | None = None
    for index in range(math.ceil(Fraction(story.duration_s) * rate)):
        look = look_at(story, float(index / rate))
        if before is None or look[:2] != before[:2]:
            painted.clear()
        if look not in painted:
            rgb = av.VideoFrame.from_ndarray(paint_look(look, height, width), format="rgb24")
            painted[look] = converter.reformat(rgb, format="yuv420p")
        frame = painted[look]
        frame.pts = index
        before = look
        yield frame


def _tones(story: Story) -> Iterator[av.AudioFrame]:
    """The sound track, a second at a time."""
    num_samples = round(story.duration_s * AUDIO_RATE)
    for start in range(0, num_samples, AUDIO_RATE):
        time_s = np.arange(start, min(start + AUDIO_RATE, num_samples)) / AUDIO_RATE
        wave = np.zeros_like(time_s)
        for event in story.events:
            if event.start_s < time_s[-1] and time_s[0] < event.end_s:
                edge_s = np.minimum(time_s - event.start_s, event.end_s - time_s)
                loudness = VOLUME * np.clip(edge_s / FADE_S, 0, 1)
                wave += loudness * np.sin(2 * np.pi * SCALE_HZ[COLOURS.index(event.colour)] * (time_s - event.start_s))
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, start, Fraction(1, AUDIO_RATE)
        yield frame
