"""What is told about a file is what its packets say, and unusable files are refused in one clear line."""

from __future__ import annotations

import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media import CONSTANT, HEIGHT, VARIABLE, WIDTH, render

from longrl.types import Clip, MediaError
from longrl.video.decode import read_frames
from longrl.video.probe import AudioInfo, probe

SOUND = np.sin(np.arange(16000 * 8) * 0.1).astype(np.float32) / 2
VP9 = {"codec": "libvpx-vp9", "ticks": Fraction(1, 1000), "options": {"deadline": "realtime", "cpu-used": "8"}}
needs_vp9 = pytest.mark.skipif("libvpx-vp9" not in av.codecs_available, reason="this build of ffmpeg has no libvpx")


def read_all(path: Path | str, **clip) -> int:
    return sum(len(chunk.pixels) for chunk in read_frames(Clip(path=str(path), **(clip or {"fps": 25}))))


def test_probe_tells_all(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", rotation=-90, bframes=2, sound=SOUND[: 16000 * 5], sound_start_s=1.024)
    info = probe(str(path))
    assert (info.width, info.height, info.rotation_deg) == (HEIGHT, WIDTH, 90)
    assert (info.num_frames, info.duration_s, info.average_fps) == (200, 8.0, pytest.approx(25))
    assert (info.codec, info.size_bytes, info.variable_frame_rate) == ("h264", path.stat().st_size, False)
    assert info.keyframes_s[:2] == (0.0, 0.48)
    assert isinstance(info.audio, AudioInfo)
    assert (info.audio.codec, info.audio.rate, info.audio.channels) == ("aac", 16000, 1)
    # An AAC track starts and ends on packets of 1024 samples, 64 ms.
    assert info.audio.start_s == pytest.approx(1.024, abs=0.065)
    assert info.audio.duration_s == pytest.approx(5, abs=0.13)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rate_is_told_from_rounded_times(name: str, tmp_path: Path) -> None:
    thirtieths = [i * 1.001 / 30 for i in range(100)]  # mkv rounds these to 33 and 34 ms
    assert not probe(str(render(tmp_path / f"constant_{name}", thirtieths))).variable_frame_rate
    assert probe(str(render(tmp_path / f"variable_{name}", VARIABLE))).variable_frame_rate
    dropped = thirtieths[:50] + thirtieths[51:]
    assert probe(str(render(tmp_path / f"dropped_{name}", dropped))).variable_frame_rate


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    info = probe(str(render(tmp_path / "a.mp4", [time_s + 5 for time_s in CONSTANT])))
    assert (info.start_s, info.duration_s, info.keyframes_s[0]) == (5.0, 8.0, 0.0)


def test_one_frame(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", [0.0])
    info = probe(str(path))
    assert (info.num_frames, info.duration_s, info.average_fps) == (1, pytest.approx(0.04), pytest.approx(25))
    assert read_all(path, num_frames=3) == 3


def test_frame_count_in_the_header_is_not_believed(tmp_path: Path) -> None:
    """Matroska says nothing of it; an avi header is patched to lie."""
    path = render(tmp_path / "a.avi", codec="mpeg4", ticks=Fraction(1, 25))
    data = bytearray(path.read_bytes())
    at = data.find(b"avih") + 8 + 16
    assert int.from_bytes(data[at : at + 4], "little") == 200
    data[at : at + 4] = (150).to_bytes(4, "little")
    path.write_bytes(data)
    assert probe(str(path)).num_frames == 200


def test_a_colon_in_a_name_is_not_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(tmp_path / "film.mp4", CONSTANT[:5]).rename(tmp_path / "part:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe("part:1.mp4").num_frames == 5


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        art = container.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt, art.disposition = 64, 64, "yuvj420p", av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(SOUND[None, :1024], "flt", "mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(art.encode(av.VideoFrame(64, 64, "yuvj420p")))
        container.mux([*audio.encode(), *art.encode()])
    with pytest.raises(MediaError, match="has no video stream"):
        probe(str(tmp_path / "song.mp4"))


def write_bad(kind: str, folder: Path) -> str:
    """Makes something that is no video; returns its path."""
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("a film\n" * 100)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "wav":
        path = folder / "sound.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes(32000))
    elif kind == "audio_only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(SOUND[None], "flt", "mono")
            frame.sample_rate = 16000
            container.mux([*stream.encode(frame), *stream.encode()])
    elif kind == "playlist":
        render(folder / "real.ts", CONSTANT[:50], ticks=Fraction(1, 25))
        path = folder / "list.m3u8"
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nreal.ts\n#EXT-X-ENDLIST\n")
    elif kind == "concat_list":
        render(folder / "real.mp4", CONSTANT[:50])
        path.write_text("ffconcat version 1.0\nfile real.mp4\n")
    elif kind == "concat_protocol":
        return f"concat:{render(folder / 'real.ts', CONSTANT[:50], ticks=Fraction(1, 25))}"
    elif kind == "url":
        return "http://127.0.0.1:9/film.mp4"
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file; check the path"),
        ("empty", "is empty"),
        ("directory", "is a directory"),
        ("pipe", "is a device or a pipe"),
        ("text", "is not a video file"),
        ("noise", "is not a video file"),
        ("wav", r"has no video stream \(only audio\)"),
        ("audio_only", r"has no video stream \(only audio\)"),
        ("playlist", "is not a video file"),
        ("concat_list", "is not a video file"),
        ("concat_protocol", "only local files are opened"),
        ("url", "only local files are opened"),
    ],
)
def test_what_is_no_video(kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_bad(kind, tmp_path)
    for use in (probe, read_all):
        with pytest.raises(MediaError, match=message) as caught:
            use(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "ffmpeg must not chatter"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", CONSTANT[:5])
    path.chmod(0)
    with pytest.raises(MediaError, match=r"cannot be read .* check its permissions"):
        probe(str(path))


FAST_START = {"muxer_options": {"movflags": "faststart"}}
FRAGMENTED = {"muxer_options": {"movflags": "frag_keyframe+empty_moov"}}


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mp4", FAST_START),
        ("a.mp4", FAST_START | {"sound": SOUND}),
        ("a.mp4", FRAGMENTED),
        ("a.mkv", {"sound": SOUND}),
        pytest.param("a.webm", VP9, marks=needs_vp9),
    ],
)
def test_truncated(name: str, options: dict, kept: float, tmp_path: Path) -> None:
    path = render(tmp_path / name, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    for use in (probe, read_all):
        with pytest.raises(MediaError, match=r"is truncated"):
            use(str(path))


def test_truncated_by_more_than_half_a_second(tmp_path: Path) -> None:
    """Where only the duration in the header tells, as in an flv cut between two frames."""
    path = render(tmp_path / "a.flv", ticks=Fraction(1, 25))
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[150]])
    with pytest.raises(MediaError, match=r"is truncated: it ends at .*, its header promises 8\.000 s"):
        probe(str(path))


def test_a_span_before_the_cut_can_be_read(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", **FAST_START)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.8)])
    assert read_all(path, fps=25, end_s=2.0) == 50
    with pytest.raises(MediaError, match=r"is truncated: it has .* bytes and promises at least"):
        read_all(path, fps=1, end_s=7.9)


def damage_is_noticed(path: Path) -> bool:
    """Whether plain decoding fails, loses frames or marks any as damaged."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        try:
            frames = [frame.is_corrupt for frame in container.decode(stream)]
        except av.FFmpegError:
            return True
    return any(frames) or len(frames) < 100


def test_damage_that_ffmpeg_conceals_is_refused(tmp_path: Path) -> None:
    """ffmpeg smears the neighbourhood over a hole and goes on, if not told otherwise.

    H264 has no checksums, so some changed bytes make another valid picture. All that ffmpeg notices must be refused.
    """
    path, rng = tmp_path / "a.mp4", np.random.default_rng(0)
    noise = rng.integers(0, 255, (HEIGHT * 2, WIDTH * 2, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "25", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(100):
            view = np.ascontiguousarray(noise[i // 2 : i // 2 + HEIGHT, i // 3 : i // 3 + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, "rgb24")))
        container.mux(stream.encode())
    assert read_all(path) == 100
    data, outcomes = path.read_bytes(), []
    for at in rng.integers(data.find(b"mdat") + 1000, data.find(b"moov") - 1000, 30).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
        outcomes.append(damage_is_noticed(path))
        if outcomes[-1]:
            with pytest.raises(MediaError, match="cannot be decoded"):
                read_all(path)
    assert sum(outcomes) >= 5, "the damage must do harm, or this tests nothing"


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"start_s": 8.0, "fps": 1}, "the span 8.000 s to the end is not within the video; stay within its 8.000 s"),
        ({"start_s": 1.0, "end_s": 8.6, "fps": 1}, "the span 1.000 s to 8.600 s is not within the video"),
    ],
)
def test_spans_outside(clip: dict, message: str, tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=message):
        read_all(path, **clip)


def test_an_end_just_past_the_last_frame_is_forgiven(tmp_path: Path) -> None:
    assert read_all(render(tmp_path / "a.mp4"), fps=1, end_s=8.4) == 8


def test_times_that_cannot_be_trusted(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="an avi does not tell when"):
        probe(str(render(tmp_path / "b.avi", bframes=2, ticks=Fraction(1, 25))))
    with pytest.raises(MediaError, match="missing or goes backwards"):
        # An mpeg pack holds many of these tiny pictures and has one time for all.
        probe(str(render(tmp_path / "c.mpg", codec="mpeg2video", bframes=2, ticks=Fraction(1, 25))))


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 8448, 8192, "gray"
        container.mux(stream.encode(av.VideoFrame(8448, 8192, "gray")))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="pictures of 8448 x 8192 are above the limit of 67108864 pixels"):
        probe(str(path))
