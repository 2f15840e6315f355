"""`longrl data check`: a verdict on every row and on its media."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.unit.media import render

VIDEO = {"id": "ok", "video": "a.mp4", "question": "what?", "answer": "a dog"}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    render(folder / "a.mp4", [i / 5 for i in range(20)])
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture
def check(media, longrl):
    def run(*rows, options=()):
        path = media / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path, longrl("data", "check", path, *options)

    return run


def test_a_verdict_on_every_row(check):
    image = {"id": "image", "image": "a.png", "question": "what?", "answer": "a dog"}
    rows = {
        "ok": VIDEO,
        "ok ": {**image},
        "ok  ": {"id": "text", "question": "1 + 1?", "answer": "2", "kind": "number"},
        "missing_media": {**VIDEO, "id": "gone", "video": "gone.mp4"},
        "unreadable_media": {**VIDEO, "id": "cut", "video": "cut.mp4"},
        "unreadable_media ": {**image, "id": "fake", "image": "text.png"},
        "unreadable_media  ": {**VIDEO, "id": "late", "start_s": 9},
        "no_answer": {**VIDEO, "id": "mute", "answer": None},
        "unknown_kind": {**VIDEO, "id": "odd", "kind": "riddle"},
        "media_count": {**VIDEO, "id": "marks", "question": "<video> or <video>?"},
        "bad_row": {**VIDEO, "id": "long", "fps": 10_000},
        "bad_row ": '{"id": ',
        "bad_row  ": VIDEO,
        "bad_row   ": {**VIDEO, "id": "none", "video": {"path": "a.mp4", "max_pixels": 0}},
        "bad_row    ": {**VIDEO, "id": "half", "num_frames": 8.5},
    }
    path, done = check(*rows.values(), options=("--json",))
    report = json.loads(done.stdout)
    assert [one["verdict"] for one in report["verdicts"]] == [name.strip() for name in rows]
    assert [one["id"] for one in report["verdicts"]][3:11] == [row["id"] for row in list(rows.values())[3:11]]
    assert (report["rows"], report["failed"], report["counts"]["ok"]) == (15, 12, 3)
    for number, one in enumerate(report["verdicts"], start=1):
        assert (one["message"] is None) == (one["verdict"] == "ok")
        assert one["where"].startswith(f"{path}:{number}")
        assert one["message"] is None or one["message"].startswith(f"{path}:{number}")
    assert done.returncode == 2
    assert done.stderr == f"longrl: error: {path}: 12 of 15 rows cannot be used\n"


def test_a_message_names_the_file_once(check):
    path, done = check({**VIDEO, "num_frames": 9000})
    video = path.parent / "a.mp4"
    assert f"{path}:1 (id 'ok'): {video}: num_frames must be 1 to 8192, got 9000\n" in done.stdout


def test_rows_without_a_question_are_bad_rows(check):
    _, done = check({"messages": [{"role": "assistant", "content": "first"}], "answer": "ball"}, {"messages": []})
    assert done.stdout.endswith("2 rows: 2 bad_row\n")
    assert done.returncode == 2


def test_good_rows_and_what_is_printed(check):
    path, done = check(VIDEO, options=("--num-frames", 4))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: 1 rows: 1 ok\n", "")
    path, done = check(VIDEO, {**VIDEO, "id": "b", "video": "gone.mp4"}, options=("--sft",))
    assert done.returncode == 2
    assert done.stdout.splitlines()[0].startswith(f"no_response       {path}:1 (id 'ok'): response is missing")
    assert done.stdout.splitlines()[-1] == f"{path}: 2 rows: 2 no_response"


def test_videos_that_are_to_be_heard_have_sound(check):
    path, done = check(VIDEO, options=("--with-audio",))
    assert done.returncode == 2
    assert done.stdout.startswith(f"unreadable_media  {path}:1 (id 'ok'): ")
    assert "a.mp4: has no audio track" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "easyr2"), "--format: got 'easyr2', expected one of auto, own, longvideo_reason"),
        (("--format", "messages"), "1 of 1 rows cannot be used"),
        (("--fps", 1, "--num-frames", 2), "--fps 1 and --num-frames 2: give one of them"),
        (("--fps", 0), "error: --fps: fps: got 0.0, expected greater than 0\n"),
        (("--fps", "nan"), "error: --fps: fps: got NaN, expected a finite number\n"),
        (("--num-frames", -3), "error: --num-frames: num_frames: got -3, expected greater than or equal to 1\n"),
    ],
)
def test_wrong_options_are_refused(check, options, message):
    _, done = check(VIDEO, options=options)
    assert done.returncode == 2
    assert message in done.stderr


def test_no_file_is_one_line_without_a_configuration(longrl, tmp_path):
    done = longrl("data", "check", tmp_path / "no.jsonl")
    assert (done.returncode, done.stderr) == (2, f"longrl: error: {tmp_path}/no.jsonl does not exist\n")


def test_a_file_that_is_no_text_is_one_line(longrl, tmp_path):
    path = render(tmp_path / "clip.mp4", [0.0, 0.2])
    done = longrl("data", "check", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"longrl: error: {path}: not a text; expected a JSONL file, a JSON list (.json) or a table (.parquet)\n"
    )
