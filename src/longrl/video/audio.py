"""Reads the audio track of a media file as mono samples that keep time with its frames."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard

from longrl.types import MediaError
from longrl.video.probe import TOLERANCE_S, audio_info, check_whole, find_video, index_video, open_media

_PREROLL_S = 1.0
"""Decoded and thrown away before the span: a codec's packet also needs the ones before it."""

_MAX_DRIFT_S = 0.05
"""Packet times are rounded, so samples are laid end to end; a step larger than this is a real gap in the track."""


def read_audio(path: str, start_s: float = 0.0, end_s: float | None = None, rate: int = 16000) -> np.ndarray:
    """Reads a span of the main audio track, the mean of its channels, and resamples it.

    Sample k is what is heard start_s + k / rate seconds after the first video frame is shown (in a file without video:
    after its first audio sample). Where the track holds nothing (it starts late, has a gap, or ends before end_s) no
    sound is played, and the samples are 0.

    Args:
        path: A media file.
        start_s: Start of the span.
        end_s: End of the span; None: where the track ends.
        rate: Samples a second.

    Returns:
        float32 [samples], within about -1 to 1.

    Raises:
        MediaError: The file cannot be used, has no audio, is truncated or damaged, or the span lies outside of it.
        ValueError: The span is empty or the rate is absurd.
    """
    if not 1 <= rate <= 384_000:
        raise ValueError(f"{path}: the audio rate must be 1 to 384000 samples a second, got {rate}")
    zero_s, end_s = _find_span(path, start_s, end_s)
    with open_media(path) as container:
        stream = container.streams.best("audio")
        assert isinstance(stream, AudioStream)
        samples = np.zeros(round((end_s - start_s) * rate), np.float32)
        try:
            for at, block in _blocks(_frames(container, stream, zero_s + start_s, zero_s + end_s), rate):
                at -= round((zero_s + start_s) * rate)
                first, last = max(0, -at), min(len(block), len(samples) - at)
                if first < last:
                    samples[at + first : at + last] = block[first:last]
        except FFmpegError as error:
            raise MediaError(
                f"{path}: its audio cannot be decoded ({error.strerror}); download, copy or re-encode the file"
            ) from None
    return samples


def count_samples(path: str, start_s: float = 0.0, end_s: float | None = None, rate: int = 16000) -> int:
    """How many samples `read_audio` would give, without decoding. Raises as it, but for damage that only decoding
    shows."""
    return round((_find_span(path, start_s, end_s)[1] - start_s) * rate)


def _find_span(path: str, start_s: float, end_s: float | None) -> tuple[float, float]:
    """Where time 0 is in the file's own clock, and where the span ends."""
    if not 0 <= start_s < (float("inf") if end_s is None else end_s):
        raise ValueError(f"{path}: the audio span {start_s} s to {end_s} s is empty; end_s must be larger than start_s")
    with open_media(path) as container:
        track, stream = audio_info(path, zero_s=0.0), container.streams.best("audio")
        if track is None or not isinstance(stream, AudioStream):
            raise MediaError(f"{path}: has no audio track that can be decoded; give a file with sound")
        index = index_video(path) if find_video(container) else None
    zero_s = index.start_s if index else track.start_s
    track_end_s = track.start_s + track.duration_s - zero_s
    file_end_s = max(track_end_s, index.duration_s if index else 0.0)
    if index and (end_s is None or end_s > track_end_s):
        check_whole(index)
    if start_s >= track_end_s or (end_s or 0.0) > file_end_s + TOLERANCE_S:
        raise MediaError(
            f"{path}: the audio span {start_s:.3f} s to {'the end' if end_s is None else f'{end_s:.3f} s'} is not "
            f"within the file, whose audio ends at {track_end_s:.3f} s and video at {file_end_s:.3f} s"
        )
    return zero_s, track_end_s if end_s is None else end_s


def _frames(container: InputContainer, stream: AudioStream, start_s: float, end_s: float) -> Iterator[AudioFrame]:
    """Decodes the frames of a span, in the file's own clock, and some before it; the rest is not decoded."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    for packet in container.demux(stream):
        if packet.size and packet.pts is not None:
            time_s = float(packet.pts * packet.time_base)
            if time_s < start_s - _PREROLL_S:
                continue
            if time_s > end_s:
                break
        if packet.size:
            yield from packet.decode()
    yield from stream.codec_context.decode(None)


def _blocks(frames: Iterator[AudioFrame], rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """Resamples frames; yields (which sample of the file's own clock comes first, float32 [samples]).

    Mono is the mean of the channels, as models that hear were trained on. ffmpeg would mix as for loudspeakers: two
    channels half as loud again, eight four times as loud.
    """
    resampler, cursor = None, 0
    for frame in frames:
        at = cursor if frame.time is None else round(frame.time * rate)
        if resampler is None or abs(at - cursor) > _MAX_DRIFT_S * rate:
            for block in resampler.resample(None) if resampler else ():
                yield cursor, _mean(block)
            resampler, cursor = AudioResampler(format="flt", rate=rate), at
        for block in resampler.resample(frame):
            samples = _mean(block)
            yield cursor, samples
            cursor += len(samples)
    for block in resampler.resample(None) if resampler else ():
        yield cursor, _mean(block)


def _mean(block: AudioFrame) -> np.ndarray:
    """[samples] of packed channels; PyAV crashes on eight planar ones."""
    return block.to_ndarray().reshape(-1, block.layout.nb_channels).mean(1)
