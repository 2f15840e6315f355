"""Times reading 3,600 frames of an hour of video against one plain sequential decode of the same file; prints JSON.

    python benchmarks/decode.py --folder runs/benchmarks            # renders an hour at 25 frames a second, once
    python benchmarks/decode.py --file film.mp4 --num-frames 60     # any film

The plain decode converts nothing and keeps nothing: it only runs the decoder over every packet, with the threads that
reading uses. Each is timed several times in turn and the fastest counts, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import av
import numpy as np
from av.codec.context import ThreadType

from longrl.types import Clip
from longrl.video import decode
from longrl.video.decode import read_frames
from longrl.video.probe import index_video, probe

SECONDS, FPS, WIDTH, HEIGHT = 3600, 25, 320, 240


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise at several scales, uint8 [height, width]: neither flat nor random to the encoder."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width))
    for block in (4, 8, 16, 32, 64):
        coarse = rng.normal(size=(height // block + 1, width // block + 1))
        total += coarse.repeat(block, 0).repeat(block, 1)[:height, :width] * block**0.5
    return (16 + 219 * (total - total.min()) / np.ptp(total)).astype(np.uint8)


def render_hour(path: Path) -> None:
    """Writes an hour of h264, 320 x 240, 25 frames a second: a camera that wanders, and a cut every eight seconds."""
    planes = [texture(3 * HEIGHT // part, 3 * WIDTH // part, seed) for seed, part in enumerate((1, 2, 2))]
    scratch = path.with_suffix(".part.mp4")
    with av.open(str(scratch), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(SECONDS * FPS):
            x, y = int((1 + np.sin(i / 97)) * WIDTH), int((1 + np.cos(i / 61)) * HEIGHT)
            if i // (8 * FPS) % 2:
                x, y = 2 * WIDTH - x, 2 * HEIGHT - y
            views = [
                plane[y // part : (y + HEIGHT) // part, x // part : (x + WIDTH) // part]
                for plane, (y, x), part in zip(planes, [(y - y % 2, x - x % 2)] * 3, (1, 2, 2), strict=True)
            ]
            pixels = np.concatenate([np.ascontiguousarray(view).reshape(-1, WIDTH) for view in views])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "yuv420p")))
        container.mux(stream.encode())
    scratch.rename(path)


def decode_plainly(path: Path) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        threaded = stream.width * stream.height > decode._THREADED_PIXELS
        stream.thread_type = ThreadType.FRAME if threaded else ThreadType.NONE
        for _ in container.decode(stream):
            pass


def read(path: Path, num_frames: int, side: int | None) -> None:
    size = None if side is None else lambda height, width: (side, side)
    frames = sum(len(chunk.pixels) for chunk in read_frames(Clip(path=str(path), num_frames=num_frames), size=size))
    assert frames == num_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="where the rendered hour is kept")
    parser.add_argument("--file", type=Path, help="a film to read instead")
    parser.add_argument("--num-frames", type=int, default=3600)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    path = arguments.file or arguments.folder / "hour_320x240_25fps.mp4"
    if not path.exists() and arguments.file is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        render_hour(path)
    ways = {
        "plain_decode": lambda: decode_plainly(path),
        "index": lambda: index_video(str(path)),
        "read_native": lambda: read(path, arguments.num_frames, None),
        "read_112": lambda: read(path, arguments.num_frames, 112),
        "read_8_frames": lambda: read(path, 8, None),
    }
    wall_s, cpu_s = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.repeat):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall_s[name] = min(wall_s[name], time.perf_counter() - wall)
            cpu_s[name] = min(cpu_s[name], time.process_time() - cpu)
    info = probe(str(path))
    report = {
        "file": path.name,
        "seconds": round(info.duration_s, 3),
        "pixels": [info.width, info.height],
        "fps": round(info.average_fps, 3),
        "frames_in_file": info.num_frames,
        "keyframes": len(info.keyframes_s),
        "frames_read": arguments.num_frames,
        "cpus": os.cpu_count(),
        "wall_s": {name: round(value, 3) for name, value in wall_s.items()},
        "cpu_s": {name: round(value, 3) for name, value in cpu_s.items()},
        "ratio": round(wall_s["read_native"] / wall_s["plain_decode"], 3),
        "ratio_cpu": round(cpu_s["read_native"] / cpu_s["plain_decode"], 3),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
