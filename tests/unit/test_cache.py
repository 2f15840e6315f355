"""The embedding cache: what comes out is what went in, keyed by what it was made of."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longrl.config import CacheConfig, DataConfig, DataRunConfig, ModelConfig
from longrl.data.examples import Skips
from longrl.types import Clip, MediaEmbeds, MediaError, MediaSize
from longrl.video import cache as cache_module
from longrl.video.cache import EmbedCache, cache_key, file_digest
from longrl.video.cache_commands import cache_build, fill
from longrl.video.encode import embed
from tests.unit.caching import KEY, bits, contents, entry_path, make_media, put


class MeanColour:
    """A small real encoder: the mean colour of every frame that PyAV decodes."""

    def __init__(self, encoder_id: str = "mean-colour") -> None:
        self.encoder_id = encoder_id
        self.num_encoded = 0

    def measure(self, clip: Clip) -> MediaSize:
        with av.open(clip.path) as container:
            count = sum(packet.size > 0 for packet in container.demux(video=0))
        sizes = {"num_frames": count, "num_tokens": count, "prompt_tokens": count, "num_bytes": 20 * count}
        return MediaSize(**sizes, chunk_frames=4, chunk_tokens=4)

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        return len(media.embeds)

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        self.num_encoded += 1
        with av.open(clip.path) as container:
            frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        for chunk in chunks or range(-(-len(frames) // 4)):
            part = frames[4 * chunk : 4 * chunk + 4]
            means = np.stack([pixels.mean(axis=(0, 1), dtype=np.float32) for _, pixels in part])
            yield MediaEmbeds(
                embeds=torch.from_numpy(means),
                grid_thw=(len(part), 1, 1),
                seconds_per_grid=1.0,
                timestamps_s=torch.tensor([time_s for time_s, _ in part], dtype=torch.float64),
                key="",
            )


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in range(0, 250, 25):
            pixels = np.full((64, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def remember_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just made count as settled, instead of waiting for two seconds."""
    monkeypatch.setattr(cache_module, "SETTLED_S", -1.0)


# What goes in comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("deepstack", [False, True])
def test_an_entry_comes_back_bit_for_bit(tmp_path, dtype, deepstack):
    media = make_media(dtype=dtype, deepstack=deepstack)
    put(EmbedCache(tmp_path), KEY, media)

    cache = EmbedCache(tmp_path)
    got = cache.get(KEY)
    assert contents(got) == contents(media)
    assert got is not None
    assert got.key == KEY
    assert (cache.hits, cache.misses) == (1, 0)
    assert cache.bytes == media.embeds.nbytes * (4 if deepstack else 1)
    assert cache.verify() == []


def test_an_absent_entry_is_a_silent_miss(tmp_path, caplog):
    cache = EmbedCache(tmp_path / "not there yet")
    assert cache.get(KEY) is None
    assert (cache.hits, cache.misses, caplog.records) == (0, 1, [])
    assert not cache.dir.exists()


@pytest.mark.parametrize("rows", [slice(0, 50), slice(7, 31), slice(None, 3), slice(49, None), slice(5, 5)])
def test_rows_are_those_of_the_whole(tmp_path, rows):
    media = make_media(deepstack=True)
    cache = EmbedCache(tmp_path)
    put(cache, KEY, media)
    got = cache.get(KEY, rows)
    assert got is not None
    assert bits(got.embeds) == bits(media.embeds[rows])
    assert media.deepstack is not None
    assert bits(got.deepstack) == bits(media.deepstack[:, rows])
    assert bits(got.timestamps_s) == bits(media.timestamps_s)


def test_rows_that_do_not_exist_are_a_bug_of_the_caller(tmp_path):
    cache = EmbedCache(tmp_path)
    put(cache, KEY, make_media(num_tokens=50))
    for rows in (slice(0, 51), slice(0, 50, 2)):
        with pytest.raises(AssertionError, match="50 embeddings"):
            cache.get(KEY, rows)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_are_mapped_and_private(tmp_path):
    media = make_media()
    cache = EmbedCache(tmp_path)
    put(cache, KEY, media)
    got = cache.get(KEY)
    assert got is not None
    assert str(entry_path(cache, KEY)) in Path("/proc/self/maps").read_text()
    got.embeds.zero_()
    assert contents(cache.get(KEY)) == contents(media)


def test_entries_are_readable_by_whoever_may_read_the_folder(tmp_path):
    cache = EmbedCache(tmp_path)
    (tmp_path / KEY[:2]).mkdir(mode=0o755)
    put(cache, KEY, make_media())
    assert entry_path(cache, KEY).stat().st_mode & 0o777 == 0o644


# Keys


def test_every_change_changes_the_key():
    rng = random.Random(0)
    for _ in range(200):
        start_s = rng.choice([0.0, rng.uniform(0, 100)])
        clip = Clip(
            path="a.mp4", start_s=start_s, end_s=start_s + rng.uniform(1, 50), fps=rng.uniform(0.1, 30), max_pixels=784
        )
        digest, encoder_id = f"{rng.getrandbits(256):064x}", f"family:{rng.random()}:float32"
        changed = [
            replace(clip, start_s=start_s + 1e-9),
            replace(clip, end_s=None),
            replace(clip, end_s=clip.end_s + 1e-3),
            replace(clip, fps=clip.fps * (1 + 1e-9)),
            replace(clip, fps=None, num_frames=rng.randint(1, 8192)),
            replace(clip, max_pixels=785),
            replace(clip, max_pixels=None),
        ]
        keys = [cache_key(each, encoder_id, digest) for each in (clip, *changed)]
        keys += [cache_key(clip, f"{encoder_id}.", digest), cache_key(clip, encoder_id, digest[::-1])]
        assert len(set(keys)) == len(keys)
        assert cache_key(replace(clip, path="elsewhere/b.mp4"), encoder_id, digest) == keys[0]


def test_key_does_not_tell_one_from_one_point_zero():
    digest = "0" * 64
    assert cache_key(Clip(path="a", fps=1, start_s=0, end_s=3), "e", digest) == cache_key(
        Clip(path="a", fps=1.0, end_s=3.0), "e", digest
    )


def test_the_schema_is_part_of_the_key(monkeypatch):
    clip = Clip(path="a", fps=1)
    before = cache_key(clip, "e", "d")
    monkeypatch.setattr(cache_module, "SCHEMA", cache_module.SCHEMA + 1)
    assert cache_key(clip, "e", "d") != before


# Digests

opened: list[str] | None = None


@pytest.fixture
def opens() -> Iterator[list[str]]:
    """The path of every file that Python opens during the test."""
    global opened
    opened = []
    yield opened
    opened = None


def _note_open(event: str, args: tuple) -> None:
    if opened is not None and event == "open":
        opened.append(str(args[0]))


sys.addaudithook(_note_open)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, remember_at_once, opens):
    path, memo = tmp_path / "a.mp4", tmp_path / "memo"
    path.write_bytes(b"first")
    first = file_digest(str(path), memo)
    assert str(path) in opens
    opens.clear()
    assert file_digest(str(path), memo) == first
    assert str(path) not in opens

    # Same size, same inode, and a modification time set back: the time of the status change still tells.
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = file_digest(str(path), memo)
    assert second == file_digest(str(path)) != first

    path.write_bytes(b"first")
    assert file_digest(str(path), memo) == first


def test_a_digest_of_a_file_just_changed_is_not_remembered(tmp_path):
    path, memo = tmp_path / "a.mp4", tmp_path / "memo"
    path.write_bytes(b"first")
    file_digest(str(path), memo)
    assert not memo.exists()


def test_a_damaged_memo_is_not_believed(tmp_path, remember_at_once):
    path, memo = tmp_path / "a.mp4", tmp_path / "memo"
    path.write_bytes(b"first")
    digest = file_digest(str(path), memo)
    (file,) = memo.iterdir()
    for damage in (b"", b"[[1, 2", b"[]", b"7", b"\xff"):
        file.write_bytes(damage)
        assert file_digest(str(path), memo) == digest


def test_what_cannot_be_read_is_named(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, reason in ((tmp_path / "none.mp4", "No such file"), (tmp_path, "not a file"), (pipe, "not a file")):
        with pytest.raises(MediaError, match=reason) as caught:
            file_digest(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


# From clip to embeddings


def test_cached_equals_live_and_a_hit_opens_no_video(tmp_path, video, remember_at_once, opens):
    clip, family = Clip(path=str(video), fps=2), MeanColour()
    live = embed(clip, family, None)
    cache = EmbedCache(tmp_path / "cache")
    assert contents(embed(clip, family, cache)) == contents(live)

    opens.clear()
    again = embed(clip, family, cache)
    assert contents(again) == contents(live)
    assert again.key == live.key != ""
    assert family.num_encoded == 2  # the live one and the miss
    assert str(video) not in opens
    assert (cache.hits, cache.misses) == (1, 1)


def test_a_renamed_video_is_known_and_another_encoder_is_not(tmp_path, video):
    cache, family = EmbedCache(tmp_path / "cache"), MeanColour()
    embed(Clip(path=str(video), fps=2), family, cache)
    renamed = video.rename(tmp_path / "other name.mp4")
    embed(Clip(path=str(renamed), fps=2), family, cache)
    assert family.num_encoded == 1
    other = MeanColour("mean-colour:bfloat16")
    embed(Clip(path=str(renamed), fps=2), other, cache)
    assert other.num_encoded == 1


def test_a_file_that_changes_meanwhile_leaves_no_entry(tmp_path, video):
    class WhileItIsWritten(MeanColour):
        def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
            yield from super().encode(clip, chunks)
            with open(clip.path, "ab") as file:
                file.write(b"more")

    cache = EmbedCache(tmp_path / "cache")
    with pytest.raises(MediaError, match="changed while"):
        embed(Clip(path=str(video), fps=2), WhileItIsWritten(), cache)
    assert cache.info().num_entries == 0


def test_fill_embeds_each_clip_once_and_names_what_it_skips(tmp_path, video, caplog):
    cache, family = EmbedCache(tmp_path / "cache"), MeanColour()
    good, bad = Clip(path=str(video), fps=2), Clip(path=str(tmp_path / "none.mp4"), fps=2)
    skips = Skips(DataConfig(on_error="skip"))
    assert fill([good, bad, good], family, cache, skips) == 1
    assert family.num_encoded == 1
    assert list(skips.names) == [bad.path]
    assert bad.path in caplog.text
    with pytest.raises(MediaError, match=r"none\.mp4"):
        fill([good, bad], family, cache, Skips(DataConfig()))


def test_build_encodes_what_is_not_there_yet(tmp_path, video, capsys):
    (tmp_path / "text.mp4").write_text("not a video")
    rows = [
        {"id": str(number), "video": name, "question": "q", "answer": "a", "num_frames": 4}
        for number, name in enumerate([video.name, video.name, "text.mp4"])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataRunConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path="tiny:qwen2_5_vl"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), on_error="skip"),
        cache=CacheConfig(dir=str(tmp_path / "cache")),
    )
    for printed in (
        "1 clips encoded, 0 were there already, 1 skipped",
        "0 clips encoded, 1 were there already, 1 skipped",
    ):
        cache_build(config)
        assert printed in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"set data\.train or data\.eval"):
        cache_build(config.model_copy(update={"data": DataConfig()}))
