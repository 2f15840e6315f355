"""Renders small media files whose frames carry their own number, and reads them back the slow way."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, BLOCK = 64, 96, 16
"""A frame is 4 x 6 blocks; each block, dark or bright, is one bit of the frame's number."""

ROWS, COLUMNS = HEIGHT // BLOCK, WIDTH // BLOCK

# An odd factor spreads consecutive numbers over all bits, so that neighbouring frames differ in many blocks.
_FACTOR, _RANGE = 7919, 2 ** (ROWS * COLUMNS)

CONSTANT = [i / 25 for i in range(200)]
VARIABLE = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 200)).round(3).tolist()


def picture(number: int) -> np.ndarray:
    """The frame with this number: uint8 [HEIGHT, WIDTH, 3]."""
    bits = (number * _FACTOR % _RANGE >> np.arange(ROWS * COLUMNS)) & 1
    blocks = bits.reshape(ROWS, COLUMNS).repeat(BLOCK, 0).repeat(BLOCK, 1)
    return np.repeat((40 + 175 * blocks)[..., None], 3, -1).astype(np.uint8)


def numbers(pixels: np.ndarray) -> list[int]:
    """Reads the numbers of upright frames of any size, [F, H, W, 3], in the middle of each block."""
    rows = ((np.arange(ROWS) + 0.5) * pixels.shape[1] / ROWS).astype(int)
    columns = ((np.arange(COLUMNS) + 0.5) * pixels.shape[2] / COLUMNS).astype(int)
    bits = pixels[:, rows][:, :, columns, 0].reshape(len(pixels), -1) > 127
    codes = (bits.astype(np.int64) << np.arange(ROWS * COLUMNS)).sum(1)
    return [int(code) * pow(_FACTOR, -1, _RANGE) % _RANGE for code in codes]


def render(
    path: Path,
    times_s: Sequence[float] = CONSTANT,
    *,
    codec: str = "libx264",
    ticks: Fraction = Fraction(1, 16000),
    gop: int = 12,
    bframes: int = 0,
    options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    sound: np.ndarray | None = None,
    sound_start_s: float = 0.0,
    sound_codec: str = "aac",
) -> Path:
    """Writes frame i at times_s[i]; sound is mono float32 at 16 kHz."""
    with av.open(str(path), "w", options=muxer_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"g": str(gop), "bf": str(bframes)} | (options or {}))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = ticks
        stream.set_display_rotation(rotation, hflip=hflip)
        track = None if sound is None else container.add_stream(sound_codec, rate=16000, layout="mono")
        for i, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(Fraction(time_s) / ticks), ticks
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            write_sound(container, track, sound, sound_start_s)
    return path


def write_sound(
    container: av.container.OutputContainer, track: av.AudioStream, sound: np.ndarray, start_s: float
) -> None:
    """Encodes mono float32 samples at 16 kHz."""
    for first in range(0, len(sound), 1024):
        frame = av.AudioFrame.from_ndarray(sound[None, first : first + 1024], "flt", "mono")
        frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
        frame.pts = round(start_s * 16000) + first
        container.mux(track.encode(frame))
    container.mux(track.encode())


def decode_all(path: Path) -> tuple[np.ndarray, list[int]]:
    """Every frame that a file shows, one after the other with plain PyAV: seconds after the first, and numbers."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        frames = [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    return np.array([float(time - frames[0][0]) for time, _ in frames]), numbers(np.stack([rgb for _, rgb in frames]))


def slow_nearest(times_s: np.ndarray, asked_s: float) -> int:
    """The frame nearest to a time; of two equally near (to a microsecond) the earlier."""
    return int(np.abs(times_s - asked_s).round(6).argmin())


def render_growing(path: Path) -> Path:
    """A broadcast of 100 frames of the usual size and 100 larger ones, at 25 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        larger = av.CodecContext.create("libx264", "w")
        larger.width, larger.height, larger.pix_fmt = 2 * WIDTH, 2 * HEIGHT, "yuv420p"
        larger.time_base, larger.framerate, larger.options = Fraction(1, 25), Fraction(25), {"bf": "0"}
        for first, encoder in ((0, stream.codec_context), (100, larger)):
            pictures = [picture(first + i) for i in range(100)]
            for i, pixels in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame = frame.reformat(encoder.width, encoder.height, "yuv420p")
                frame.pts, frame.time_base = first + i, Fraction(1, 25)
                _mux(container, stream, encoder.encode(frame))
            _mux(container, stream, encoder.encode(None))
    return path


def _mux(container: av.container.OutputContainer, stream: av.VideoStream, packets: Sequence[av.Packet]) -> None:
    for packet in packets:
        packet.stream = stream
        container.mux(packet)
