"""The files of the embedding cache: damage, size, other processes, dead processes, full disks."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longrl.types import MediaEmbeds
from longrl.video import cache as cache_module
from longrl.video.cache import EmbedCache
from longrl.video.cache_commands import cache_info, cache_verify
from tests.unit.caching import KEY, contents, entry_path, key_of, left_behind, make_media, put

# Damage


@pytest.fixture
def entry(tmp_path: Path) -> tuple[EmbedCache, Path, MediaEmbeds]:
    cache, media = EmbedCache(tmp_path), make_media(deepstack=True)
    put(cache, KEY, media)
    return cache, entry_path(cache, KEY), media


def test_a_truncated_entry_is_never_believed_and_is_written_again(entry, caplog):
    cache, path, media = entry
    whole = path.read_bytes()
    lengths = [0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 8, len(whole) - 1]
    for count, length in enumerate(lengths, start=1):
        path.write_bytes(whole[:length])
        caplog.clear()
        assert cache.get(KEY) is None
        assert cache.misses == count
        assert str(path) in caplog.text
        put(cache, KEY, media)
        assert contents(cache.get(KEY)) == contents(media)


def test_an_altered_header_is_never_believed(entry, caplog):
    caplog.set_level(logging.CRITICAL)
    cache, path, media = entry
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        got = cache.get(KEY)
        num_refused += got is None
        # A flipped bit may leave the same JSON (white space); then the contents are the same too.
        assert contents(got) in (None, contents(media))
    assert num_refused > 250


def test_other_contents_under_the_same_name_are_never_believed(entry, tmp_path):
    cache, path, _ = entry
    other = key_of(7)
    entry_path(cache, other).parent.mkdir()
    shutil.copy(path, entry_path(cache, other))
    assert cache.get(other) is None

    from safetensors.torch import save_file

    save_file({"embeds": torch.zeros(50, 16)}, path)
    assert cache.get(KEY) is None


def test_altered_tensors_are_found_by_verify_and_removed(entry):
    cache, path, media = entry
    put(cache, key_of(1), media)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="1 of 2 entries") as caught:
        cache_verify(cache.dir)
    assert str(path) in str(caught.value)
    assert cache.get(KEY) is None
    assert contents(cache.get(key_of(1))) == contents(media)
    cache_verify(cache.dir)


def test_commands_print_and_refuse_a_wrong_folder(entry, tmp_path, capsys):
    cache_info(entry[0].dir)
    cache_verify(entry[0].dir)
    assert "1 entries" in capsys.readouterr().out
    for command in (cache_info, cache_verify):
        with pytest.raises(ValueError, match="no such cache folder"):
            command(tmp_path / "none")


# Size


def test_the_least_recently_used_goes_first(tmp_path):
    media = make_media()
    cache = EmbedCache(tmp_path)
    put(cache, key_of(0), media)
    entry_bytes = cache.info().size_bytes
    cache = EmbedCache(tmp_path, max_bytes=3 * entry_bytes + entry_bytes // 2)
    for number in (1, 2):
        put(cache, key_of(number), media)
    for age_s, number in ((30, 0), (20, 1), (10, 2)):
        os.utime(entry_path(cache, key_of(number)), (time.time() - age_s,) * 2)
    held = cache.get(key_of(1))
    oldest = cache.get(key_of(0))

    put(cache, key_of(3), media)
    assert [cache.get(key_of(number)) is not None for number in range(4)] == [True, True, False, True]

    put(cache, key_of(4), media)
    put(cache, key_of(5), media)
    put(cache, key_of(6), media)
    assert cache.info().num_entries == 3
    assert contents(held) == contents(oldest) == contents(media)  # a mapping outlives its entry


def test_rewriting_an_entry_evicts_nothing(tmp_path):
    media = make_media()
    put(EmbedCache(tmp_path), key_of(0), media)
    cache = EmbedCache(tmp_path, max_bytes=2 * EmbedCache(tmp_path).info().size_bytes)
    put(cache, key_of(1), media)
    for _ in range(3):
        put(cache, key_of(0), media)
    assert cache.info().num_entries == 2


def test_what_can_never_fit_is_refused_before_anything_is_evicted(tmp_path):
    put(EmbedCache(tmp_path), key_of(0), make_media())
    cache = EmbedCache(tmp_path, max_bytes=20_000)
    with pytest.raises(ValueError, match=r"raise cache\.max_gib"):
        put(cache, key_of(1), make_media(num_tokens=1000))
    assert cache.get(key_of(0)) is not None


def test_files_of_others_are_never_touched(tmp_path):
    foreign = [
        tmp_path / "model.safetensors",
        tmp_path / "ab" / "model.safetensors",
        tmp_path / "hub" / f"{KEY}.safetensors",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine" * 10_000)
        os.utime(path, (0, 0))
    media = make_media()
    cache = EmbedCache(tmp_path, max_bytes=20_000)
    for number in range(5):
        put(cache, key_of(number), media)
    assert cache.verify() == []
    assert cache.info().size_bytes <= 20_000
    assert all(path.exists() for path in foreign)


def test_what_crashed_writers_left_is_swept_after_an_hour(tmp_path):
    cache = EmbedCache(tmp_path, max_bytes=10**6)
    old, recent = tmp_path / "ab" / ".embed-old", tmp_path / "cd" / ".embed-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"half")
    for path in (old / "part", old, recent):  # recent: its file is still being written to
        os.utime(path, (time.time() - 2 * cache_module.STALE_S,) * 2)
    put(cache, KEY, make_media())
    assert not old.exists()
    assert recent.exists()


# Other processes, dead processes, full disks


def _put_many(folder: str, seed: int, num: int) -> None:
    cache = EmbedCache(folder, max_bytes=10**7)
    for number in itertools.islice(itertools.cycle(range(4)), num):
        put(cache, key_of(number), make_media(seed=number, num_tokens=2000))
        assert contents(cache.get(key_of((number + seed) % 4))) in (
            None,
            contents(make_media(seed=(number + seed) % 4, num_tokens=2000)),
        )


@pytest.mark.distributed
def test_two_processes_write_the_same_keys(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_put_many, args=(str(tmp_path), seed, 30)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    cache, num_read = EmbedCache(tmp_path), 0
    expected = [contents(make_media(seed=number, num_tokens=2000)) for number in range(4)]
    while any(writer.is_alive() for writer in writers):
        for number in range(4):
            got = cache.get(key_of(number))
            num_read += got is not None
            assert contents(got) in (None, expected[number])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert num_read > 0
    assert cache.verify() == []
    assert len(left_behind(tmp_path)) == 4


PUT_FOREVER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from caching import make_media, key_of, put
from longrl.video.cache import EmbedCache
cache, media = EmbedCache(sys.argv[1]), make_media(num_tokens=200_000)
number = 0
while True:
    put(cache, key_of(number % 256), media)
    number += 1
"""


@pytest.mark.distributed
def test_a_writer_that_is_killed_leaves_no_half_entry(tmp_path):
    command = [sys.executable, "-c", PUT_FOREVER, str(tmp_path), str(Path(__file__).parent)]
    writer = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    # Entries of 15 MB; three done, and one begun.
    while len(list(tmp_path.glob("*/*.safetensors"))) < 3 or not list(tmp_path.glob("*/.embed-*/*")):
        assert writer.poll() is None
        assert time.monotonic() < deadline
    writer.send_signal(signal.SIGKILL)
    writer.wait()

    cache = EmbedCache(tmp_path, max_bytes=10**9)
    num_entries = cache.info().num_entries
    assert num_entries >= 3
    assert cache.verify() == []
    put(cache, key_of(num_entries), make_media())
    assert contents(cache.get(key_of(num_entries))) == contents(make_media())


PUT_UNDER_LIMIT = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from caching import make_media, key_of, put
from longrl.video.cache import EmbedCache
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = EmbedCache(sys.argv[1], max_bytes=10**7)
put(cache, key_of(1), make_media())
try:
    put(cache, key_of(2), make_media(num_tokens=5000))
except OSError as error:
    print(error)
assert cache.get(key_of(1)) is not None and cache.get(key_of(2)) is None
"""


def test_a_failing_disk_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", PUT_UNDER_LIMIT, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert str(tmp_path) in line
    assert "File too large" in line
    assert "set cache.dir" in line
    assert [path.name for path in left_behind(tmp_path)] == [f"{key_of(1)}.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="make it writable") as caught:
        put(EmbedCache(tmp_path / "file" / "cache"), KEY, make_media())
    assert "\n" not in str(caught.value)
