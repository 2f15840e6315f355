"""Synthetic videos on disk: files, their times, pictures and sounds, and the questions beside them."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longrl.config import SyntheticConfig
from longrl.data.synthetic.dataset import build_dataset
from longrl.data.synthetic.gallery import gallery
from longrl.data.synthetic.paint import RGB, paint
from longrl.data.synthetic.render import KEY_FRAME_EVERY_S, SCALE_HZ, render
from longrl.data.synthetic.world import COLOURS, make_story

# How far a channel inside an object may be from what was painted, with 4:2:0 and crf 20: at most 4 in twelve
# stories. Any two object colours differ by 184 or more in some channel.
COLOUR_TOLERANCE = 12


def length_s(path):
    with av.open(str(path)) as container:
        assert container.duration is not None
        return container.duration / av.time_base


@pytest.mark.parametrize("fps", [2, 29.97])
def test_rendered_file_has_exact_times_and_the_painted_pictures(tmp_path, fps):
    story, path = make_story(5, 24.0), tmp_path / "a.mp4"
    render(story, path, fps=fps, width=160, height=120)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt, video.width, video.height) == (
            "h264",
            "yuv420p",
            160,
            120,
        )
        assert not container.streams.audio
        frames = list(container.decode(video))
    assert [(frame.pts or 0) * (frame.time_base or 0) for frame in frames] == [
        i / rate for i in range(math.ceil(24 * rate))
    ]
    keys = [i for i, frame in enumerate(frames) if frame.key_frame]
    assert keys == list(range(0, len(frames), round(KEY_FRAME_EVERY_S * rate)))
    for frame in frames[:: max(1, len(frames) // 40)]:
        seen = frame.to_ndarray(format="rgb24").astype(int)
        painted = paint(story, frame.time, 120, 160).astype(int)
        assert (
            np.abs(seen - painted).mean() < 4
        )  # chroma is halved, so edges differ more than surfaces; measured at most 2.5
        event = story.event_at(frame.time)
        if event is not None:
            row = 30 if event.place.startswith("top") else 90
            col = 40 if event.place.endswith("left") else 120
            assert np.abs(seen[row, col] - RGB[event.colour]).max() < COLOUR_TOLERANCE
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_rendering_is_deterministic(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        render(make_story(5, 15.0), tmp_path / name, fps=5, width=96, height=64, audio=True)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_sound_tells_the_colour(tmp_path):
    story, path = make_story(6, 30.0), tmp_path / "a.mp4"
    render(story, path, fps=1, width=64, height=64, audio=True)
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert abs(len(sound) / rate - 30) < 0.3  # AAC works in blocks of 1,024 samples
    for event in story.events:
        part = sound[round((event.start_s + 0.15) * rate) : round((event.end_s - 0.15) * rate)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * rate))
        assert abs(spectrum.argmax() / 4 - SCALE_HZ[COLOURS.index(event.colour)]) < 3
    silent = sound[round((story.events[-1].end_s + 0.2) * rate) :]
    assert np.abs(silent).max(initial=0) < 0.02


def test_render_refuses_odd_sizes_and_missing_folders(tmp_path):
    story = make_story(0, 10)
    with pytest.raises(ValueError, match="even width and height, got 65 x 64"):
        render(story, tmp_path / "a.mp4", fps=1, width=65, height=64)
    with pytest.raises(OSError, match=r"a\.mp4: cannot write the video") as caught:
        render(story, tmp_path / "nowhere" / "a.mp4", fps=1, width=64, height=64)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # files may not grow further: as a full disk would be
    try:
        with pytest.raises(OSError, match=r"a\.mp4: cannot write the video"):
            render(make_story(0, 60), tmp_path / "a.mp4", fps=10, width=160, height=120)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def run_and_interrupt(script: str, folder: Path, after: str) -> str:
    """Run a script, send it Ctrl-C (as a terminal would, to its whole group) when a file matching `after` appears."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(after)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    return errors


def test_interrupted_rendering_leaves_nothing(tmp_path):
    script = """
import sys, pathlib
from longrl.data.synthetic import render, world
render.render(world.make_story(1, 36000), pathlib.Path(sys.argv[1]) / "a.mp4", fps=10, width=320, height=240)
"""
    assert "KeyboardInterrupt" in run_and_interrupt(script, tmp_path, ".*.part")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small():
    return {
        "train_videos": 2,
        "test_videos": 2,
        "seconds": 20,
        "fps": 2,
        "width": 96,
        "height": 64,
        "train_questions": 12,
        "test_questions": 8,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory, small):
    return build_dataset(SyntheticConfig(dir=str(tmp_path_factory.mktemp("data")), **small))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dataset_rows(built):
    sft, rl, test = read(built.train_sft), read(built.train_rl), read(built.test)
    assert (len(sft), len(rl), len(test)) == (24, 24, 16)
    assert len({row["id"] for row in sft + rl + test}) == 64
    keys = {"id", "video", "question", "options", "answer", "kind", "category"}
    assert all(row.keys() == keys | {"response"} for row in sft)
    assert all(row.keys() == keys for row in rl + test)
    for path, rows in ((built.train_sft, sft), (built.train_rl, rl), (built.test, test)):
        assert {(path.parent / row["video"]) in built.videos for row in rows} == {True}
    assert {row["video"] for row in sft} == {row["video"] for row in rl}
    assert {row["video"] for row in sft}.isdisjoint(row["video"] for row in test)
    hasty = ["no need to look" in row["response"] for row in sft]
    assert sum(hasty) == 12
    for row, guessed in zip(sft, hasty, strict=True):
        assert guessed or row["response"].endswith(f"</think><answer>{row['answer']}</answer>")
    told = {(row["video"], row["question"], *row["options"]) for row in sft}
    repeated = [row for row in rl if (row["video"], row["question"], *row["options"]) in told]
    assert not repeated


def test_dataset_videos(built):
    manifest = json.loads((built.videos[0].parent / "manifest.json").read_text())
    seeds = {name: entry["seed"] for name, entry in manifest.items()}
    assert len(set(seeds.values())) == 4
    assert all(seed % 2 == name.startswith("test") for name, seed in seeds.items())
    for path in built.videos:
        assert 20 <= length_s(path) <= 21
    assert [p.name for p in built.videos[0].parent.glob(".*")] == []


def test_dataset_is_not_rendered_twice_and_mended_where_it_differs(built, small, tmp_path):
    again = build_dataset(SyntheticConfig(dir=str(tmp_path), **small))
    for one, two in zip(built.videos, again.videos, strict=True):
        assert one.read_bytes() == two.read_bytes()
    for name in ("train_sft", "train_rl", "test"):
        assert getattr(built, name).read_text() == getattr(again, name).read_text()

    contents = [path.read_bytes() for path in again.videos]
    again.videos[1].write_bytes(contents[1][:1000])  # truncated behind our back
    stamps = [path.stat().st_mtime_ns for path in again.videos]
    build_dataset(SyntheticConfig(dir=str(tmp_path), **small))
    touched = [path.stat().st_mtime_ns != stamp for path, stamp in zip(again.videos, stamps, strict=True)]
    assert touched == [False, True, False, False]
    assert [path.read_bytes() for path in again.videos] == contents

    build_dataset(SyntheticConfig(dir=str(tmp_path), **{**small, "fps": 4}))
    assert all(path.read_bytes() != content for path, content in zip(again.videos, contents, strict=True))


@pytest.mark.parametrize("when", ["videos", "videos/.train-000.mp4.*.part", "videos/train-001.mp4"])
def test_interrupted_dataset_has_no_half_written_file(tmp_path, when):
    script = """
import sys
from longrl.config import SyntheticConfig
from longrl.data.synthetic.dataset import build_dataset
build_dataset(SyntheticConfig(dir=sys.argv[1], train_videos=30, test_videos=1, seconds=1000, width=64, height=64))
"""
    errors = run_and_interrupt(script, tmp_path, when)
    # the caller's own, within a handler of a library's perhaps; workers say nothing
    assert errors.count("Traceback") == 1 + errors.count("During handling of the above exception")
    written = list((tmp_path / "videos").iterdir())
    assert len(written) < 31
    assert not list(tmp_path.glob("*.jsonl"))
    for path in written:
        assert path.suffix in {".mp4", ".json"}
        if path.suffix == ".mp4":
            assert length_s(path) >= 1000


@pytest.mark.parametrize(
    ("change", "match"),
    [({"seed": -1}, "videos.seed"), ({"seed": 20_001}, "videos.seed"), ({"width": 97}, "even width")],
)
def test_impossible_dataset_is_refused(tmp_path, small, change, match):
    with pytest.raises(ValueError, match=match):
        build_dataset(SyntheticConfig(dir=str(tmp_path), **{**small, **change}))


def test_gallery(built, tmp_path):
    gallery(list(built.videos[:2]), tmp_path / "g.png")
    page = np.asarray(Image.open(tmp_path / "g.png"))
    assert page.shape[1] > 1000
    assert page.shape[0] > 300
    # Frames show saturated objects on the pale page.
    assert (np.ptp(page.astype(int), axis=2) > 150).mean() > 0.01
    with pytest.raises(ValueError, match="at least one video"):
        gallery([], tmp_path / "none.png")
