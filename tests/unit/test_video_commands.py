"""`longrl video probe` and `longrl video frames`."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
from media import CONSTANT, HEIGHT, WIDTH, numbers, render

from longrl.types import MediaError
from longrl.video.commands import frames_command, parse_time, probe_command


def write_frames(path: Path, out: Path, **options) -> None:
    choice = {"fps": None, "num_frames": None, "start": None, "end": None, "as_json": True, "max_pixels": None}
    frames_command(str(path), out=out, **(choice | options))


def read_png(path: str) -> list[int]:
    with av.open(path) as container:
        return numbers(next(container.decode(video=0)).to_ndarray(format="rgb24")[None])


def test_probe_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(render(tmp_path / "a.mp4", bframes=2))
    probe_command(path, as_json=True)
    info = json.loads(capsys.readouterr().out)
    assert (info["path"], info["num_frames"], info["duration_s"], info["audio"]) == (path, 200, 8.0, None)
    assert info["keyframes_s"][0] == 0
    probe_command(path, as_json=False)
    table = capsys.readouterr().out
    assert "8.000 s" in table
    assert "200, 25.000 a second, constant" in table


def test_frames_are_written_with_their_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = render(tmp_path / "a.mp4"), tmp_path / "new" / "frames"
    write_frames(path, out, fps=2.0, start="0:01", end="3.02")
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["file", "timestamps_s", "frames", "width", "height"]
    assert report["file"] == str(path)
    assert report["timestamps_s"] == pytest.approx([1, 1.48, 2, 2.48, 3])
    assert (report["width"], report["height"]) == (WIDTH, HEIGHT)
    assert sorted(report["frames"]) == sorted(map(str, out.iterdir()))
    assert report["frames"][0].endswith("frame_000000.png")
    assert [read_png(name) for name in report["frames"]] == [[25], [37], [50], [62], [75]]
    assert [entry.name for entry in out.parent.iterdir()] == ["frames"], "no scratch folder stays"


def test_frames_shrink_to_max_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = render(tmp_path / "a.mp4", rotation=90), tmp_path / "frames"
    out.mkdir()  # an empty folder is as good as none
    write_frames(path, out, num_frames=2, max_pixels=HEIGHT * WIDTH // 4, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["0.000", "s", str(out / "frame_000000.png")],
        ["7.960", "s", str(out / "frame_000001.png")],
    ]
    with av.open(str(out / "frame_000001.png")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (HEIGHT // 2, WIDTH // 2)


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT, gop=50, options={"sc_threshold": "0"})
    with av.open(str(path)) as container:
        middle = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.is_keyframe][2]
    data = bytearray(path.read_bytes())
    data[middle : middle + 10] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="cannot be decoded"):
        write_frames(path, tmp_path / "frames", fps=5.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_bad_arguments(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT[:5])
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        write_frames(path, tmp_path, fps=1.0)
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        write_frames(path, path, fps=1.0)
    with pytest.raises(ValueError, match="exactly one of fps"):
        write_frames(path, tmp_path / "frames")
    with pytest.raises(ValueError, match="--start: got 'soon'"):
        write_frames(path, tmp_path / "frames", fps=1.0, start="soon")
    with pytest.raises(ValueError, match=r"the span .* is empty"):
        write_frames(path, tmp_path / "frames", fps=1.0, start="0.1", end="0.1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1:30", 90), ("01:30.5", 90.5), ("1:00:01", 3601), ("0.25", 0.25), ("100:00", 6000)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text, "--end") == seconds


@pytest.mark.parametrize("text", ["", ":30", "1:", "1:60", "1:61:00", "1:2:3:4", "1.5:30", "soon", "1:-5", "--"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"--end: got .* expected seconds, mm:ss or hh:mm:ss"):
        parse_time(text, "--end")
