"""What an adapter finds in a row -> `Example`: media at their marks, options, kind and truth, alike for all formats."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from longrl.data.adapters.row import Row, is_number, short
from longrl.rewards.quantity import parse_number, parse_span
from longrl.types import KINDS, Clip, Example, Message

_NAMES_OF_KINDS = {
    **{kind.replace("_", " "): kind for kind in KINDS},
    "multiple choice": "choice",
    "mcq": "choice",
    "open ended": "open",
    "openended": "open",
    "numerical": "number",
    "numeric": "number",
    "free form": "free_text",
}
"""What data call kinds, in lower case with spaces -> the kind."""

_PARSERS = {
    "number": (parse_number, "a number"),
    "regression": (parse_number, "a number"),
    "grounding": (parse_span, "seconds from and to, as 12.5 - 20"),
}
"""Kinds whose truth its reward has to read."""

_MARK = re.compile("(<image>|<video>|<audio>)")
_LETTERED = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])[.):](?=\s*\S)")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])(?:\)?[.:)]?|[.):]\s.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for the next media file of this kind."""

    kind: str


Content = list[str | Clip | Slot]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A row, in words that all formats share."""

    turns: list[tuple[str, Content]]
    """(role, content) of the prompt, without a system prompt of ours."""
    answer: Any
    """As the row has it; None: it has none."""
    answer_name: str = "answer"
    question_name: str = "question"
    """This, answer_name and kind_name: columns, for messages."""
    media: dict[str, list[Clip]] = field(default_factory=dict)
    """Kind -> files that belong at the marks `<kind>` of the text, in their order."""
    marks_required: bool = False
    """Without marks nothing says where media belong; else they go in front of the first question."""
    options: list[Any] = field(default_factory=list)
    kind: Any = None
    kind_name: str = "kind"
    category: str | None = None
    response: str | None = None


def build(draft: Draft, example_id: str, row: Row, system_prompt: str | None, default_kind: str | None) -> Example:
    """Raises RowError for whatever does not fit together."""
    if not draft.turns:
        raise row.error(f"{draft.question_name} has only a response, expected the user's message before it")
    if draft.turns[-1][0] != "user":
        raise row.error(f"{draft.question_name} ends with a message of the {draft.turns[-1][0]}, expected the user's")
    turns = _placed(draft, row)
    options = _options(draft.options, row)
    if options:
        _append(turns, options)
    asked = "\n".join(part for role, content in turns if role == "user" for part in content if isinstance(part, str))
    if not asked.strip():
        raise row.error(f"{draft.question_name} has no text to answer")
    answer = _answer(draft, row)
    letters = ascii_uppercase[: len(options)] or _letters(asked)
    kind = _kind(draft, default_kind, answer, letters, row)
    if answer is not None:
        answer = _checked(answer, kind, letters, draft.answer_name, row)
        if options:
            _require_one(options, answer, row)
    if system_prompt is not None:
        if any(role == "system" for role, _ in turns):
            raise row.error("it has a system message, and data.system_prompt is set too; remove one of them")
        turns.insert(0, ("system", [system_prompt]))
    messages = tuple(Message(role=role, content=tuple(p for p in content if p != "")) for role, content in turns)  # pyright: ignore[reportArgumentType]
    return Example(
        id=example_id,
        messages=messages,
        answer=answer,
        kind=kind,
        category=draft.category or "other",
        response=draft.response,
        extra=row.extra,
    )


# Media and marks


def _placed(draft: Draft, row: Row) -> list[tuple[str, Content]]:
    """The turns with every slot filled."""
    inline = any(isinstance(part, Clip) for _, content in draft.turns for part in content)
    if draft.media or not inline:  # a text beside media in parts of their own may speak of <video>
        turns = [(role, [one for part in content for one in _split(part)]) for role, content in draft.turns]
    else:
        turns = [(role, list(content)) for role, content in draft.turns]
    slots = [part.kind for _, content in turns for part in content if isinstance(part, Slot)]
    front: Content = []
    for kind in dict.fromkeys([*draft.media, *slots]):
        files, marks = draft.media.get(kind, []), slots.count(kind)
        if marks == 0 and not draft.marks_required:
            front += files
        elif marks != len(files):
            raise row.error(
                f"marks <{kind}> in {draft.question_name}: {marks}, {kind} files: {len(files)}; give one mark for each "
                f"file",
                "media_count",
            )
    waiting = {kind: iter(files) for kind, files in draft.media.items()}
    filled: list[tuple[str, Content]] = [
        (role, [next(waiting[part.kind]) if isinstance(part, Slot) else part for part in content])
        for role, content in turns
    ]
    first = next((content for role, content in filled if role == "user"), None)
    if first is None:
        raise row.error(f"{draft.question_name} has no user message, so there is nothing to answer")
    first[:0] = front
    return filled


def _split(part: str | Clip | Slot) -> Content:
    if not isinstance(part, str):
        return [part]
    return [Slot(kind=one[1:-1]) if _MARK.fullmatch(one) else one for one in _MARK.split(part) if one]


# Options, kind and truth


def _options(options: list[Any], row: Row) -> list[str]:
    """Each with its letter in front."""
    if not options:
        return []
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise row.error(f"options is {short(options)}, expected a list of texts")
    if len(options) not in range(2, len(ascii_uppercase) + 1):
        raise row.error(
            f"options has {len(options)} of them, expected 2 to {len(ascii_uppercase)}; an open question has none"
        )
    pairs = list(zip(ascii_uppercase, options, strict=False))
    lettered = all(re.match(rf"\s*\(?{letter}[.):]", option) for letter, option in pairs)
    return options if lettered else [f"{letter}. {option}" for letter, option in pairs]


def _require_one(options: list[str], letter: str, row: Row) -> None:
    """Refuses the right option if it is there twice; wrong ones may be."""
    texts = [re.sub(r"^\s*\(?[A-Z][.):]", "", option).strip() for option in options]
    right = texts[ascii_uppercase.index(letter)]
    if right and texts.count(right) > 1:  # letters alone may stand for what a picture shows
        raise row.error(
            f"options has the right one, {short(right)}, more than once, so that another letter is right too"
        )


def _append(turns: list[tuple[str, Content]], options: list[str]) -> None:
    """Options go below the question, unless it has all of them already."""
    content = turns[-1][1]
    text = "".join(part for part in content if isinstance(part, str))
    if not all(option.strip() in text for option in options):
        last = content.pop() if content and isinstance(content[-1], str) else ""
        content.append("\n".join([str(last), *options]))


def _letters(text: str) -> str:
    """Letters of options that a text has in it, as `A.`, `A)`, `(A)` or `A:`; "" unless they are A, B and so on."""
    found = {match[1] for match in _LETTERED.finditer(text)}
    letters = "".join(letter for letter in ascii_uppercase if letter in found)
    count = next((i for i, letter in enumerate(ascii_uppercase) if letter not in found), len(letters))
    return ascii_uppercase[:count] if count >= 2 else ""


def _kind(draft: Draft, default: str | None, answer: str | None, letters: str, row: Row) -> str:
    said, num_options = draft.kind, len(draft.options)
    if said is not None:
        plain = said.casefold().replace("-", " ").replace("_", " ").strip() if isinstance(said, str) else ""
        if plain not in _NAMES_OF_KINDS:
            raise row.wrong(draft.kind_name, said, f"one of {', '.join(KINDS)}", "unknown_kind")
        kind = _NAMES_OF_KINDS[plain]
    elif num_options or (answer is not None and (_letter(answer) or "?") in letters):
        kind = "choice"
    else:
        kind = default or "open"
    if num_options and kind != "choice":
        raise row.error(f"kind is {kind} with {num_options} options; remove them or set kind to choice")
    if kind == "choice" and not letters:
        raise row.error(
            "kind is choice with 0 options, and the question letters none (A. ..., B. ...); add options or set kind "
            "to open"
        )
    return kind


def _answer(draft: Draft, row: Row) -> str | None:
    """The truth as text, out of its tag."""
    got, name = draft.answer, draft.answer_name
    if got is None:
        return None
    if is_number(got):
        return str(got)
    if not isinstance(got, str) or not got.strip():
        raise row.wrong(name, got, "a text that is not empty", "no_answer")
    tags = _ANSWER.findall(got)
    if len(tags) != 1 and ("<answer>" in got or "</answer>" in got):
        raise row.error(f"{name} is {short(got)}, expected one <answer>...</answer> in it, or none", "no_answer")
    if not tags:
        return got
    if not tags[0].strip():
        raise row.error(f"{name} is {short(got)}, whose <answer> is empty", "no_answer")
    return tags[0].strip()


def _checked(answer: str, kind: str, letters: str, name: str, row: Row) -> str:
    """The truth in the form that rewards of its kind take."""
    if kind == "choice":
        letter = _letter(answer)
        if letter is None or letter not in letters:
            raise row.error(
                f"{name} is {short(answer)}, expected the letter of an option, one of {', '.join(letters)}", "no_answer"
            )
        return letter
    if kind in _PARSERS:
        parse, what = _PARSERS[kind]
        if parse(answer) is None:
            raise row.error(f"{name} is {short(answer)}, expected {what}, as kind is {kind}", "no_answer")
    return answer


def _letter(answer: str) -> str | None:
    match = _LETTER.fullmatch(answer.strip())
    return match[1] if match else None
