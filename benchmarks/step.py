"""Measures training steps with `longrl bench step` and writes docs/benchmarks.md with its data and figure beside it.

    python benchmarks/step.py              25 minutes on two cores that have nothing else to do
    python benchmarks/step.py --quick      two minutes, to see that it works; into runs/benchmarks

Results go to benchmarks.jsonl as they come: what is there already is not measured again if --resume is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import page
import torch
import transformers

ROOT = Path(__file__).parents[1]
FULL: list[dict[str, Any]] = [
    {"prompt_tokens": 1024, "repeats": 5},
    {"prompt_tokens": 4096, "repeats": 3},
    {"prompt_tokens": 8192, "repeats": 3},
    {"prompt_tokens": 8192, "group_size": 16, "repeats": 3},
    {"prompt_tokens": 1024, "sp": 2, "repeats": 3},
    {"prompt_tokens": 1024, "sp": 4, "repeats": 3},
    {"prompt_tokens": 4096, "sp": 2, "repeats": 2},
    {"prompt_tokens": 4096, "sp": 4, "repeats": 2},
    {"prompt_tokens": 1024, "video_tokens": 960, "repeats": 3},
]
QUICK: list[dict[str, Any]] = [
    {"prompt_tokens": 256, "group_size": 4, "response_tokens": 8},
    {"prompt_tokens": 256, "group_size": 8, "response_tokens": 8},
    {"prompt_tokens": 256, "group_size": 4, "response_tokens": 8, "sp": 2},
    {"prompt_tokens": 256, "group_size": 4, "response_tokens": 8, "video_tokens": 128},
]


def measure(setting: dict[str, Any]) -> list[dict[str, Any]]:
    flags = [part for name, value in setting.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "longrl", "bench", "step", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on after what benchmarks.jsonl has")
    parser.add_argument("--out", type=Path, help="folder; docs, or runs/benchmarks with --quick")
    arguments = parser.parse_args()
    out: Path = arguments.out or (ROOT / "runs" / "benchmarks" if arguments.quick else ROOT / "docs")
    out.mkdir(parents=True, exist_ok=True)
    data = out / "benchmarks.jsonl"
    settings = QUICK if arguments.quick else FULL
    measured = page.read(data) if arguments.resume and data.exists() else []
    with data.open("a" if measured else "w", encoding="utf-8") as file:
        for number, setting in enumerate(settings, 1):
            wanted = {name: value for name, value in (page.DEFAULTS | setting).items() if name != "repeats"}
            if page.steps(measured, **wanted):
                continue
            print(f"{number} of {len(settings)}: {setting}", file=sys.stderr, flush=True)
            about = {"cpus": os.cpu_count(), "torch": torch.__version__, "transformers": transformers.__version__}
            for row in measure(setting):
                file.write(json.dumps(row | about) + "\n")
            file.flush()
    page.write(page.read(data), out)
    print(out / "benchmarks.md")


if __name__ == "__main__":
    main()
