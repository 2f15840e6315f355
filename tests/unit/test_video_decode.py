"""The frames that are read are the ones nearest in presentation time, in real files of many kinds."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media import CONSTANT, HEIGHT, VARIABLE, WIDTH, decode_all, numbers, picture, render, slow_nearest

from longrl.types import Clip, Frames, MediaError
from longrl.video import decode
from longrl.video.decode import count_frames, nearest_times, read_frames
from longrl.video.probe import index_video
from longrl.video.sample import sample_times

LATER = [time_s + 5 for time_s in CONSTANT]
REALTIME = {"deadline": "realtime", "cpu-used": "8"}
TWENTY_FIFTHS = Fraction(1, 25)

FILES = {
    "constant.mp4": {},
    "bframes.mp4": {"bframes": 3},
    "variable.mp4": {"times_s": VARIABLE, "bframes": 3},
    "long_gop.mp4": {"times_s": VARIABLE, "bframes": 3, "gop": 1000, "options": {"sc_threshold": "0"}},
    "open_gop.mp4": {"bframes": 3, "gop": 25, "options": {"x264-params": "open-gop=1"}},
    "intra_refresh.mp4": {"gop": 25, "options": {"x264-params": "intra-refresh=1"}},
    "offset.mp4": {"times_s": LATER, "bframes": 2},
    "fragmented.mp4": {"bframes": 2, "muxer_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "bframes": 3, "options": {"x265-params": "log-level=none"}},
    "mpeg4.mp4": {"codec": "mpeg4", "bframes": 2, "ticks": TWENTY_FIFTHS},
    "quicktime.mov": {"times_s": VARIABLE, "bframes": 2},
    "variable.mkv": {"times_s": VARIABLE, "bframes": 2},
    "offset.mkv": {"times_s": LATER},
    "vp9.webm": {"times_s": VARIABLE, "codec": "libvpx-vp9", "ticks": Fraction(1, 1000), "options": REALTIME},
    "vp8.webm": {"codec": "libvpx", "ticks": Fraction(1, 1000), "options": REALTIME},
    "broadcast.ts": {"bframes": 2, "ticks": TWENTY_FIFTHS},
    "old.avi": {"codec": "mpeg4", "bframes": 2, "ticks": TWENTY_FIFTHS},
    "flash.flv": {"bframes": 2, "ticks": TWENTY_FIFTHS},
}


def read(clip: Clip, **options) -> Frames:
    """All chunks as one."""
    chunks = list(read_frames(clip, **options))
    return Frames(
        pixels=np.concatenate([chunk.pixels for chunk in chunks]),
        timestamps_s=np.concatenate([chunk.timestamps_s for chunk in chunks]),
    )


def assert_nearest(path: Path, clip: Clip, asked_s: np.ndarray, truth: tuple[np.ndarray, list[int]]) -> None:
    times, shown = truth
    chosen = [slow_nearest(times, time_s) for time_s in asked_s]
    frames = read(clip)
    assert numbers(frames.pixels) == [shown[i] for i in chosen]
    # Both are differences of the same ticks; only float rounding stands between them.
    np.testing.assert_allclose(frames.timestamps_s, times[chosen], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(nearest_times(clip), frames.timestamps_s)
    assert count_frames(clip) == len(chosen)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if (codec := FILES[name].get("codec", "libx264")) not in av.codecs_available:
        pytest.skip(f"this build of ffmpeg has no {codec}")
    path = render(tmp_path / name, **FILES[name])
    caplog.set_level(logging.DEBUG, "longrl")
    truth = times, shown = decode_all(path)
    assert shown == list(range(200)), "the file itself must be what the test takes it for"
    duration_s = index_video(str(path)).duration_s
    assert times[-1] < duration_s < times[-1] + 0.21
    for fps in (0.4, 3, 12, 60):
        clip = Clip(path=str(path), fps=fps)
        assert_nearest(path, clip, sample_times(0, duration_s, fps=fps), truth)
    for num in (1, 2, 7, 200):
        clip = Clip(path=str(path), num_frames=num)
        assert_nearest(path, clip, sample_times(0, times[-1], num_frames=num), truth)
    # Only where pictures are refreshed bit by bit do key frames promise more than they keep.
    assert ("key frames cannot be relied on" in caplog.text) == (name == "intra_refresh.mp4")


@pytest.mark.skipif("libvpx" not in av.codecs_available, reason="this build of ffmpeg has no libvpx")
def test_hidden_pictures_are_not_counted(tmp_path: Path) -> None:
    """VP8 may send pictures that are only referred to; here some shown ones are turned into such."""
    path = render(tmp_path / "a.webm", codec="libvpx", ticks=Fraction(1, 1000), options=REALTIME)
    with av.open(str(path)) as container:
        sent = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data, hidden = path.read_bytes(), [3, 40, 41, 100, 199]
    for i in hidden:
        assert data.count(sent[i]) == 1
        data = data.replace(sent[i], bytes([sent[i][0] & ~0x10]) + sent[i][1:])
    path.write_bytes(data)
    truth = times, shown = decode_all(path)
    assert shown == [i for i in range(200) if i not in hidden]
    assert_nearest(path, Clip(path=str(path), num_frames=300), sample_times(0, times[-1], num_frames=300), truth)


def test_random_spans_of_a_variable_rate(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", VARIABLE, bframes=3, gop=20)
    truth = times, _ = decode_all(path)
    duration_s, rng = index_video(str(path)).duration_s, np.random.default_rng(3)
    for _ in range(60):
        start_s, end_s = np.sort(rng.uniform(0, duration_s, 2)).tolist()
        if rng.random() < 0.5:
            fps = float(rng.uniform(0.2, 40))
            clip = Clip(path=str(path), start_s=start_s, end_s=end_s, fps=fps)
            asked = sample_times(start_s, end_s, fps=fps)
        else:
            num = int(rng.integers(1, 50))
            clip = Clip(path=str(path), start_s=start_s, end_s=end_s, num_frames=num)
            last = max([start_s, *times[times < end_s]])
            asked = sample_times(start_s, last, num_frames=num)
        assert_nearest(path, clip, asked, truth)


def test_groups_of_pictures_without_wanted_frames_are_passed_over(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", gop=25, bframes=2, options={"sc_threshold": "0"})
    index, frames = index_video(str(path)), np.array([0, 30, 130, 131, 199])
    needed = decode._needed(index, index.order[frames])
    # From each key frame (0, 25, 125, 175) to the wanted frames, in decoding order: two more or fewer at each end.
    assert needed.sum() == pytest.approx(1 + 6 + 7 + 25, abs=8)
    assert numbers(read(Clip(path=str(path), fps=0.3)).pixels) == [0, 83, 167]


def test_repeats_frames_when_more_are_asked_for_than_there_are(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT[:4])
    frames = read(Clip(path=str(path), fps=75))
    assert numbers(frames.pixels) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert frames.timestamps_s.tolist() == pytest.approx([0, 0, *[0.04] * 3, *[0.08] * 3, *[0.12] * 4])


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_and_mirroring_are_applied(rotation: int, hflip: bool, tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT[:5], rotation=rotation, hflip=hflip)
    pixels = read(Clip(path=str(path), fps=25)).pixels
    expected = np.rot90(np.stack([picture(i) for i in range(5)]), rotation // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if hflip else expected
    assert pixels.shape == expected.shape
    # Blocks are 40 or 215; lossy coding stays well within half of the distance.
    assert np.abs(pixels.astype(int) - expected).mean() < 8


def test_size_is_asked_upright_and_applied(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT[:50], rotation=90)
    asked = []

    def half(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return height // 2, width // 2

    pixels = read(Clip(path=str(path), fps=5), size=half).pixels
    assert asked == [(WIDTH, HEIGHT)]
    assert pixels.shape == (10, WIDTH // 2, HEIGHT // 2, 3)
    assert numbers(np.rot90(pixels, -1, axes=(1, 2))) == list(range(0, 50, 5))


def test_chunks_hold_at_most_what_they_may(tmp_path: Path) -> None:
    path, frame_bytes = render(tmp_path / "a.mp4", CONSTANT[:50]), HEIGHT * WIDTH * 3
    clip = Clip(path=str(path), fps=25)
    chunks = list(read_frames(clip, chunk_bytes=frame_bytes * 20 + 5))
    assert [len(chunk.pixels) for chunk in chunks] == [20, 20, 10]
    assert [number for chunk in chunks for number in numbers(chunk.pixels)] == list(range(50))
    assert [len(chunk.pixels) for chunk in read_frames(clip, chunk_bytes=1)] == [1] * 50


def test_the_same_pixels_whatever_else_is_read(tmp_path: Path) -> None:
    """A frame decoded on its own equals the one decoded among all others, bit for bit."""
    path = render(tmp_path / "a.mp4", CONSTANT, bframes=3, gop=50)
    everything = read(Clip(path=str(path), fps=25))
    for start_s in (0.0, 1.24, 3.96, 7.0):
        alone = read(Clip(path=str(path), start_s=start_s, fps=25, end_s=start_s + 0.04))
        np.testing.assert_array_equal(alone.pixels, everything.pixels[[round(start_s * 25)]])


def test_large_pictures_are_threaded_and_equal(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 10 * WIDTH, 10 * HEIGHT, "yuv420p"
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(picture(i).repeat(10, 0).repeat(10, 1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert stream.width * stream.height > decode._THREADED_PIXELS
    assert numbers(read(Clip(path=str(path), fps=5)).pixels) == list(range(0, 60, 5))
    assert numbers(read(Clip(path=str(path), fps=1, start_s=0.4)).pixels) == [10, 35]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Twenty minutes need at most 24 MiB more than one minute: the index (17 bytes a frame) and noise."""
    program = """
import resource, sys
from longrl.types import Clip
from longrl.video.decode import read_frames
frames = sum(len(chunk.pixels) for chunk in read_frames(Clip(path=sys.argv[1], fps=2), chunk_bytes=2**20))
print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for minutes in (1, 20):
        path = tmp_path / f"{minutes}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "g": "100"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            pictures = [av.VideoFrame.from_ndarray(picture(i), "rgb24").reformat(format="yuv420p") for i in range(64)]
            for i in range(minutes * 600):
                pictures[i % 64].pts, pictures[i % 64].time_base = i, Fraction(1, 10)
                container.mux(stream.encode(pictures[i % 64]))
            container.mux(stream.encode())
        output = subprocess.run(
            [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=300
        ).stdout.split()
        assert int(output[0]) == minutes * 120
        peaks.append(int(output[1]))
    # All pixels of the long clip would be 42 MiB.
    assert peaks[1] - peaks[0] < 24 * 1024, peaks


def test_limits_are_told(tmp_path: Path) -> None:
    path = str(render(tmp_path / "a.mp4", CONSTANT))
    with pytest.raises(ValueError, match=r"a\.mp4: num_frames must be 1 to 8192, got 8193"):
        read_frames(Clip(path=path, num_frames=8193))
    with pytest.raises(
        ValueError, match=r"a\.mp4: fps 1e\+06 over 8\.000 s asks for 8000000 frames, the limit is 8192"
    ):
        count_frames(Clip(path=path, fps=1e6))
    with pytest.raises(ValueError, match=r"a\.mp4: 8192 frames of 4096 x 4096 are above the limit"):
        next(read_frames(Clip(path=path, num_frames=8192), size=lambda height, width: (4096, 4096)))


@pytest.mark.slow
@pytest.mark.skipif("LONGRL_FILM_CLIP" not in os.environ, reason="LONGRL_FILM_CLIP names no film clip")
@pytest.mark.parametrize("num", [1, 9, 100])
def test_a_real_film(num: int) -> None:
    path = os.environ["LONGRL_FILM_CLIP"]
    frames = read(Clip(path=path, num_frames=num))
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        every = [
            (float(frame.time), frame.to_ndarray(format="rgb24", interpolation=decode._SCALING))
            for frame in container.decode(stream)
        ]
    times = np.array([time_s - every[0][0] for time_s, _ in every])
    chosen = [slow_nearest(times, time_s) for time_s in sample_times(0, times[-1], num_frames=num)]
    np.testing.assert_allclose(frames.timestamps_s, times[chosen], atol=1e-9)
    np.testing.assert_array_equal(frames.pixels, np.stack([every[i][1] for i in chosen]))


def test_errors_come_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        read_frames(Clip(path=str(tmp_path / "none.mp4"), fps=1))
