"""Dataset rows: what a good one becomes, and that no bad one gets through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from longrl.config import DataConfig, VideoConfig
from longrl.data.examples import Skips, load_examples
from longrl.types import Clip, MediaError

ROW = {"id": "q1", "video": "a.mp4", "question": "what comes first?", "options": ["a cat", "a dog"], "answer": "B"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"reading rows opens no video")
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    """Rows are written as JSON; strings and bytes as they are."""
    path = folder / "rows.jsonl"
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(
    folder: Path,
    *rows: Any,
    data: DataConfig | None = None,
    video: VideoConfig | None = None,
    skips: Skips | None = None,
):
    return load_examples(write(folder, *rows), data or DataConfig(), video or VideoConfig(), skips)


def test_a_choice_question(folder):
    (example,) = load(folder, ROW)
    assert (example.id, example.kind, example.answer, example.category, example.response) == (
        "q1",
        "choice",
        "B",
        "other",
        None,
    )
    (message,) = example.messages
    assert message.role == "user"
    assert message.content == (
        Clip(path=str(folder / "a.mp4"), fps=1.0),
        "what comes first?\nA. a cat\nB. a dog",
    )
    assert example.extra == {}


def test_an_open_question_with_everything(folder):
    row = {
        "id": 7,
        "video": str(folder / "a.mp4"),
        "question": "how many dogs?",
        "options": None,
        "answer": 4,
        "category": "counting",
        "response": "<think>four.</think><answer>4</answer>",
        "start_s": 2,
        "end_s": 9.5,
        "num_frames": 16,
        "source": {"by": "hand"},
    }
    data = DataConfig(system_prompt="look closely.")
    (example,) = load(folder, row, data=data, video=VideoConfig(fps=2.0, max_pixels=3136))
    assert (example.id, example.kind, example.answer, example.category) == ("7", "open", "4", "counting")
    assert example.response == row["response"]
    system, user = example.messages
    assert (system.role, system.content) == ("system", ("look closely.",))
    clip = Clip(path=str(folder / "a.mp4"), start_s=2, end_s=9.5, num_frames=16, max_pixels=3136)
    assert user.content == (clip, "how many dogs?")
    assert example.clips == (clip,)
    assert example.extra == {"source": {"by": "hand"}}


def test_sampling_is_that_of_the_row_or_else_of_the_configuration(folder):
    rows = [{**ROW, "id": "1", "fps": 0.5}, {**ROW, "id": "2", "num_frames": 8}, {**ROW, "id": "3"}]
    sampling = [
        [(clip.fps, clip.num_frames) for example in load(folder, *rows, video=video) for clip in example.clips]
        for video in (VideoConfig(fps=2.0), VideoConfig(fps=None, num_frames=64))
    ]
    assert sampling == [[(0.5, None), (None, 8), (2.0, None)], [(0.5, None), (None, 8), (None, 64)]]


def test_order_blank_lines_line_ends_and_byte_order_mark(folder):
    first, second = ({**ROW, "id": name} for name in "ab")
    lines = b"\xef\xbb\xbf" + json.dumps(first).encode() + b"\r\n\r\n   \n" + json.dumps(second).encode()
    assert [example.id for example in load(folder, lines)] == ["a", "b"]


def test_text_is_kept_as_it_is(folder):
    question = "was läuft?\u2028  \n zweite Zeile "
    (example,) = load(folder, json.dumps({**ROW, "question": question}, ensure_ascii=False))
    assert example.messages[0].content[1] == f"{question}\nA. a cat\nB. a dog"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "question is missing"),
        ({"question": "  "}, "question is '  '"),
        ({"question": 3}, "question is 3"),
        ({"answer": None}, "answer is missing"),
        ({"answer": ""}, "answer is ''"),
        ({"answer": True}, "answer is True"),
        ({"answer": "C"}, "answer is 'C', expected the letter of an option, one of A, B"),
        ({"answer": "b"}, "answer is 'b'"),
        ({"answer": "AB"}, "answer is 'AB'"),
        ({"answer": "a dog"}, "answer is 'a dog'"),
        ({"answer": 1}, "answer is '1'"),
        ({"options": "AB"}, "options is 'AB'"),
        ({"options": ["a", 2]}, r"options is \['a', 2\]"),
        ({"options": ["a", " "]}, "options is "),
        ({"options": ["a"]}, "options has 1 of them, expected 2 to 26"),
        ({"options": ["a"] * 27}, "options has 27 of them, expected 2 to 26"),
        ({"kind": "chioce"}, "kind is 'chioce', expected one of choice, open, math"),
        ({"kind": "open"}, "kind is open with 2 options"),
        ({"kind": "choice", "options": None}, "kind is choice with 0 options"),
        ({"category": 5}, "category is 5"),
        ({"response": ""}, "response is ''"),
        ({"video": 3}, "video is 3, expected the path of a video file"),
        ({"video": [["a.jpg", "b.jpg"]]}, "video is a list of 2 frames, expected one video file"),
        ({"start_s": "1:00"}, "start_s is '1:00', expected a number"),
        ({"start_s": -1}, "start_s must be 0 or more"),
        ({"start_s": float("nan")}, "start_s is nan"),
        ({"start_s": 5, "end_s": 5}, "is empty"),
        ({"end_s": float("inf")}, "end_s is inf"),
        ({"fps": True}, "fps is True"),
        ({"fps": 0}, "fps must be positive"),
        ({"fps": 1, "num_frames": 8}, "exactly one of fps"),
        ({"num_frames": 0}, "num_frames must be a whole number, 1 or more, got 0"),
        ({"num_frames": 1.5}, "num_frames is 1.5, expected a whole number"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_id(folder, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, {**ROW, "id": "fine"}, "", {**ROW, "id": "broken", **change})
    assert str(caught.value).startswith(f"{folder / 'rows.jsonl'}:3 (id 'broken'): ")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MediaError)  # which could be skipped


@pytest.mark.parametrize(
    ("drop", "column", "message"),
    [
        ("video", {"vidoe": "a.mp4"}, "column 'vidoe' is not one of ours; did you mean 'video'?"),
        ("video", {"Video": "a.mp4"}, "did you mean 'video'?"),
        ("video", {"video_path": "a.MP4"}, "column 'video_path' names a file, but a row without video, image, audio"),
        ("options", {"option": ["a cat", "a dog"]}, "did you mean 'options'?"),
        ("end_s", {"start": 3}, "did you mean 'start_s'?"),
        ("end_s", {"nframes": 8}, "did you mean 'num_frames'?"),
    ],
)
def test_a_misspelt_column_is_not_left_out(folder, drop, column, message):
    row = {name: value for name, value in ROW.items() if name != drop} | column
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, row)


def test_columns_that_say_something_else_are_kept(folder):
    columns = {"videoid": "x", "image_path": "thumbnail.png", "source": "web", "seconds": 9}
    (example,) = load(folder, {**ROW, **columns})
    assert example.extra == columns


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "q2", "video": }', "malformed JSON at column 23"),
        (b'{"id": "q2"', "malformed JSON"),
        (b"[1, 2]", r"got \[1, 2\], expected a JSON object"),
        (b"null", "got None, expected a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b"{}", "id is missing"),
        (b'{"id": ""}', "id is ''"),
        (b'{"id": true}', "id is True"),
        (json.dumps(ROW).encode(), r"\(id 'q1'\): line 1 has the same id"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(folder, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, ROW, line)
    assert str(caught.value).startswith(f"{folder / 'rows.jsonl'}:2")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_has_nothing(folder):
    for path in (folder / "none.jsonl", folder):
        with pytest.raises(ValueError, match=r"does not exist$|is a folder; name its split"):
            load_examples(path, DataConfig(), VideoConfig())
    with pytest.raises(ValueError, match="no usable example in 0 rows"):
        load(folder, "")


# Missing media


def gone(number: int) -> dict[str, Any]:
    return {**ROW, "id": f"gone{number}", "video": f"gone{number}.mp4"}


def test_a_missing_video_raises(folder):
    for video in ("gone.mp4", ".", "x" * 300, "nul\0byte", "http://host/a.mp4"):
        with pytest.raises(MediaError, match=r"rows\.jsonl:2 \(id 'q2'\)") as caught:
            load(folder, ROW, {**ROW, "id": "q2", "video": video})
        assert "\n" not in str(caught.value)


def test_missing_videos_are_skipped_named_and_counted(folder, caplog):
    data = DataConfig(on_error="skip", max_skips=2)
    skips = Skips(data)
    examples = load(folder, gone(1), ROW, gone(2), data=data, skips=skips)
    assert [example.id for example in examples] == ["q1"]
    assert list(skips.names) == ["gone1", "gone2"]
    assert "gone1.mp4" in caplog.text
    assert "gone2.mp4" in caplog.text


def test_the_cap_holds_over_files_and_decode_errors(folder):
    data = DataConfig(on_error="skip", max_skips=1)
    skips = Skips(data)
    load(folder, gone(1), ROW, data=data, skips=skips)
    skips.record("gone1", MediaError("the same again, in another epoch"))
    with pytest.raises(ValueError, match=r"2 skipped .*gone1, q1.* allows only 1") as caught:
        skips.record("q1", MediaError("cut off in the middle"))
    assert not isinstance(caught.value, MediaError)
    with pytest.raises(ValueError, match="allows only 1"):
        load(folder, gone(1), ROW, gone(2), data=data)


def test_nothing_left_is_an_error_too(folder):
    with pytest.raises(ValueError, match="no usable example in 1 rows"):
        load(folder, gone(1), data=DataConfig(on_error="skip"))


def test_videos_with_their_own_sound(folder):
    row = {"id": "1", "video": "a.mp4", "question": "what?", "answer": "x", "start_s": 2, "end_s": 9.5}
    (example,) = load(folder, row, video=VideoConfig(fps=2.0, with_audio=True))
    seen, heard = example.clips
    assert (seen.kind, heard.kind, heard.with_video) == ("video", "audio", True)
    assert (heard.path, heard.start_s, heard.end_s) == (seen.path, 2, 9.5)
