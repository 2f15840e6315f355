"""Clips whose frames several ranks decode and encode = clips of one process: the same files, verdicts and messages."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longrl.models import qwen_vision
from longrl.parallel.ranks import ALONE
from longrl.types import Clip
from longrl.video import decode as decode_module
from longrl.video.cache import EmbedCache
from tests.distributed import media
from tests.distributed.conftest import start
from tests.distributed.media import LAYOUTS, MAX_TOKENS, Built
from tests.unit.media import VARIABLE, render, render_growing

pytestmark = pytest.mark.distributed
SOUND = ("plain.mp4", "turned.mp4")
"""What is damaged, or decoded plainly, is done again by the first rank of a group."""


def make_clips(folder: Path) -> dict[str, Any]:
    """200 frames a file; chunks of four frames. In `refreshed` key frames cannot be relied on (see decode.py)."""
    plain = render(folder / "plain.mp4")
    turned = render(folder / "turned.mp4", VARIABLE, rotation=90, bframes=2)
    refreshed = render(folder / "refreshed.mp4", gop=25, options={"x264-params": "intra-refresh=1"})
    for name in ("damaged", "huge"):
        (folder / f"{name}.mp4").write_bytes(render(folder / "whole.mkv", gop=25).read_bytes())
    data = bytearray((folder / "damaged.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (folder / "damaged.mp4").write_bytes(data)
    (folder / "text.mp4").write_text("not a video")
    clip = {name: str(folder / f"{name}.mp4") for name in ("damaged", "huge", "text")}
    return {
        "all": Clip(path=str(plain), fps=25),
        "odd": Clip(path=str(plain), num_frames=37),
        "span": Clip(path=str(plain), start_s=2.03, end_s=6.9, fps=3.3),
        "few": Clip(path=str(plain), num_frames=5),
        "one": Clip(path=str(plain), num_frames=1),
        "crowded": Clip(path=str(plain), start_s=1.0, end_s=2.0, num_frames=61),
        "turned": Clip(path=str(turned), fps=4),
        "refreshed": Clip(path=str(refreshed), num_frames=30),
        "damaged": Clip(path=clip["damaged"], fps=20),
        "growing": Clip(path=str(render_growing(folder / "growing.ts")), fps=5),
        "text": Clip(path=clip["text"], fps=20),
        "two": (Clip(path=str(plain), num_frames=24), Clip(path=str(turned), num_frames=26)),
        "half bad": (Clip(path=str(plain), num_frames=22), Clip(path=clip["text"], num_frames=9)),
        "too long": Clip(path=clip["huge"], num_frames=2 * MAX_TOKENS // 6),
        "again": Clip(path=str(plain), fps=25),
    }


class Found:
    def __init__(self, folder: Path, alone: Built, clips: dict[str, Any], ranks: list[dict[Any, Built]]) -> None:
        self.folder, self.alone, self.clips, self.ranks = folder, alone, clips, ranks

    def of(self, layout: Any) -> list[Built]:
        return [rank[layout] for rank in self.ranks if layout in rank]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    folder = tmp_path_factory.mktemp("media")
    clips = make_clips(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_vision, "CHUNK_GRIDS", 2)
        patch.setattr(decode_module, "_decode", media._counting)
        alone = media.build(folder / "alone", media.make_examples(clips), ALONE)
    start(media.run, 4, str(folder), clips)
    ranks = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(4)]
    return Found(folder, alone, clips, ranks)


def entries(folder: Path) -> dict[str, bytes]:
    """All files of a cache but the remembered digests."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "digests")
    return {path.name: path.read_bytes() for path in files}


def test_one_process_finds_what_the_clips_are_made_for(found):
    assert found.alone.kept == [name for name in found.clips if name not in found.alone.skipped]
    assert set(found.alone.skipped) == {"damaged", "growing", "text", "half bad", "too long"}
    assert len(entries(found.folder / "alone")) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_are_byte_for_byte_those_of_one_process(found, layout):
    ours, theirs = entries(found.folder / "{} x {}".format(*layout)), entries(found.folder / "alone")
    assert ours.keys() == theirs.keys()
    assert ours == theirs


def test_where_a_layout_depends_on_the_prompt_those_that_share_it_split_its_clip(found):
    assert entries(found.folder / "auto") == entries(found.folder / "alone")
    counts = [built.decoded.total() for built in found.of("auto, one clip")]
    assert sum(counts) == 200
    assert min(counts) > 0.5 * max(counts)


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto", "apart"])
def test_all_ranks_keep_and_skip_what_one_process_does_and_say_so(found, layout):
    for built in found.of(layout):
        assert built.kept == found.alone.kept
        assert built.skipped == found.alone.skipped
        assert built.lengths == found.alone.lengths
        assert built.digests == found.alone.digests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_frame_is_decoded_by_one_rank(found, layout):
    total = sum((built.decoded for built in found.of(layout)), Counter())
    sound = {name: count for name, count in total.items() if name[0] in SOUND}
    alone = {name: count for name, count in found.alone.decoded.items() if name[0] in SOUND}
    repeated = {name for name, count in sound.items() if count > alone[name]}
    assert sound.keys() == alone.keys()
    # "crowded" asks for 61 frames of 25: one that serves both sides of a border is decoded on both
    assert len(repeated) <= layout[1] - 1
    assert all(sound[name] == alone[name] + 1 for name in repeated)


@pytest.mark.parametrize(("dp", "sp"), LAYOUTS[:3])
def test_ranks_of_a_group_share_the_frames_evenly(found, dp, sp):
    counts = [sum(n for (name, _), n in built.decoded.items() if name in SOUND) for built in found.of((dp, sp))]
    for group in (counts[first : first + sp] for first in range(0, dp * sp, sp)):
        assert min(group) > 0.5 * max(group)


@pytest.mark.parametrize("layout", [*LAYOUTS, "apart"])
def test_a_prompt_that_is_too_long_is_not_decoded(found, layout):
    for built in [*found.of(layout), found.alone]:
        assert not [name for name, _ in built.decoded if name == "huge.mp4"]
        assert f"data.max_prompt_tokens allows {MAX_TOKENS}" in built.skipped["too long"]


def test_ranks_without_a_common_folder_say_so_once_and_encode_by_themselves(found):
    first, *others = found.of("apart")
    [line] = first.said
    assert "disk of rank 0" in line
    assert "name a folder that they share" in line
    assert not any(built.said for built in others)
    for rank in range(4):
        assert entries(found.folder / f"disk of rank {rank}") == entries(found.folder / "alone")


def test_a_rank_that_dies_leaves_nothing_that_is_believed(found, tmp_path):
    clips = {"all": found.clips["all"]}
    began = time.monotonic()
    with pytest.raises(Exception, match=r"17|exit"):
        start(media.run_and_die, 2, str(tmp_path), clips)
    assert time.monotonic() - began < 30
    cache = EmbedCache(tmp_path / "half")
    assert cache.info().num_entries == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_vision, "CHUNK_GRIDS", 2)
        media.build(tmp_path / "half", media.make_examples(clips), ALONE)
    assert cache.verify() == []
    [entry] = [path for path in cache.dir.rglob("*.safetensors") if not path.parent.name.startswith(".embed-")]
    assert entry.read_bytes() == entries(found.folder / "alone")[entry.name]
