"""A content-addressed store of video embeddings: one safetensors file an entry.

    DIR/3f/3fa2...e1.safetensors    an entry; its name is the key, its header describes and protects itself
    DIR/digests/9c04...7b           the content hash of one video file, so that a later run need not read it again

An entry appears by a rename, so a reader sees a whole one or none, and processes may share a folder freely: two that
write the same key write the same bytes, and the last rename wins. The modification time of an entry is when it was
last used. Tensors are memory-mapped; a mapping outlives the eviction or replacement of its file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from longrl.types import Clip, MediaEmbeds, MediaError, MediaSize
from longrl.video.entry import HEADER_BYTES, SCHEMA, BadEntryError, EntryFile, checksum, opened, read_media

log = logging.getLogger(__name__)

STALE_S = 3600
"""Temporary folders that nobody has written to for this long belong to a crashed writer."""

SETTLED_S = 2.0
"""A file changed more recently may change again within one tick of the file system's clock: remember no digest yet."""

# Only names that this module gives are ever evicted or swept, so a mistyped folder loses nothing.
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_SHARD_NAME = re.compile(r"[0-9a-f]{2}|digests")
_TEMP_PREFIX = ".embed-"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadEntry:
    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    num_entries: int
    size_bytes: int


def cache_key(clip: Clip, encoder_id: str, digest: str) -> str:
    """Names what an encoder makes of a clip, by content: the path does not count, everything else does.

    Args:
        clip: Its span, sampling and pixel budget enter the key.
        encoder_id: Stands for preprocessing, encoder weights and dtype.
        digest: Of the bytes of the file, from `file_digest`.

    Returns:
        64 hexadecimal digits.
    """
    parts = {
        "schema": SCHEMA,
        "digest": digest,
        "kind": clip.kind,  # whether sound comes with a video makes no difference to its embeddings
        "start_s": float(clip.start_s),
        "end_s": None if clip.end_s is None else float(clip.end_s),
        "fps": None if clip.fps is None else float(clip.fps),
        "num_frames": clip.num_frames,
        "max_pixels": clip.max_pixels,
        "encoder_id": encoder_id,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digest(path: str, memo_dir: Path | None = None) -> str:
    """Hashes the bytes of a file (SHA-256), reading it only if it changed since it was last hashed.

    Args:
        path: The file.
        memo_dir: Where digests are remembered, by absolute path, size, inode and times of change; None: nowhere.

    Raises:
        MediaError: The file is missing or cannot be read.
    """
    memo = memo_dir / hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest() if memo_dir else None
    try:
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):  # opening a pipe would wait for ever
            raise MediaError(f"{path}: not a file; give the path of a video file")
        if memo and (known := _recall(memo, _identity(before))):
            return known
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise MediaError(f"{path}: cannot read the file: {error.strerror or error}; check the path") from error
    if memo and _identity(before) == _identity(after) and time.time() - after.st_ctime > SETTLED_S:
        # Remembering only saves time: where it cannot be written (a read-only cache), the file is read again.
        with suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            with _folder_beside(memo) as folder:
                temp = folder / memo.name
                temp.write_text(json.dumps([_identity(after), digest]))
                _replace(temp, memo)
    return digest


def _identity(file: os.stat_result) -> list[int]:
    return [file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino]


def _recall(memo: Path, identity: list[int]) -> str | None:
    try:
        known_identity, digest = json.loads(memo.read_bytes())
    except (OSError, ValueError, TypeError):  # absent, or cut off by a power failure
        return None
    return digest if known_identity == identity else None


class EmbedCache:
    """The cache in one folder, with counters of this process: `hits`, `misses`, `bytes` (of tensors handed out)."""

    def __init__(self, dir: str | Path, max_bytes: int | None = None) -> None:
        """
        Args:
            dir: Created when the first entry is written.
            max_bytes: The least recently used entries go when the next one would not fit; None: no limit.
        """
        self.dir = Path(dir)
        self.max_bytes = max_bytes
        self.hits = self.misses = self.bytes = 0
        self._unscanned_bytes = 0  # that this process may write before it measures the folder again

    @property
    def hit_rate(self) -> float:
        """Share of this process's look-ups that were answered; 1 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    def digest(self, path: str) -> str:
        """`file_digest`, remembered in this cache."""
        return file_digest(path, self.dir / "digests")

    def get(self, key: str, rows: slice | None = None) -> MediaEmbeds | None:
        """Looks an entry up: as `read`, and counted as a hit or a miss."""
        media = self.read(key, rows)
        if media is None:
            self.misses += 1
        else:
            self.hits += 1
            self.bytes += media.embeds.nbytes + (0 if media.deepstack is None else media.deepstack.nbytes)
        return media

    def read(self, key: str, rows: slice | None = None) -> MediaEmbeds | None:
        """Reads an entry, or part of it; None if there is none that can be believed.

        Args:
            key: From `cache_key`.
            rows: Which embeddings [V, D] to return, of all V; None: all. Nothing else is read from the disk.

        Returns:
            Memory-mapped tensors, private to this process. The grid and timestamps_s are always those of the clip.
        """
        path = self._path(key)
        try:
            with opened(path) as (tensors, about):
                media = read_media(tensors, about, rows)
        except FileNotFoundError:
            return None
        except BadEntryError as error:
            log.warning("cache entry %s is damaged (%s): it does not count and will be written again", path, error)
            return None
        # Others may own the entry, or have evicted it since: what was read stands either way.
        with suppress(OSError):
            os.utime(path)
        return media

    @contextmanager
    def writing(self, key: str, size: MediaSize) -> Iterator[EntryFile]:
        """Yields a file to write to, which others may write to as well. Once it is sealed and the block ends well, it
        is the entry, synced to disk; otherwise nothing is left.

        Raises:
            ValueError: The entry alone is larger than the cache may be.
            OSError: It cannot be written (disk full, read-only folder, ...).
        """
        num_bytes = HEADER_BYTES + size.num_bytes
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise ValueError(
                f"embedding cache {self.dir}: one entry has {num_bytes} bytes, the limit for all is {self.max_bytes}; "
                "raise cache.max_gib or sample fewer frames"
            )
        path = self._path(key)
        with self.explained(size):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(num_bytes, path)
            with _folder_beside(path) as folder:
                entry = EntryFile(folder / path.name, size)
                entry.path.touch()
                yield entry
                if entry.sealed:
                    _replace(entry.path, path)

    @contextmanager
    def explained(self, size: MediaSize) -> Iterator[None]:
        """Says of what cannot be written which entry of which cache it is, and what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write an entry of {size.num_bytes} bytes to the embedding cache {self.dir}: {error}; "
                "free space there, make it writable, or set cache.dir to another folder"
            ) from error

    def remove(self, keys: Iterable[str]) -> None:
        """Takes entries out that will not be asked for again; mappings of them stay good."""
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def verify(self) -> list[BadEntry]:
        """Reads every entry in full, compares checksums, and removes the bad ones, so that they are encoded again."""
        bad = []
        for path in self._entries():
            try:
                with opened(path) as (tensors, about):
                    if checksum(tensors) != about["sha256"]:
                        raise BadEntryError("its tensors do not have the checksum they were written with")
            except FileNotFoundError:  # evicted meanwhile
                continue
            except BadEntryError as error:
                bad.append(BadEntry(path=path, reason=str(error)))
                path.unlink(missing_ok=True)
        return bad

    def info(self) -> CacheInfo:
        sizes = [found.st_size for found in map(_stat, self._entries()) if found]
        return CacheInfo(num_entries=len(sizes), size_bytes=sum(sizes))

    def _path(self, key: str) -> Path:
        return self.dir / key[:2] / f"{key}.safetensors"

    def _shards(self) -> Iterator[Path]:
        if self.dir.is_dir():
            yield from sorted(folder for folder in self.dir.iterdir() if _SHARD_NAME.fullmatch(folder.name))

    def _entries(self) -> Iterator[Path]:
        for shard in self._shards():
            yield from sorted(path for path in shard.iterdir() if _ENTRY_NAME.fullmatch(path.name))

    def _make_room(self, size_bytes: int, written: Path) -> None:
        """Evicts what was used longest ago until size_bytes more fit; the entry about to be written stays out of it."""
        self._unscanned_bytes -= size_bytes
        if self.max_bytes is None or self._unscanned_bytes >= 0:
            return
        self._sweep()
        entries = [(found.st_mtime_ns, found.st_size, path) for path in self._entries() if (found := _stat(path))]
        total_bytes = size_bytes + sum(size for _, size, path in entries if path != written)
        for _, size, path in sorted(entries):
            if total_bytes <= self.max_bytes:
                break
            if path != written:
                path.unlink(missing_ok=True)
                total_bytes -= size
        # Measuring a large cache takes a while, so it is not done at every write. An eighth of the room that is left,
        # because other processes (often one for each of 8 GPUs) write into it without telling this one.
        self._unscanned_bytes = (self.max_bytes - total_bytes) // 8

    def _sweep(self) -> None:
        """Removes what crashed writers left."""
        for shard in self._shards():
            for temp in shard.glob(f"{_TEMP_PREFIX}*"):
                touched = [found.st_mtime for path in (temp, *temp.glob("*")) if (found := _stat(path))]
                if touched and time.time() - max(touched) > STALE_S:
                    shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Yields a folder on the same file system, which goes with all that is in it."""
    with tempfile.TemporaryDirectory(prefix=_TEMP_PREFIX, dir=path.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _replace(written: Path, path: Path) -> None:
    """Lets what was written take path's place, whole."""
    # whoever may read the folder may read its entries
    written.chmod(path.parent.stat().st_mode & 0o666)
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, path)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # another process evicts too
        return None
