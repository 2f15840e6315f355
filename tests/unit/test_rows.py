"""Where rows come from: files of every kind and datasets of the hub, read by the real libraries."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longrl.config import CacheConfig, DataConfig, VideoConfig
from longrl.data.adapters.media import MediaReader
from longrl.data.adapters.row import Row
from longrl.data.examples import load_examples
from longrl.data.rows import missing
from longrl.types import Clip, Example

datasets = pytest.importorskip("datasets")

ROWS = [{"id": name, "video": f"{name}.mp4", "question": "what comes first?", "answer": "a dog"} for name in "ab"]


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    return tmp_path


def load(path: str | Path, **data: Any) -> list[Example]:
    cache = CacheConfig(dir="cache")
    return load_examples(path, DataConfig.model_validate(data), VideoConfig(), cache=cache)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "lines.json", "rows.parquet"])
def test_files_of_every_kind_hold_the_same_examples(folder, name):
    path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith("parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(json.dumps(ROWS, indent=1) if name == "rows.json" else lines)
    (folder / "twin.jsonl").write_text(lines)
    assert load(path) == load(folder / "twin.jsonl")
    assert [example.clips[0].path for example in load(path)] == [str(folder / "a.mp4"), str(folder / "b.mp4")]


def test_messages_in_a_table_are_those_in_lines(folder):
    """A table gives every part all keys, most of them empty, and holds pictures as bytes."""
    (folder / "a.png").write_bytes(picture())
    parts = [{"type": "video", "video": "a.mp4", "nframes": 4}, {"type": "text", "text": "what?"}]
    verl = {"data_source": "x", "prompt": [{"role": "user", "content": "<image>how many?"}], "ability": "math"}
    verl["reward_model"] = {"style": "rule", "ground_truth": "3"}
    for row in (
        {"messages": [{"role": "user", "content": parts}], "solution": "a dog", "images": None},
        {"prompt": [{"role": "user", "content": parts}], "ground_truth": "a dog"},
        {**verl, "images": [{"bytes": None, "path": "a.png"}]},
    ):
        (folder / "lines.jsonl").write_text(json.dumps(row) + "\n")
        datasets.Dataset.from_list([row, row]).to_parquet(folder / "table.parquet")
        (line,), (first, second) = load(folder / "lines.jsonl"), load(folder / "table.parquet")
        assert len(line.clips) == 1
        assert first.messages == second.messages == line.messages
        assert (first.answer, first.kind, first.id, second.id) == (line.answer, line.kind, "1", "2")
    verl["images"] = [{"bytes": picture(), "path": "a.png"}]
    datasets.Dataset.from_list([verl]).to_parquet(folder / "table.parquet")
    (example,) = load(folder / "table.parquet")
    assert [Path(clip.path).read_bytes() for clip in example.clips] == [picture()]
    assert Path("cache", "media") in Path(example.clips[0].path).parents


def test_a_hub_dataset_by_its_split(folder):
    """A folder stands for the hub: the library resolves splits, reads files and types alike."""
    hub = folder / "org" / "name"
    text = datasets.Value("string")
    features = datasets.Features({"problem": text, "answer": text, "images": datasets.List(datasets.Image())})
    rows = [{"problem": "<image>how many?", "answer": "3", "images": [{"bytes": picture(), "path": "x.png"}]}] * 2
    datasets.Dataset.from_list(rows, features=features).to_parquet(hub / "data" / "train-0.parquet")
    held_out = datasets.Dataset.from_list([{"problem": "1 + 1?", "answer": "2", "images": []}], features=features)
    held_out.to_parquet(hub / "data" / "test-0.parquet")
    first, second = load("org/name@train")
    digest = hashlib.sha256(picture()).hexdigest()
    clip = Clip(path=str(Path("cache") / "media" / digest[:2] / digest), kind="image")
    assert (first.clips, first.messages[0].content[1], first.answer, first.id) == ((clip,), "how many?", "3", "1")
    assert second.clips == first.clips  # the same bytes are one file
    assert Path(clip.path).read_bytes() == picture()
    assert [example.answer for example in load("org/name@test")] == ["2"]
    with pytest.raises(ValueError, match=r"org/name@nope: Unknown split"):
        load("org/name@nope")


def test_a_hub_dataset_needs_the_folder_of_its_media(folder):
    row, nowhere = Row({}, "org/name@train row 1", 1), MediaReader(None, folder / "store", VideoConfig())
    with pytest.raises(ValueError, match=r"org/name@train row 1: video a\.mp4 is a relative path.*data\.media_dir"):
        nowhere.clip(row, "video", "videos", "a.mp4")
    assert nowhere.clip(row, "video", "videos", str(folder / "a.mp4")).path == str(folder / "a.mp4")


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_environment(folder):
    with pytest.raises(ConnectionError, match="org/other"):
        load("org/other@train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"id": 1}, 3]', r"rows\.json row 1 .*answer is missing|question"),
        ("rows.json", b"[3]", r"rows\.json row 1: got 3, expected a JSON object"),
        ("rows.json", b'[\n{"id": 1},\n]', r"rows\.json:3: malformed JSON at column 1|rows\.json:2: malformed"),
        ("rows.json", b'[{"id": "\xff"}]', "is not UTF-8"),
        ("rows.json", b"[]", "no usable example in 0 rows"),
        (
            "rows.parquet",
            b"PAR1 cut short",
            r"rows\.parquet: not a whole parquet file \(.*[^.]\); download or write it again",
        ),
    ],
)
def test_a_bad_file_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(folder / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("/dev/null", "/dev/null is no regular file but a device or a pipe; write its rows to a file"),
        ("org/name", "org/name does not exist; a dataset of the hub is written NAME@SPLIT"),
        (".", r"\. is a folder; name its split"),
        ("rows.jsonl@train", "rows.jsonl@train: a file has no splits; write rows.jsonl"),
        ("a b@train", "a b@train does not exist"),
    ],
)
def test_a_path_to_nothing_says_what_to_write(folder, path, message):
    (folder / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=message):
        load(path)


def test_what_may_be_there(folder):
    (folder / "rows.jsonl").write_text("{}")
    assert [missing(path) for path in ("rows.jsonl", "org/name@train", ".@train")] == [None] * 3
