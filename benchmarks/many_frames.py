"""Asks the tiny twins about a video of 8,192 frames: seconds and memory of `longrl generate`, twice.

    python benchmarks/many_frames.py                                  # all families that see videos
    python benchmarks/many_frames.py --families qwen3_vl --frames 512

Prints one JSON object a family as soon as it is done. Frames of at least two tokens each; Qwen3-VL's times are text,
eleven tokens for each pair of frames, so that its prompt is nearly four times as long and cannot be shorter. The
first question decodes, encodes and prefills; the second one, in a new process, finds the embeddings in the cache and
prefills. Resident memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from longrl.config import ModelConfig
from longrl.data.synthetic.render import render
from longrl.data.synthetic.world import make_story
from longrl.models import FAMILIES, load_family

SIDE = 64
"""Pixels of a frame: four tokens for two frames of Qwen's."""
SAME = ("qwen2_5_omni_thinker", "llava_llama")
"""Other names of families."""


def make_model(family_name: str, frames: int, folder: Path) -> None:
    """The twin, with limits of pixels that leave the frames as they are."""
    family = load_family(ModelConfig(path=f"tiny:{family_name}"))
    family.save(folder)
    config = folder / "video_preprocessor_config.json"
    if config.exists():
        shared = family_name == "qwen3_vl"  # a budget for all frames
        limit = SIDE * SIDE * (frames if shared else 1)
        about = json.loads(config.read_text()) | {"size": {"shortest_edge": 784, "longest_edge": limit}}
        config.write_text(json.dumps(about))


def ask(model: Path, video: Path, frames: int, cache: Path, limit_s: float) -> dict:
    """One question by a process of its own, ended after limit_s."""
    command = [
        sys.executable,
        "-m",
        "longrl",
        "generate",
        "--model",
        model,
        "--video",
        video,
        "--prompt",
        "what came last?",
    ]
    command += ["--num-frames", frames, "--max-new-tokens", 32, "--cache", cache, "--json"]
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    end = threading.Timer(limit_s, process.kill)
    end.start()
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    end.cancel()
    if status:
        return {"failed": f"status {status} after {time.monotonic() - started:.0f} s of at most {limit_s:g}"}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(usage.ru_maxrss / 1e6, 2),
        "prompt_tokens": json.loads(said)["prompt_tokens"],
    }


def _sees(name: str) -> bool:
    return "video" in load_family(ModelConfig(path=f"tiny:{name}")).placeholders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seeing = [name for name in FAMILIES if name not in SAME and _sees(name)]
    parser.add_argument("--families", nargs="+", default=seeing)
    parser.add_argument("--frames", type=int, default=8192)
    parser.add_argument("--limit-s", type=float, default=300.0, help="of one question")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        render(make_story(0, float(args.frames)), video, fps=1.0, width=SIDE, height=SIDE)
        for name in args.families:
            make_model(name, args.frames, Path(folder) / name)
            model, cache = Path(folder) / name, Path(folder) / f"{name}-cache"
            first, second = (ask(model, video, args.frames, cache, args.limit_s) for _ in range(2))
            print(json.dumps({"family": name, "frames": args.frames, "first": first, "second": second}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
