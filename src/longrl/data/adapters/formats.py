"""The row formats: ours and those of the projects that long-video data come from. One function each.

Columns that no function reads are kept in `Example.extra`, for rewards of one's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from longrl.data.adapters.build import Content, Draft, Slot
from longrl.data.adapters.media import MEDIA_KINDS, MediaReader
from longrl.data.adapters.row import Row, short
from longrl.types import Clip

_ANSWERS = ("answer", "solution", "ground_truth")
"""Columns that chat formats keep the truth in, beside the messages."""
_CATEGORIES = ("temporal", "goal", "plot", "spatial")
_REFUSED = ("tools", "objects", "chat_template_kwargs")
"""Columns of ms-swift's and TRL's rows that would change the prompt."""
_ROLES = ("system", "user", "assistant")
_LEFT_OUT = ("video", "videos", "image", "images", "audio", "audios", "options", "start_s", "end_s", "num_frames")
"""Columns of ours that may be absent, so that nobody would notice a misspelt one."""
_MEDIA_FILES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".png", ".jpg", ".jpeg", ".webp", ".wav", ".mp3", ".flac")


def own(row: Row, media: MediaReader) -> Draft:
    """{"id", "video" | "image" | "images" ..., "question", "options", "answer", "kind", "category", "response",
    "start_s", "end_s", "fps", "num_frames"}; without media: a question about text alone."""
    sampling = {name: row.get(name) for name in ("start_s", "end_s", "fps", "num_frames")}
    files = _columns(row, media, {name: value for name, value in sampling.items() if value is not None})
    draft = Draft(
        turns=[("user", [row.text("question")])],
        media=files,
        options=_optional_list(row, "options"),
        answer=row.get("answer"),
        kind=row.get("kind"),
        category=row.text("category", "other"),
        response=_optional(row, "response"),
    )
    _require_spelling(row, bool(files))
    return draft


def longvideo_reason(row: Row, media: MediaReader) -> Draft:
    """LongVideo-Reason (arXiv 2507.07966): {"problem_id", "data_type", "videos": "x.mp4", "problem", "problem_type",
    "reasoning", "answer"}. Options are in the problem; reasoning and answer make a response."""
    draft = _problem(row, media, "videos", "answer")
    category = str(draft.kind).casefold().partition(" ")[0]
    reasoning, answer = _thought(row, "reasoning"), None if draft.answer is None else str(draft.answer)
    if reasoning and "<think>" not in reasoning:
        reasoning = f"<think>{reasoning}</think>"
    if answer and "<answer>" not in answer:
        answer = f"<answer>{answer}</answer>"
    response = reasoning if reasoning and "<answer>" in reasoning else f"{reasoning}{answer}"
    draft = replace(draft, response=response if reasoning and answer else None)
    return replace(draft, kind=None, category=category) if category in _CATEGORIES else draft


def video_r1(row: Row, media: MediaReader) -> Draft:
    """Video-R1 (arXiv 2503.21776): {"problem_id", "problem", "data_type", "problem_type", "options", "solution":
    "<answer>B</answer>", "path"}, and "process", the demonstrated thought, in its CoT data."""
    draft = _problem(row, media, "path", "solution")
    process = _thought(row, "process")
    response = f"{process}\n{draft.answer}" if process and draft.answer is not None else None
    return replace(draft, options=_optional_list(row, "options"), response=response)


def easyr1(row: Row, media: MediaReader) -> Draft:
    """EasyR1: {"problem", "answer", "images" | "videos": [...]}, with marks in the problem."""
    return Draft(
        turns=[("user", [row.text("problem")])],
        media=_columns(row, media),
        marks_required=True,
        question_name="problem",
        answer=row.get("answer"),
        kind=row.get("problem_type"),
        kind_name="problem_type",
    )


def messages(row: Row, media: MediaReader) -> Draft:
    """OpenAI's, qwen-vl-utils' and ms-swift's: {"messages": [{"role", "content"}]}, media in parts of the content or in
    columns (images, videos, audios) with marks in the texts. A last message of the assistant is the response; the truth
    stands in one of _ANSWERS, or in the one <answer> of the response."""
    turns = _turns(row, media, "messages")
    return _chat(row, media, "messages", turns, _pop_response(turns, row))


def trl(row: Row, media: MediaReader) -> Draft:
    """TRL: {"prompt": text or messages, "image" | "images", "completion"}; the truth as in `messages`."""
    response = None
    if isinstance(row.columns.get("completion"), list):
        response = _pop_response(completion := _turns(row, media, "completion"), row)
        if completion:
            raise row.error("completion has several messages, expected one of the assistant")
    else:
        response = _optional(row, "completion")
    return _chat(row, media, "prompt", _turns(row, media, "prompt"), response)


def verl(row: Row, media: MediaReader) -> Draft:
    """verl: {"data_source", "prompt": messages with marks, "images" | "videos": [{...}], "ability", "reward_model":
    {"style", "ground_truth"}, "extra_info"}."""
    judged = row.columns.get("reward_model")
    if not isinstance(judged, dict):
        raise row.wrong("reward_model", judged, "an object with ground_truth")
    draft = _chat(row, media, "prompt", _turns(row, media, "prompt"), None)
    kind = draft.kind or ("math" if row.columns.get("ability") == "math" else None)
    truth = {"answer": judged.get("ground_truth"), "answer_name": "reward_model.ground_truth"}
    return replace(draft, kind=kind, marks_required=True, **truth)


FORMATS: dict[str, Callable[[Row, MediaReader], Draft]] = {
    "own": own,
    "longvideo_reason": longvideo_reason,
    "video_r1": video_r1,
    "easyr1": easyr1,
    "messages": messages,
    "trl": trl,
    "verl": verl,
}


def detect(columns: dict[str, Any]) -> str:
    """The format of a row by the columns it has, empty ones too.

    Raises:
        ValueError: none fits.
    """
    has = columns.keys()
    if "messages" in has:
        return "messages"
    if "prompt" in has:
        return "verl" if "reward_model" in has else "trl"
    if "problem" in has:
        if "solution" in has and "path" in has:
            return "video_r1"
        if "reasoning" in has or isinstance(columns.get("videos"), str):
            return "longvideo_reason"
        return "easyr1"
    if "question" in has:
        return "own"
    raise ValueError(
        f"no known format has the columns {short(', '.join(has))}; expected question (own), problem (longvideo_reason, "
        f"video_r1, easyr1), messages, or prompt (trl, verl)"
    )


# Parts of several formats


def _problem(row: Row, media: MediaReader, column: str, answer: str) -> Draft:
    """What LongVideo-Reason and Video-R1 have in common."""
    kind = row.text("data_type", "video")
    if kind not in MEDIA_KINDS:
        raise row.wrong("data_type", kind, f"one of {', '.join(MEDIA_KINDS)}")
    return Draft(
        turns=[("user", [row.text("problem")])],
        media={kind: [media.clip(row, kind, column, row.text(column))]},
        question_name="problem",
        answer=row.get(answer),
        answer_name=answer,
        kind=row.get("problem_type"),
        kind_name="problem_type",
    )


def _chat(row: Row, media: MediaReader, name: str, turns: list[tuple[str, Content]], response: str | None) -> Draft:
    for column in _REFUSED:
        if row.columns.get(column):
            raise row.error(f"{column} is {short(row.columns[column])}, which is not supported; remove the column")
    answer_name = next((column for column in _ANSWERS if column in row.columns), "answer")
    answer = row.get(answer_name)
    if answer is None and response and response.count("<answer>") == response.count("</answer>") == 1:
        answer, answer_name = response, "the last message"
    return Draft(
        turns=turns,
        media=_columns(row, media),
        question_name=name,
        answer=answer,
        answer_name=answer_name,
        kind=row.get("problem_type", "kind"),
        category=_optional(row, "category"),
        response=response,
    )


def _require_spelling(row: Row, has_media: bool) -> None:
    """
    Raises:
        RowError: a column that is not read was probably meant to be.
    """
    kinds = [name for name in _LEFT_OUT if name.removesuffix("s") in MEDIA_KINDS] if has_media else []
    absent = [name for name in _LEFT_OUT if name not in row.columns and name not in kinds]
    for name, value in row.extra.items():
        if nearest := difflib.get_close_matches(name.casefold(), absent, n=1, cutoff=0.8):
            raise row.error(f"column {name!r} is not one of ours; did you mean {nearest[0]!r}?")
        if not has_media and isinstance(value, str) and value.lower().endswith(_MEDIA_FILES):
            raise row.error(
                f"column {name!r} names a file, but a row without {', '.join(MEDIA_KINDS)} is a question about text "
                "alone; rename the column, or take it out"
            )


def _columns(row: Row, media: MediaReader, sampling: dict[str, Any] | None = None) -> dict[str, list[Clip]]:
    """Media in columns, by kind: `video` or `videos`, one or a list; alike the others.

    Args:
        sampling: columns that say how to sample the row's video, or its sound if it has none.
    """
    found: dict[str, list[Clip]] = {}
    for kind in MEDIA_KINDS:
        one, several = row.get(kind), row.get(f"{kind}s")
        if one is not None and several is not None:
            raise row.error(f"it has {kind} and {kind}s; put all into {kind}s")
        value, name = (one, kind) if several is None else (several, f"{kind}s")
        options, sampling = (sampling, None) if value is not None else (None, sampling)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if clips := [media.clip(row, kind, name, item, options) for item in values]:
            found[kind] = clips
    if sampling:
        raise row.error(f"video is missing, but {', '.join(sampling)} says how to sample one")
    return found


def _turns(row: Row, media: MediaReader, name: str) -> list[tuple[str, Content]]:
    """The messages of a column; a plain text is one of the user."""
    got = row.get(name)
    if isinstance(got, str):
        return [("user", [row.text(name)])]
    if not isinstance(got, list) or not got or not all(isinstance(message, dict) for message in got):
        raise row.wrong(name, got, "a list of messages, each with role and content")
    turns: list[tuple[str, Content]] = []
    for number, message in enumerate(got):
        where = f"{name}[{number}]"
        said = {key: value for key, value in message.items() if value is not None}
        role, content = said.pop("role", None), said.pop("content", None)
        if role not in _ROLES:
            raise row.wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
        if said:
            raise row.error(f"{where} has {', '.join(said)}, which is not supported; expected role and content")
        if isinstance(content, str):
            turns.append((role, [content]))
        elif isinstance(content, list) and content:
            turns.append((role, [_part(row, media, f"{where}.content[{i}]", part) for i, part in enumerate(content)]))
        else:
            raise row.wrong(f"{where}.content", content, "a text or a list of parts")
    return turns


def _part(row: Row, media: MediaReader, name: str, part: Any) -> str | Clip | Slot:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise row.wrong(name, part, "a text or an object with type")
    said = {key: value for key, value in part.items() if value is not None}
    type_ = said.pop("type", None) or next((key for key in ("text", *MEDIA_KINDS) if key in said), None)
    if type_ in ("text", "input_text"):
        if not isinstance(said.get("text"), str) or len(said) > 1:
            raise row.wrong(name, part, "a text part: type and text")
        return said["text"]
    kind = str(type_).removeprefix("input_").removesuffix("_url")
    if kind not in MEDIA_KINDS:
        raise row.wrong(f"{name}.type", type_, f"text, {', '.join(MEDIA_KINDS)}")
    if not said:
        return Slot(kind=kind)
    if isinstance(sound := said.get("input_audio"), dict):  # OpenAI's: bare base64
        said = {"audio": f"data:audio/{sound.get('format')};base64,{sound.get('data')}"}
    return media.clip(row, kind, name, said)


def _pop_response(turns: list[tuple[str, Content]], row: Row) -> str | None:
    """The last message, if it is the assistant's: what the others lead to."""
    if not turns or turns[-1][0] != "assistant":
        return None
    content = turns.pop()[1]
    if not all(isinstance(part, str) for part in content) or not "".join(map(str, content)).strip():
        raise row.error("the last message of the assistant has no text, or media; a response is text")
    return "".join(map(str, content))


def _optional(row: Row, name: str) -> str | None:
    return None if row.get(name) is None else row.text(name)


def _thought(row: Row, name: str) -> str | None:
    """A column of demonstrated thoughts, which is empty in rows that have none."""
    got = row.get(name)
    return None if isinstance(got, str) and not got.strip() else _optional(row, name)


def _optional_list(row: Row, name: str) -> list[Any]:
    got = row.get(name)
    if got is not None and not isinstance(got, list):
        raise row.wrong(name, got, "a list of texts")
    return got or []


def name_of(row: Row, format_name: str) -> str:
    """The id of a row. One of ours must have it; the others' are their number in the file where they have none.

    Raises:
        RowError: ours has none, or one that is no text and no whole number.
    """
    column = "id" if "id" in row.columns or format_name == "own" else "problem_id"
    got = row.get(column)
    if got is None and format_name != "own":
        return str(row.number)
    return str(got) if isinstance(got, int) and not isinstance(got, bool) else row.text(column)
