"""Opens local media files and tells what is in them, counted from the packets: headers lie."""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longrl.types import MediaError

MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded: above it a header is damaged or hostile."""

TOLERANCE_S = 0.5
"""How far a header, or a span, may reach past the last frame before it counts as wrong."""

# Containers only. Playlists (hls, concat, dash) would make ffmpeg open other files; text files would be "video" to its tty demuxer.
_DEMUXERS = "mov,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif,mp3,wav,flac,aac"


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioInfo:
    """An audio track."""

    codec: str
    rate: int
    """Samples a second."""
    channels: int
    start_s: float
    """First sample, in seconds after the first video frame."""
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What is in a video file. Times are in seconds after the first video frame, unless said otherwise."""

    path: str
    container: str
    duration_s: float
    """From the first frame's presentation to the end of the last frame's."""
    start_s: float
    """Presentation time of the first frame in the file's own clock."""
    width: int
    """After rotation."""
    height: int
    rotation_deg: int
    """Clockwise turn from the stored picture to the shown one: 0, 90, 180 or 270."""
    codec: str
    average_fps: float
    num_frames: int
    """Frames that are shown, counted from the packets."""
    keyframes_s: tuple[float, ...]
    audio: AudioInfo | None
    size_bytes: int
    variable_frame_rate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoIndex:
    """Every video packet of a file in decoding order (N), and the F frames they show in presentation order."""

    path: str
    pts: np.ndarray
    """int64 [N]"""
    is_key: np.ndarray
    """bool [N]"""
    order: np.ndarray
    """int64 [F]: the packet of each frame."""
    times_s: np.ndarray
    """float64 [F], ascending, the first is 0."""
    time_base: Fraction
    duration_s: float
    truncated: str | None
    """Why the file ends before its header says so; None: it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orientation:
    """How a stored picture becomes the shown one: transpose, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turns [H, W, 3] into [H, W, 3] or [W, H, 3]; a view."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def open_media(path: str) -> InputContainer:
    """Opens a local media file for reading; nothing else can be reached through it.

    Raises:
        MediaError: No such file, not a regular file, empty, unreadable, or not a media container.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise MediaError(f"{path}: is {what}, not a video file; give the path of a file")
        with open(path, "rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        hint = "; only local files are opened: download it first" if re.match(r"[A-Za-z][\w.+-]+:", path) else ""
        raise MediaError(f"{path}: no such file{hint or '; check the path'}") from None
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    if not head:
        raise MediaError(f"{path}: is empty (0 bytes); download or copy it again")
    try:
        # The prefix keeps ffmpeg from taking a colon in the name for a protocol.
        return av.open(
            f"file:{path}",
            options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS, "fflags": "+genpts"},
        )
    except av.FFmpegError as error:
        if head[4:8] == b"ftyp":
            raise MediaError(
                f"{path}: is truncated or still being written: an mp4 whose index (moov) is missing or damaged; download or copy it again"
            ) from None
        raise MediaError(
            f"{path}: is not a video file that can be read ({error.strerror}); use mp4, mov, mkv, webm, avi, flv or mpeg"
        ) from None


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """Picks the main video stream; cover art does not count. The other streams are discarded unread.

    Raises:
        MediaError: There is none, or it cannot be decoded, or its pictures are too large.
    """
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        kinds = sorted({other.type for other in container.streams} - {"video"})
        raise MediaError(f"{path}: has no video stream (only {', '.join(kinds) or 'nothing'}); give a video file")
    if stream.codec_context is None:
        raise MediaError(f"{path}: its video codec is not supported; convert it to h264")
    if stream.width * stream.height > MAX_PIXELS:
        raise MediaError(
            f"{path}: pictures of {stream.width} x {stream.height} are above {MAX_PIXELS} pixels; scale the video down first"
        )
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    return stream


def packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, without the empty one that PyAV ends with."""
    return (packet for packet in container.demux(stream) if packet.size)


def orientation(frame: VideoFrame, path: str) -> Orientation:
    """Reads the display matrix of a frame.

    Raises:
        MediaError: It asks for anything but quarter turns and mirror images.
    """
    side_data = frame.side_data.get(SideDataType.DISPLAYMATRIX)  # pyright: ignore[reportAttributeAccessIssue]
    if side_data is None:
        return Orientation()
    # Rows of the matrix: x' = a x + c y + ..., y' = b x + d y + ... with a, b, _, c, d at the front.
    a, b, _, c, d = (int(number) for number in np.frombuffer(side_data, np.int32)[:5])
    large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
    if small > 0.02 * large:
        raise MediaError(
            f"{path}: is rotated by {frame.rotation} degrees; only quarter turns are supported: re-encode it"
        )
    if abs(b) > abs(a):
        return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(flip_rows=d < 0, flip_columns=a < 0)


def index_video(path: str) -> VideoIndex:
    """Lists the packets of a file's video stream without decoding any: 0.1 s for an hour.

    Raises:
        MediaError: The file cannot be used at all. One that merely ends early is indexed as far as it goes.
    """
    with open_media(path) as container:
        stream = video_stream(container, path)
        truncated = _cut_index_entry(container)
        pts, durations, flags = array("q"), array("q"), array("B")
        without_time = 0
        try:
            for packet in packets(container, stream):
                without_time += packet.pts is None
                pts.append(packet.pts or 0)
                durations.append(packet.duration or 0)
                shown = not (packet.is_discard or packet.is_corrupt or _is_hidden(stream, packet))
                flags.append(packet.is_keyframe | shown << 1 | packet.is_corrupt << 2)
        except av.FFmpegError as error:
            truncated = truncated or f"cannot be read past packet {len(pts)} ({error.strerror})"
        time_base, average_rate = stream.time_base, stream.average_rate
        header_s = (container.duration or 0) / av.time_base
    if without_time:
        raise MediaError(
            f"{path}: {without_time} of {len(pts)} video packets have no presentation time; rewrite it as mp4 or mkv"
        )
    all_pts, all_flags = np.array(pts, np.int64), np.array(flags, np.uint8)
    shown = np.flatnonzero(all_flags & 2)
    if not len(shown) or time_base is None:
        raise MediaError(f"{path}: holds no video frames; download or copy it again")
    if all_flags[-1] & 4:
        truncated = truncated or "ends inside a frame"
    order = shown[np.argsort(all_pts[shown], kind="stable")]
    ticks = all_pts[order]
    last_ticks = durations[order[-1]] or (1 / (average_rate * time_base) if average_rate else 0)
    end_s = float((ticks[-1] + last_ticks) * time_base)
    if truncated is None and header_s > end_s + TOLERANCE_S and header_s > (all_end_s := _end_s(path)) + TOLERANCE_S:
        truncated = f"ends at {all_end_s:.3f} s, its header promises {header_s:.3f} s"
    return VideoIndex(
        path=path,
        pts=all_pts,
        is_key=(all_flags & 1).astype(bool),
        order=order,
        times_s=(ticks - ticks[0]) * float(time_base),
        time_base=time_base,
        duration_s=float((ticks[-1] - ticks[0] + last_ticks) * time_base),
        truncated=truncated,
    )


def check_whole(index: VideoIndex) -> None:
    """Refuses a file that ends before its header says so.

    Raises:
        MediaError: It does.
    """
    if index.truncated:
        raise MediaError(
            f"{index.path}: is truncated: {index.truncated}; download or copy it again, "
            f"or ask for a span that ends before {index.duration_s:.3f} s"
        )


def probe(path: str) -> VideoInfo:
    """Tells what is in a video file. Only the first frame is decoded.

    Raises:
        MediaError: The file is missing, empty, truncated, not a video, ...
    """
    index = index_video(path)
    check_whole(index)
    with open_media(path) as container:
        stream = video_stream(container, path)
        try:
            frame = next(container.decode(stream))
        except (av.FFmpegError, StopIteration):
            raise MediaError(f"{path}: its first frame cannot be decoded; download or copy it again") from None
        turn = orientation(frame, path)
        width, height = (frame.height, frame.width) if turn.transpose else (frame.width, frame.height)
        codec, container_name = stream.codec_context.name, container.format.name
    first_s = float(index.pts[index.order[0]] * index.time_base)
    num_frames, gaps = len(index.times_s), np.diff(index.times_s)
    # Containers round times (mkv to 1 ms), which is not a variable rate.
    tolerance = max(0.05 * np.median(gaps), 0.0011) if len(gaps) else 0
    keyframes = index.order[index.is_key[index.order]]
    return VideoInfo(
        path=path,
        container=container_name,
        duration_s=index.duration_s,
        start_s=first_s,
        width=width,
        height=height,
        rotation_deg=-frame.rotation % 360,
        codec=codec,
        average_fps=float(len(gaps) / index.times_s[-1]) if len(gaps) else 1 / (index.duration_s or 1),
        num_frames=num_frames,
        keyframes_s=tuple(float(pts * index.time_base) - first_s for pts in index.pts[keyframes]),
        audio=_audio_info(path, first_s),
        size_bytes=os.path.getsize(path),
        variable_frame_rate=bool(len(gaps) and np.abs(gaps - np.median(gaps)).max() > tolerance),
    )


def _audio_info(path: str, zero_s: float) -> AudioInfo | None:
    with open_media(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            return None
        spans = [
            (packet.pts * packet.time_base, (packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        start, end = min(span[0] for span in spans), max(span[1] for span in spans)
        return AudioInfo(
            codec=stream.codec_context.name,
            rate=stream.codec_context.sample_rate,
            channels=stream.codec_context.channels,
            start_s=float(start) - zero_s,
            duration_s=float(end - start),
        )


def _is_hidden(stream: VideoStream, packet: av.Packet) -> bool:
    """VP8 packs pictures that are only referred to, never shown, as packets of their own (bit 4 of the frame tag)."""
    return stream.codec_context.name == "vp8" and not bytes(memoryview(packet)[:1])[0] & 0x10


def _cut_index_entry(container: InputContainer) -> str | None:
    """An mp4 lists where each sample lies; one that lies past the end of the file was cut off."""
    for stream in container.streams:
        entries = stream.index_entries
        if len(entries) and (end := entries[-1].pos + entries[-1].size) > container.size:
            return f"has {container.size} bytes, its index promises at least {end}"
    return None


def _end_s(path: str) -> float:
    """Where the last packet of any stream ends, in the file's own clock."""
    end = 0.0
    with open_media(path) as container:
        try:
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except av.FFmpegError:
            return end
    return end
