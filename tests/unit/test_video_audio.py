"""The audio track keeps time with the frames."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from media import CONSTANT, render

from longrl.types import MediaError
from longrl.video.audio import count_samples, read_audio

RATE = 16000
LATER = [time_s + 5 for time_s in CONSTANT]

# Noise with little above 3 kHz: every instant differs from every other, and a lossy codec keeps it.
NOISE = np.convolve(np.random.default_rng(0).normal(size=RATE * 8), np.hanning(8) / 12, "same").astype(np.float32) * 0.2


def lag(heard: np.ndarray, played: np.ndarray) -> tuple[int, float]:
    """By how many samples `heard` is late, and the correlation there."""
    spectrum = np.fft.rfft(heard, 2 * len(heard)) * np.conj(np.fft.rfft(played, 2 * len(heard)))
    correlation = np.fft.irfft(spectrum) / (np.linalg.norm(heard) * np.linalg.norm(played))
    best = int(correlation.argmax())
    return best if best < len(heard) else best - 2 * len(heard), float(correlation[best])


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mov", "pcm_s16le"), ("a.mkv", "pcm_s16le"), ("a.mp4", "aac"), ("a.ts", "aac")]
)
@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, None), (0.0, 3.0), (2.345, 6.5), (7.0, None)])
def test_spans(name: str, codec: str, start_s: float, end_s: float | None, tmp_path: Path) -> None:
    path = render(tmp_path / name, sound=NOISE, sound_codec=codec)
    heard = read_audio(str(path), start_s, end_s)
    played = NOISE[round(start_s * RATE) : None if end_s is None else round(end_s * RATE)]
    assert heard.dtype == np.float32
    if (
        codec == "aac"
    ):  # lossy, in packets of 1024 samples; an mpeg stream has no way to leave out the encoder's lead-in
        late, correlation = lag(heard[: len(played)], played[: len(heard)])
        assert abs(late) <= (1024 if name == "a.ts" else 1)
        assert correlation > 0.8
        assert abs(len(heard) - len(played)) <= (0 if end_s else 3 * 1024)
    else:  # 16 bits; mkv rounds times to milliseconds
        late, _ = lag(heard, played)
        assert abs(late) <= (16 if name == "a.mkv" else 0)
        assert len(heard) == pytest.approx(len(played), abs=16)
        if late == 0:
            np.testing.assert_allclose(heard[: len(played)], played, atol=2e-4)


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    """The file's clock starts at 5 s; the sound starts a second after the first frame."""
    path = render(tmp_path / "a.mov", LATER, sound=NOISE[: RATE * 4], sound_start_s=6.0, sound_codec="pcm_s16le")
    heard = read_audio(str(path), 0.5)
    assert not heard[: RATE // 2].any(), "nothing is played before the track starts"
    np.testing.assert_allclose(heard[RATE // 2 :], NOISE[: RATE * 4], atol=2e-4)
    beyond = read_audio(str(path), 4.0, 8.0)
    np.testing.assert_allclose(beyond[:RATE], NOISE[RATE * 3 : RATE * 4], atol=2e-4)
    assert len(beyond) == 4 * RATE
    assert not beyond[RATE:].any(), "nor after it ends"


def test_gaps_in_the_track_stay_gaps(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for first in [*range(0, 16000, 1600), *range(32000, 48000, 1600)]:
            frame = av.AudioFrame.from_ndarray(
                (NOISE[None, first : first + 1600] * 32767).astype(np.int16), "s16", "mono"
            )
            frame.sample_rate, frame.pts = RATE, first
            container.mux(track.encode(frame))
        container.mux(track.encode())
    heard = read_audio(str(path))
    assert len(heard) == 48000
    np.testing.assert_allclose(heard[:16000], NOISE[:16000], atol=2e-4)
    assert not heard[16000:32000].any()
    np.testing.assert_allclose(heard[32000:], NOISE[32000:48000], atol=2e-4)


def test_resampling_and_mixing_down(tmp_path: Path) -> None:
    path, times = tmp_path / "a.mkv", np.arange(48000 * 2) / 48000
    left, right = np.sin(2 * np.pi * 440 * times), np.sin(2 * np.pi * 880 * times)
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=48000, layout="stereo")
        both = (np.stack([left, right], 1) * 16000).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(both, "s16", "stereo")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux([*track.encode(frame), *track.encode()])
    heard = read_audio(str(path), rate=8000)
    assert len(heard) == 16000
    power = np.abs(np.fft.rfft(heard))
    assert sorted(np.argsort(power)[-2:].tolist()) == [880, 1760]  # 2 s: half a hertz a bin
    assert power[880] == pytest.approx(power[1760], rel=0.02)


@pytest.mark.parametrize(
    ("rate", "layout"),
    [
        (8000, "mono"),
        (11025, "stereo"),
        (22050, "2.1"),
        (32000, "quad"),
        (44100, "5.1"),
        (96000, "7.1"),
        (192000, "hexadecagonal"),
    ],
)
def test_any_rate_and_layout(rate: int, layout: str, tmp_path: Path) -> None:
    """A tone of every channel is heard as long, high and loud as it is."""
    path, channels = tmp_path / "a.mkv", av.AudioLayout(layout).nb_channels
    tone = (np.sin(2 * np.pi * 440 * np.arange(rate * 2) / rate) * 8000).astype(np.int16)
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(tone.repeat(channels)[None], "s16", layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux([*track.encode(frame), *track.encode()])
    heard = read_audio(str(path))
    assert (heard.dtype, len(heard)) == (np.float32, 32000)
    assert count_samples(str(path)) == 32000
    assert np.abs(np.fft.rfft(heard)).argmax() == 880  # 2 s: half a hertz a bin
    assert np.abs(heard[8000:24000]).max() == pytest.approx(8000 / 32768, rel=5e-3)


def test_errors(tmp_path: Path) -> None:
    silent = str(render(tmp_path / "silent.mp4", CONSTANT[:25]))
    with pytest.raises(MediaError, match=r"silent\.mp4: has no audio track"):
        read_audio(silent)
    path = str(render(tmp_path / "a.mp4", sound=NOISE, muxer_options={"movflags": "faststart"}))
    with pytest.raises(MediaError, match="no such file"):
        read_audio(str(tmp_path / "none.mp4"))
    with pytest.raises(MediaError, match=r"the audio span 9\.000 s to the end is not within the file"):
        read_audio(path, 9.0)
    with pytest.raises(MediaError, match=r"the audio span 1\.000 s to 99\.000 s is not within the file"):
        read_audio(path, 1.0, 99.0)
    with pytest.raises(ValueError, match="is empty"):
        read_audio(path, 3.0, 3.0)
    with pytest.raises(ValueError, match="rate must be"):
        read_audio(path, rate=0)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * 0.7)])
    with pytest.raises(MediaError, match="is truncated"):
        read_audio(path)
