"""Runs the `longrl check` commands of recipes.md beside this file and writes their output behind them: `make docs`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("recipes.md")
COMMAND = re.compile(r"^```\n\$ longrl (check .*)\n(?:.*\n)*?```$", re.MULTILINE)


def make_page() -> str:
    """The page, with each plan as it comes out now, for an hour of 16:9 video that is made on the spot."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        _make_data(folder / "data" / "hours")
        return COMMAND.sub(lambda found: _block(found[1], folder), PAGE.read_text(encoding="utf-8"))


def _block(arguments: str, folder: Path) -> str:
    command = [sys.executable, "-m", "longrl", *arguments.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return f"```\n$ longrl {arguments}\n{done.stdout}{done.stderr}```"


def _make_data(folder: Path) -> None:
    """A question about an hour in which the picture changes once a minute."""
    folder.mkdir(parents=True)
    row = {"id": "1", "video": "hour.mp4", "question": "What happens after the break?", "answer": "nothing"}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    with av.open(str(folder / "hour.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 480, 270, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for second in range(3600):
            frame = av.VideoFrame.from_ndarray(np.full((270, 480, 3), 4 * (second // 60), np.uint8))
            frame.pts = second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
