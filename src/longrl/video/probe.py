"""Opens local media files and tells what is in them, counted from the packets: headers lie."""

from __future__ import annotations

import os
import re
import stat
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longrl.types import MediaError

MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded: above it a header is damaged or hostile."""

TOLERANCE_S = 0.5
"""How far a header, or a span, may reach past the last frame before it counts as wrong."""

# Containers only: a playlist (hls, concat, dash) makes ffmpeg open other files; its tty reader takes text for video.
_DEMUXERS = "mov,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif,mp3,wav,flac,aac"


_KEY, _SHOWN, _CORRUPT = 1, 2, 4


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
    start_s: float
    """The first frame's presentation in the file's own clock."""
    duration_s: float
    """To the end of the last frame's presentation."""
    width: int
    """Of the stored picture, before rotation."""
    height: int
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
        return av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS})
    except FFmpegError:
        if head[4:8] == b"ftyp":
            raise MediaError(
                f"{path}: is truncated or still being written: an mp4 without a readable index (moov); "
                f"download or copy it again"
            ) from None
        raise MediaError(
            f"{path}: is not a video file, or damaged from the start; use mp4, mov, mkv, webm, avi, flv or mpeg"
        ) from None


def find_video(container: InputContainer) -> VideoStream | None:
    """The main video stream, if there is one; cover art does not count."""
    stream = container.streams.best("video")
    return stream if isinstance(stream, VideoStream) and not stream.disposition & Disposition.attached_pic else None


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """Picks the main video stream; the others are passed over unread.

    Raises:
        MediaError: There is none, or it cannot be decoded, or its pictures are too large.
    """
    stream = find_video(container)
    if stream is None:
        kinds = sorted({other.type for other in container.streams} - {"video"})
        raise MediaError(f"{path}: has no video stream (only {', '.join(kinds) or 'a still'}); give a video file")
    if stream.codec_context is None:
        raise MediaError(f"{path}: its video codec is not supported; convert it to h264")
    if container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc") and stream.has_b_frames:
        raise MediaError(f"{path}: an avi does not tell when reordered (B-)frames are shown; convert it to mp4")
    if stream.width * stream.height > MAX_PIXELS:
        raise MediaError(
            f"{path}: pictures of {stream.width} x {stream.height} are above the limit of {MAX_PIXELS} pixels; "
            f"scale the video down"
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
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return Orientation()
    # Rows of the matrix: x' = a x + c y + ..., y' = b x + d y + ... with a, b, _, c, d at the front.
    a, b, _, c, d = (int(number) for number in np.frombuffer(side_data, np.int32)[:5])
    large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
    if small > 0.02 * large:
        raise MediaError(
            f"{path}: is rotated by {frame.rotation} degrees, only quarter turns are supported; re-encode it"
        )
    if abs(b) > abs(a):
        return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(flip_rows=d < 0, flip_columns=a < 0)


def index_video(path: str) -> VideoIndex:
    """Lists the packets of a file's video stream without decoding any: 0.1 s for an hour.

    Raises:
        MediaError: The file cannot be used at all. One that merely ends early is indexed as far as it goes.
    """
    pts, durations, flags = array("q"), array("q"), array("B")
    with open_media(path) as container:
        stream = video_stream(container, path)
        truncated, last_dts = _cut_off(container, path), -(2**63)
        may_hide = stream.codec_context.name == "vp8"
        width, height = stream.width, stream.height
        try:
            for packet in packets(container, stream):
                if packet.pts is None or (packet.dts is not None and packet.dts < last_dts):
                    raise MediaError(
                        f"{path}: the time of video packet {len(pts)} is missing or goes backwards; "
                        f"convert the file to mp4"
                    )
                last_dts = last_dts if packet.dts is None else packet.dts
                pts.append(packet.pts)
                durations.append(packet.duration or 0)
                shown = not (packet.is_discard or packet.is_corrupt or (may_hide and _is_hidden(packet)))
                flags.append(_KEY * packet.is_keyframe | _SHOWN * shown | _CORRUPT * packet.is_corrupt)
        except FFmpegError as error:
            truncated = truncated or f"it cannot be read past video packet {len(pts)} ({error.strerror})"
        all_pts, all_flags = np.array(pts, np.int64), np.array(flags, np.uint8)
        shown = np.flatnonzero(all_flags & _SHOWN)
        time_base = stream.time_base
        if not len(shown) or time_base is None:
            why = f"is truncated: {truncated}" if truncated else "holds no video frames"
            raise MediaError(f"{path}: {why}; download or copy it again")
        order = shown[np.argsort(all_pts[shown], kind="stable")]
        ticks = all_pts[order]
        frame_ticks = 1 / (stream.average_rate * time_base) if stream.average_rate else 0
        end = ticks[-1] + (durations[order[-1]] or float(frame_ticks))
        if all_flags[-1] & _CORRUPT:
            truncated = truncated or "it ends inside a frame"
        truncated = truncated or _ends_early(container, path, float(end * time_base))
    return VideoIndex(
        path=path,
        pts=all_pts,
        is_key=(all_flags & _KEY).astype(bool),
        order=order,
        times_s=(ticks - ticks[0]) * time_base.numerator / time_base.denominator,
        start_s=float(ticks[0] * time_base),
        duration_s=float((end - ticks[0]) * time_base),
        width=width,
        height=height,
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
            f"or use a span that ends by {index.duration_s:.3f} s"
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
        except (FFmpegError, StopIteration):
            raise MediaError(f"{path}: its first frame cannot be decoded; download or copy it again") from None
        turn = orientation(frame, path)
        width, height = (frame.height, frame.width) if turn.transpose else (frame.width, frame.height)
        codec, container_name = stream.codec_context.name, container.format.name
    num_frames, gaps = len(index.times_s), np.diff(index.times_s)
    # Containers round times (mkv to 1 ms), which is not a variable rate.
    tolerance = max(0.05 * np.median(gaps), 0.0011) if len(gaps) else 0
    return VideoInfo(
        path=path,
        container=container_name,
        duration_s=index.duration_s,
        start_s=index.start_s,
        width=width,
        height=height,
        rotation_deg=-frame.rotation % 360,
        codec=codec,
        average_fps=float(len(gaps) / index.times_s[-1]) if len(gaps) else 1 / (index.duration_s or 1),
        num_frames=num_frames,
        keyframes_s=tuple(index.times_s[index.is_key[index.order]].tolist()),
        audio=audio_info(path, index.start_s),
        size_bytes=os.path.getsize(path),
        variable_frame_rate=bool(len(gaps) and np.abs(gaps - np.median(gaps)).max() > tolerance),
    )


def audio_info(path: str, zero_s: float) -> AudioInfo | None:
    """Describes the main audio track by its packets; its start_s counts from zero_s of the file's own clock.

    Returns:
        None if there is no track, or an empty one, or none that can be decoded.
    """
    with open_media(path) as container:
        stream = container.streams.best("audio")
        if not isinstance(stream, AudioStream) or stream.time_base is None or stream.codec_context is None:
            return None
        spans = [
            (packet.pts, packet.pts + (packet.duration or 0))
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        if not spans:
            return None
        start, end = min(span[0] for span in spans), max(span[1] for span in spans)
        return AudioInfo(
            codec=stream.codec_context.name,
            rate=stream.codec_context.sample_rate,
            channels=stream.codec_context.channels,
            start_s=float(start * stream.time_base) - zero_s,
            duration_s=float((end - start) * stream.time_base),
        )


def _is_hidden(packet: av.Packet) -> bool:
    """VP8 sends pictures that are only referred to as packets of their own: bit 4 of the first byte is "shown"."""
    return not bytes(memoryview(packet)[:1])[0] & 0x10


def _cut_off(container: InputContainer, path: str) -> str | None:
    """Says how a file that was just opened is shorter than it says; None: it is not, or does not say."""
    # An mp4 lists where each sample lies; one that lies past the end of the file was cut off.
    last_entries = [stream.index_entries[-1] for stream in container.streams if len(stream.index_entries)]
    promised = max([_promised_bytes(path), *(entry.pos + entry.size for entry in last_entries)])
    return f"it has {container.size} bytes and promises at least {promised}" if promised > container.size else None


def _ends_early(container: InputContainer, path: str, end_s: float) -> str | None:
    """Says how a file whose video ends at end_s, in its own clock, is shorter than its header says; None: it is not."""
    header_s = (container.duration or 0) / av.time_base
    if header_s > end_s + TOLERANCE_S and header_s > (last_s := _end_s(path)) + TOLERANCE_S:
        return f"it ends at {last_s:.3f} s, its header promises {header_s:.3f} s"
    return None


def _promised_bytes(path: str) -> int:
    """Where the index of an mp4 ends, or a Matroska file as a whole, by their own account; 0: they do not say."""
    with open(path, "rb") as file:
        head = file.read(256)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            length, at = _matroska_size(head, 4)
            segment = at + length
            if head[segment : segment + 4] != b"\x18\x53\x80\x67":
                return 0
            length, at = _matroska_size(head, segment + 4)
            return at + length
        at = 0
        while len(head) >= 16:
            size, kind = struct.unpack(">I4s", head[:8])
            size = int.from_bytes(head[8:16]) if size == 1 else size
            if kind == b"moov" or size < 8:
                return at + size if kind == b"moov" else 0
            at += size
            file.seek(at)
            head = file.read(16)
    return 0


def _matroska_size(data: bytes, at: int) -> tuple[int, int]:
    """Reads a size, whose leading zeros tell its number of bytes: (size, 0 if unknown; where it ends)."""
    num_bytes = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + num_bytes]) & (2 ** (7 * num_bytes) - 1)
    return (0 if value == 2 ** (7 * num_bytes) - 1 else value), at + num_bytes


def _end_s(path: str) -> float:
    """Where the last packet of any stream ends, in the file's own clock."""
    end_s = 0.0
    with open_media(path) as container:
        try:
            for packet in container.demux():
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except FFmpegError:
            return end_s
    return end_s
