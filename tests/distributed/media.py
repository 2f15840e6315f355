"""What each process of the tests of shared clips does: the same batch on layouts of up to four ranks, in one start."""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrl.config import CacheConfig, DataConfig
from longrl.data.examples import Skips
from longrl.data.prompts import PromptBuilder
from longrl.models import qwen_vision
from longrl.models.qwen_vl import Qwen25VL
from longrl.parallel.ranks import Ranks, make_ranks
from longrl.types import Clip, Example, MediaEmbeds, Message
from longrl.video import decode as decode_module

TIMEOUT = timedelta(minutes=15)
LAYOUTS = [(1, 4), (1, 2), (2, 2), (2, 1)]
"""(dp, sp)"""
MAX_TOKENS = 1000

decoded: Counter[tuple[str, int]] = Counter()
"""(path, presentation time) -> how often this process decoded that frame for its own sake."""
decode = decode_module._decode


def _counting(index: Any, *args: Any) -> Iterator[Any]:
    for frame in decode(index, *args):
        decoded[Path(index.path).name, frame.pts] += 1
        yield frame


def watch() -> None:
    """Chunks of four frames, so that small clips have many; and frames are counted."""
    qwen_vision.CHUNK_GRIDS = 2
    decode_module._decode = _counting


def make_family() -> Qwen25VL:
    family = Qwen25VL.tiny(0, torch.float32)
    family.vision.limits["video"] = (4 * 28 * 28, 8 * 28 * 28)  # 6 tokens a temporal patch
    return family


def make_examples(clips: dict[str, Clip | tuple[Clip, ...]]) -> list[Example]:
    return [
        Example(
            id=name,
            messages=(Message(role="user", content=(*(some if isinstance(some, tuple) else (some,)), "What?")),),
            answer="a",
            kind="open",
        )
        for name, some in clips.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a process knows after a batch."""

    kept: list[str]
    skipped: dict[str, str]
    lengths: list[int]
    digests: list[float]
    decoded: Counter[tuple[str, int]]
    said: list[str]
    """Warnings."""


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def build(folder: Path, examples: list[Example], ranks: Ranks, *, max_tokens: int | None = MAX_TOKENS) -> Built:
    """Prepares and builds the prompts of a batch, with a cache in this folder."""
    decoded.clear()
    skips = Skips(DataConfig(on_error="skip", max_skips=99))
    builder = PromptBuilder(make_family(), CacheConfig(dir=str(folder)), skips, ranks, max_tokens)
    warnings = Warnings()
    logging.getLogger("longrl").addHandler(warnings)
    builder.prepare(examples)
    kept, prompts = builder(examples)
    logging.getLogger("longrl").removeHandler(warnings)
    return Built(
        kept=[examples[i].id for i in kept],
        skipped=skips.names,
        lengths=[len(prompt) for prompt in prompts],
        digests=[float(media.embeds.double().sum()) for prompt in prompts for media in prompt.media],
        decoded=Counter(decoded),
        said=[text for text in warnings.said if not text.startswith("skipped")],
    )


def _degree(tokens: int) -> tuple[int, int]:
    """Of `sp: auto`."""
    return (1, 1) if tokens < 100 else (2, 1) if tokens < 200 else (4, 1)


def run(rank: int, size: int, folder: str, clips: dict[str, Clip]) -> None:
    """The process of one rank: writes what it found to FOLDER/RANK.pickle."""
    torch.set_num_threads(1)
    watch()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    examples, found = make_examples(clips), {}
    for dp, sp in LAYOUTS:
        ranks = make_ranks(dp * sp, sp, TIMEOUT)
        if rank < dp * sp:
            found[dp, sp] = build(Path(folder, f"{dp} x {sp}"), examples, ranks)
    auto = make_ranks(4, 1, TIMEOUT, degree=_degree)
    found["auto"] = build(Path(folder, "auto"), examples, auto)
    found["auto, one clip"] = build(Path(folder, "auto, one clip"), examples[:1], auto)
    ranks = make_ranks(4, 4, TIMEOUT)
    found["apart"] = build(Path(folder, f"disk of rank {rank}"), examples, ranks)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


encode = Qwen25VL.encode


def _dying(self: Qwen25VL, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
    for count, chunk in enumerate(encode(self, clip, chunks)):
        if count == 2:
            os._exit(17)
        yield chunk


def run_and_die(rank: int, size: int, folder: str, clips: dict[str, Clip]) -> None:
    """The last rank ends in the middle of its share, as a crash would end it."""
    torch.set_num_threads(1)
    watch()
    if rank == size - 1:
        Qwen25VL.encode = _dying
    store = dist.FileStore(f"{folder}/store of the dead", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    build(Path(folder, "half"), make_examples(clips), make_ranks(size, size, TIMEOUT))
