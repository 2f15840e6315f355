"""Rows of other projects: what a good one becomes, and that no bad one gets through."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from longrl.config import CacheConfig, DataConfig, VideoConfig
from longrl.data.examples import load_examples
from longrl.types import Clip, Example, MediaError

IMAGE = b"the bytes of a picture"
OPTIONS = "\nA. a cat\nB. a dog\nC. a cow\nD. a hen"
LONGVIDEO = {
    "problem_id": 3,
    "data_type": "video",
    "videos": "a.mp4",
    "problem": "what comes first?" + OPTIONS,
    "problem_type": "multiple choice",
    "reasoning": "at 0:10 there is a dog.",
    "answer": "<answer>B</answer>",
}
VIDEO_R1 = {
    "problem_id": 5,
    "problem": "what comes first?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a cat", "B. a dog"],
    "solution": "<answer>B</answer>",
    "path": "./a.mp4",
    "data_source": "NeXT-QA",
}
EASYR1 = {"problem": "<image>find x in <image>.", "answer": "48", "images": ["a.png", "b.png"]}
QWEN = {
    "messages": [
        {"role": "system", "content": "look closely."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "file://{folder}/a.mp4", "nframes": 8, "video_start": 2, "video_end": 9.5},
                {"type": "image", "image": "a.png", "max_pixels": 50176},
                {"type": "text", "text": "is <video> in it?"},
            ],
        },
        {"role": "assistant", "content": "<think>yes.</think><answer>yes</answer>"},
    ]
}
SWIFT = {
    "messages": [{"role": "user", "content": "<video>and <image>: same?"}],
    "videos": ["a.mp4"],
    "images": [{"bytes": None, "path": "a.png"}],
    "solution": "no",
}
TRL = {"prompt": [{"role": "user", "content": "how many?"}], "images": ["a.png", "b.png"], "ground_truth": 4}
VERL = {
    "data_source": "lectures",
    "prompt": [{"role": "system", "content": "think."}, {"role": "user", "content": "<video>\nhow long?"}],
    "videos": [{"type": "video", "video": "a.mp4", "fps": 0.5}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "90"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "a.png", "b.png"):
        (tmp_path / name).write_bytes(b"reading rows opens no media")
    return tmp_path


def load(folder: Path, *rows: Any, demonstrations: bool = False, **data: Any) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row).replace("{folder}", str(folder)) + "\n" for row in rows))
    cache = CacheConfig(dir=str(folder / "cache"))
    settings = DataConfig.model_validate(data)
    return load_examples(path, settings, VideoConfig(fps=2.0), cache=cache, demonstrations=demonstrations)


def one(folder: Path, row: Any, **data: Any) -> Example:
    (example,) = load(folder, row, **data)
    return example


def asked(example: Example) -> list[tuple[str, tuple[Any, ...]]]:
    return [(message.role, message.content) for message in example.messages]


def video(folder: Path, name: str = "a.mp4", **sampling: Any) -> Clip:
    return Clip(path=str(folder / name), **(sampling or {"fps": 2.0}))


def image(folder: Path, name: str = "a.png", **more: Any) -> Clip:
    return Clip(path=str(folder / name), kind="image", **more)


# What a row becomes


def test_longvideo_reason(folder):
    example = one(folder, LONGVIDEO)
    assert asked(example) == [("user", (video(folder), LONGVIDEO["problem"]))]
    assert (example.id, example.answer, example.kind, example.category) == ("3", "B", "choice", "other")
    assert example.response == "<think>at 0:10 there is a dog.</think><answer>B</answer>"
    assert example.extra == {}


def test_longvideo_reason_of_other_kinds(folder):
    rows = [
        {**LONGVIDEO, "problem_id": "a", "problem_type": "open-ended", "answer": "a dog", "problem": "what is it?"},
        {**LONGVIDEO, "problem_id": "b", "problem_type": "temporal reasoning", "answer": "D"},
        {**LONGVIDEO, "problem_id": "c", "problem_type": None, "reasoning": "<think>x</think><answer>B</answer>"},
    ]
    examples = load(folder, *rows)
    assert [(e.kind, e.category, e.answer) for e in examples] == [
        ("open", "other", "a dog"),
        ("choice", "temporal", "D"),
        ("choice", "other", "B"),
    ]
    assert examples[2].response == "<think>x</think><answer>B</answer>"


def test_video_r1(folder):
    example = one(folder, VIDEO_R1)
    clip = Clip(path=str(folder / "./a.mp4"), fps=2.0)
    assert asked(example) == [("user", (clip, "what comes first?\nA. a cat\nB. a dog"))]
    assert (example.id, example.answer, example.kind, example.response) == ("5", "B", "choice", None)
    assert example.extra == {"data_source": "NeXT-QA"}


@pytest.mark.parametrize(
    ("problem_type", "solution", "kind", "answer"),
    [
        ("numerical", "<answer>1,024.5</answer>", "number", "1,024.5"),
        ("regression", "<answer> 3 </answer>", "regression", "3"),
        ("OCR", "<answer>EXIT B</answer>", "ocr", "EXIT B"),
        ("free-form", "<answer>A.</answer>", "free_text", "A."),
    ],
)
def test_video_r1_types(folder, problem_type, solution, kind, answer):
    row = {**VIDEO_R1, "problem_type": problem_type, "solution": solution, "options": [], "data_type": "image"}
    example = one(folder, {**row, "path": "a.png", "process": "<think>so.</think>"})
    assert (example.kind, example.answer) == (kind, answer)
    assert example.clips == (image(folder),)
    assert example.response == f"<think>so.</think>\n{solution}"


def test_easyr1(folder):
    example = one(folder, EASYR1)
    assert asked(example) == [("user", (image(folder), "find x in ", image(folder, "b.png"), "."))]
    assert (example.id, example.answer, example.kind) == ("1", "48", "open")
    assert one(folder, EASYR1, kind="math").kind == "math"
    lettered = {"problem": "<video>which?\n(A) a cat (B) a dog", "answer": "B", "videos": ["a.mp4"]}
    assert one(folder, lettered, kind="math").kind == "choice"
    assert one(folder, {"problem": "what is 1 + 1?", "answer": "2"}).clips == ()


def test_qwen_messages(folder):
    example = one(folder, QWEN)
    clips = video(folder, start_s=2, end_s=9.5, num_frames=8), image(folder, max_pixels=50176)
    assert asked(example) == [("system", ("look closely.",)), ("user", (*clips, "is <video> in it?"))]
    assert (example.answer, example.response) == ("yes", "<think>yes.</think><answer>yes</answer>")


def test_openai_messages(folder):
    url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    sound = {"data": base64.b64encode(IMAGE).decode(), "format": "wav"}
    content = [
        {"type": "text", "text": "same as this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "video_url", "video_url": {"url": "{folder}/b.mp4"}},
        {"type": "input_audio", "input_audio": sound},
    ]
    example = one(folder, {"messages": [{"role": "user", "content": content}], "answer": "no", "id": "x"})
    digest = hashlib.sha256(IMAGE).hexdigest()
    stored = folder / "cache" / "media" / digest[:2] / digest
    assert example.clips == (
        Clip(path=str(stored), kind="image"),
        video(folder, "b.mp4"),
        Clip(path=str(stored), kind="audio"),
    )
    assert stored.read_bytes() == IMAGE
    assert [path.name for path in (folder / "cache" / "media").rglob("*") if path.is_file()] == [digest]
    assert (example.id, example.answer, example.response) == ("x", "no", None)


def test_swift_messages(folder):
    example = one(folder, SWIFT)
    assert asked(example) == [("user", (video(folder), "and ", image(folder), ": same?"))]
    assert example.answer == "no"
    unmarked = {**SWIFT, "messages": [{"role": "user", "content": "same?"}]}
    assert asked(one(folder, unmarked)) == [("user", (video(folder), image(folder), "same?"))]


def test_trl(folder):
    images = image(folder), image(folder, "b.png")
    example = one(folder, {**TRL, "level": "hard"})
    assert asked(example) == [("user", (*images, "how many?"))]
    assert (example.answer, example.extra) == ("4", {"level": "hard"})
    slots = [{"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": "like "}, {"type": "image"}]
    example = one(folder, {**TRL, "prompt": [{"role": "user", "content": slots}]})
    assert asked(example) == [("user", ("is ", images[0], "like ", images[1]))]
    plain = {"prompt": "what is 1 + 1?", "completion": [{"role": "assistant", "content": "<answer>2</answer>"}]}
    example = one(folder, plain)
    assert (asked(example), example.answer) == ([("user", ("what is 1 + 1?",))], "2")


def test_several_turns(folder):
    turns = [("user", "<image>what is it?"), ("assistant", "a dog."), ("user", "and <image>?")]
    row = {"prompt": [{"role": role, "content": text} for role, text in turns], "images": ["a.png", "b.png"]}
    example = one(folder, {**row, "answer": "a cat"})
    assert asked(example) == [
        ("user", (image(folder), "what is it?")),
        ("assistant", ("a dog.",)),
        ("user", ("and ", image(folder, "b.png"), "?")),
    ]


def test_verl(folder):
    example = one(folder, VERL)
    assert asked(example) == [("system", ("think.",)), ("user", (video(folder, fps=0.5), "\nhow long?"))]
    assert (example.answer, example.kind) == ("90", "math")
    assert set(example.extra) == {"data_source", "ability", "reward_model", "extra_info"}


def test_our_own_rows_with_other_media_or_none(folder):
    rows = [
        {"id": "1", "question": "what is 1 + 1?", "answer": 2, "kind": "number"},
        {"id": "2", "image": "a.png", "question": "how many?", "answer": "3"},
        {"id": "3", "images": ["a.png", "b.png"], "question": "is <image> like <image>?", "answer": "no"},
        {
            "id": "4",
            "video": "a.mp4",
            "fps": 1,
            "images": ["b.png"],
            "question": "is <image> in <video>?",
            "answer": "n",
        },
    ]
    contents = [example.messages[0].content for example in load(folder, *rows)]
    assert contents == [
        ("what is 1 + 1?",),
        (image(folder), "how many?"),
        ("is ", image(folder), " like ", image(folder, "b.png"), "?"),
        ("is ", image(folder, "b.png"), " in ", video(folder, fps=1), "?"),
    ]


def test_system_prompt_ids_and_media_folder(folder):
    (folder / "media").mkdir()
    (folder / "media" / "c.mp4").write_bytes(b"")
    row = {**LONGVIDEO, "videos": "c.mp4"}
    examples = load(folder, row, row, media_dir=str(folder / "media"), system_prompt="think.")
    assert [example.id for example in examples] == ["3", "3#2"]  # not ours to mend
    assert asked(examples[0])[0] == ("system", ("think.",))
    assert examples[0].clips == (video(folder / "media", "c.mp4"),)


def test_options_that_the_question_has_already_are_not_said_twice(folder):
    row = {**VIDEO_R1, "problem": "which?\nA. a cat\nB. a dog"}
    assert one(folder, row).messages[0].content[1] == "which?\nA. a cat\nB. a dog"
    bare = {**VIDEO_R1, "options": ["a cat", "a dog"]}
    assert one(folder, bare).messages[0].content[1] == "what comes first?\nA. a cat\nB. a dog"
    assert one(folder, {**VIDEO_R1, "options": ["a cat", "a dog", "a cat"]}).answer == "B"  # wrong ones may be equal


# What is refused


def part(**options: Any) -> dict[str, Any]:
    content = [{"type": "video", "video": "a.mp4", **options}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": content}], "answer": "a dog"}


def said(*messages: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], "answer": "x", **columns}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LONGVIDEO, "problem_type": "riddle"}, "problem_type is 'riddle', expected one of choice, open"),
        ({**LONGVIDEO, "answer": None}, "answer is missing"),
        ({**LONGVIDEO, "answer": "E"}, "answer is 'E', expected the letter of an option, one of A, B, C, D"),
        ({**LONGVIDEO, "answer": "a dog"}, "answer is 'a dog', expected the letter"),
        ({**LONGVIDEO, "answer": "<answer>B"}, "expected one <answer>"),
        ({**LONGVIDEO, "answer": "<answer> </answer>"}, "whose <answer> is empty"),
        ({**LONGVIDEO, "problem": "which?"}, "kind is choice with 0 options, and the question letters none"),
        ({**LONGVIDEO, "videos": ["a.mp4"]}, r"videos is \['a.mp4'\], expected a text"),
        ({**LONGVIDEO, "data_type": "smell"}, "data_type is 'smell', expected one of video, image, audio"),
        ({**VIDEO_R1, "solution": "<answer>7</answer>"}, "solution is '7', expected the letter of an option"),
        ({**VIDEO_R1, "problem_type": "numerical"}, "kind is number with 2 options"),
        ({**VIDEO_R1, "problem_type": "regression", "options": []}, "solution is 'B', expected a number"),
        ({**VIDEO_R1, "options": ["A. one "]}, "options has 1 of them, expected 2 to 26; an open question has none"),
        ({**VIDEO_R1, "options": ["A. one ", "B. one"]}, "options has the right one, 'one', more than once, so that"),
        ({**EASYR1, "problem_type": "grounding"}, "answer is '48', expected seconds from and to"),
        ({**VIDEO_R1, "options": "A. x"}, "options is 'A. x', expected a list"),
        ({**EASYR1, "images": ["a.png"]}, "marks <image> in problem: 2, image files: 1"),
        ({**EASYR1, "problem": "find x."}, "marks <image> in problem: 0, image files: 2"),
        ({**EASYR1, "images": []}, "marks <image> in problem: 2, image files: 0"),
        ({**EASYR1, "videos": ["a.mp4"]}, "marks <video> in problem: 0, video files: 1"),
        ({**EASYR1, "image": "a.png"}, "it has image and images"),
        ({**EASYR1, "images": [{"width": 3}, "b.png"]}, r"images is \{'width': 3\}, expected one of bytes, path"),
        ({**EASYR1, "answer": ["48"]}, r"answer is \['48'\], expected a text"),
        ({**EASYR1, "problem": " "}, "problem is ' '"),
        (part(min_frames=4), "min_frames 4, which is not supported for video; give nframes"),
        (part(fps=1, max_frames=4), "max_frames 4, which is not supported for video; give nframes, or a lower fps"),
        (part(total_pixels=10**6), "total_pixels 1000000, which is not supported for video; give max_pixels"),
        (part(min_pixels=784), "min_pixels 784, which is not supported"),
        (part(resized_height=28), "resized_height 28, which is not supported"),
        (part(sampling="dense"), "sampling 'dense', which is not supported for video; known: fps, nframes"),
        (part(fps=1, nframes=4), "exactly one of fps"),
        (part(nframes=4.5), "nframes is 4.5, expected a whole number"),
        (part(fps="2"), "fps is '2', expected a number"),
        (part(video_start=9, video_end=3), "is empty"),
        (part(video=["a.png", "b.png"]), "is a list of 2 frames, expected one video file"),
        (part(video="data:video/mp4;base64,=?"), "expected data:TYPE;base64,BYTES"),
        (said(("user", [{"type": "image_url", "image_url": {"url": "a.png"}, "fps": 2}])), "fps 2, which is not"),
        (said(("user", [{"type": "scent", "scent": "x"}])), r"messages\[0\].content\[0\].type is 'scent'"),
        (said(("user", [{"type": "image"}, "what?"])), "marks <image> in messages: 1, image files: 0"),
        (said(("user", "what?"), ("user", None)), r"messages\[1\].content is missing"),
        (said(("user", [])), r"messages\[0\].content is \[\]"),
        (said(("tool", "x")), r"messages\[0\].role is 'tool', expected one of system, user, assistant"),
        (said(("system", "x")), "messages ends with a message of the system"),
        (said(("user", "what?"), ("assistant", " ")), "the last message of the assistant has no text"),
        (said(("user", [{"type": "video", "video": "a.mp4"}])), "messages has no text to answer"),
        (said(("user", "what?"), tools=[{"name": "crop"}]), "tools is .*, which is not supported"),
        (said(("user", "what?"), objects={"bbox": []}), "objects is .*, which is not supported"),
        (said(("assistant", "first")), "messages has only a response, expected the user's message before it"),
        ({**TRL, "prompt": []}, r"prompt is \[\], expected a list of messages"),
        ({"messages": [], "answer": "x"}, r"messages is \[\], expected a list of messages"),
        ({"messages": [{"role": "user", "content": "what?", "loss": False}], "answer": "x"}, "has loss, which is not"),
        (said(("user", "what?"), answer=None), "answer is missing"),
        ({**TRL, "prompt": None}, "prompt is missing"),
        ({**TRL, "prompt": [{"role": "user", "content": "<image>how?"}]}, "marks <image> in prompt: 1, image files: 2"),
        ({**VERL, "reward_model": {"style": "rule"}}, "answer is missing"),
        ({**VERL, "reward_model": {"ground_truth": {"x": 1}}}, r"reward_model.ground_truth is \{'x': 1\}"),
        ({**VERL, "reward_model": None}, "reward_model is missing"),
        ({**VERL, "videos": [{"video": "a.mp4", "max_frames": 8}]}, "max_frames 8, which is not supported"),
        ({**VERL, "videos": None}, "marks <video> in prompt: 1, video files: 0"),
        ({"id": "x", "question": "what?", "answer": "y", "fps": 2}, "video is missing, but fps says how to sample"),
        ({"colour": "red", "size": 3}, "no known format has the columns 'colour, size'; expected question .own."),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, row)
    assert str(caught.value).startswith(f"{folder / 'rows.jsonl'}:1")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MediaError)


def test_two_system_prompts_are_refused(folder):
    with pytest.raises(ValueError, match=r"has a system message, and data\.system_prompt is set too"):
        one(folder, VERL, system_prompt="think.")


def test_demonstrations_need_a_response_and_no_answer(folder):
    row = said(("user", "what?"), ("assistant", "a dog."), answer=None)
    (example,) = load(folder, row, demonstrations=True)
    assert (example.answer, example.response) == (None, "a dog.")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 \(id '1'\): answer is missing"):
        load(folder, row)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 \(id '1'\): response is missing"):
        load(folder, said(("user", "what?")), demonstrations=True)


@pytest.mark.parametrize(("base", "column"), [(VIDEO_R1, "process"), (LONGVIDEO, "reasoning")])
@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_thought_is_none(folder, base, column, empty):
    assert one(folder, {**base, column: empty}).response is None
    with pytest.raises(ValueError, match="response is missing; supervised fine-tuning needs one"):
        load(folder, {**base, column: empty}, demonstrations=True)


def test_columns_that_are_null_are_absent_and_options_that_are_letters_alone_differ(folder):
    row = {"id": "x", "question": "what?", "answer": "y", "video": None, "image": None, "options": None}
    assert one(folder, row).clips == ()
    assert len(one(folder, {**row, "image": "a.png"}).clips) == 1
    assert one(folder, {**VIDEO_R1, "options": ["A.", "B."]}).kind == "choice"


def test_a_named_format_is_kept_to(folder):
    assert one(folder, EASYR1, format="easyr1").answer == "48"
    with pytest.raises(ValueError, match="messages is missing"):
        one(folder, EASYR1, format="messages")


def test_media_elsewhere_are_missing(folder):
    with pytest.raises(MediaError, match=r"http://host/a\.mp4: not a local file; download it"):
        load(folder, part(video="http://host/a.mp4"))
    row = {**LONGVIDEO, "videos": "s3://bucket/a.mp4"}
    examples = load(folder, row, {**LONGVIDEO, "problem_id": 4}, on_error="skip")
    assert [example.id for example in examples] == ["4"]
