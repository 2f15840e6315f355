"""Answers that are numbers or spans of time: equal, near, or how much they overlap."""

from __future__ import annotations

import re
from fractions import Fraction

from longrl.rewards.answer import final_answer, plain
from longrl.rewards.denial import is_denied, is_taken_back
from longrl.types import Example, Rollout

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40}"
_NUMBER = (
    rf"(?<![\w.,/])(?<!\d:)(?:(?<![\d)])[-+\u2212])?(?:{_DIGITS})(?:[eE][-+]?\d{{1,2}}|\s*/\s*[1-9]\d{{0,39}})?"
    r"(?![\d/]|[.,:]\d|[eE][-+]?\d)"
)
_NUMBERS = re.compile(_NUMBER)
_STATED = re.compile(
    rf"(?:\banswer\s*(?:is|:|=)|=)\s*(?:(?:about|approximately|around|is|\u2248|:)\s*)?({_NUMBER})", re.I
)
# Bounds, alternatives and suppositions hold numbers that are no answer.
_NOT_IT = re.compile(
    r"\?|[<>\u2264\u2265\u2260]|\b(?:not|or|is no|(?:more|less|fewer|other) than|at (?:least|most)|\w+n't)\b"
    r"|\b(?:if|suppos\w+|assum\w+|imagine)\b"
    r"|\b(?:no|almost|nearly|under|over|below|above|beyond|up to|as (?:many|few|much) as|after|before)\s+\d",
    re.I,
)
_TIME = re.compile(r"(?<![\w.:])(?:\d{1,9}(?::[0-5]?\d){1,2}|\d{1,9})(?:\.\d{1,9})?(?![\d:]|\.\d)")
_BEFORE_ZERO = re.compile(r"(?:^|[\[(,]|\bto|\bfrom)\s*[-\u2212]\s*\d")
# Numbers that are a part of another one: "5 thousand", "5k", "minus 5", "- 5", "5+", "0x10", "5th", "twice 5".
_PART = re.compile(
    r"\b(?:minus|negative|hundreds?|thousands?|[mbt]r?illions?|dozens?|squared|cubed|factorial|twice|double|triple|half)\b"
    r"|\d\s?(?-i:[kKM]|bn)\b|\d(?:th|st|nd|rd|[ixy])\b|\b0[xX]|^[-\u2212]\s|\d\+(?!\s*\d)",
    re.I,
)
# Sums that are not done, as written: `plain` would make 23 of 2*3 and 52 of 5\u00b2.
# After an answer, what it comes from: "5, since 2 + 3 is that".
_BECAUSE = re.compile(r"\((?!\s*[-+]?[\d.,]+\s*\))|\b(?:because|since|as|given|where|from)\b", re.I)
_UNDONE = re.compile(r"\d\s*[*\u00d7\u00f7^]\s*\d|[\u00b2\u00b3\u00b9\u2070-\u207f\u221a]|\b(?:sqrt|log|ln|exp)\b")


def number_reward(example: Example, rollout: Rollout, *, decimals: int = 2, tolerance: float = 0.0) -> float | None:
    """1.0 if the answer is the true number when both are rounded, or near enough, else 0.0; None without a truth.

    Reference: Video-R1, arXiv 2503.21776 (numerical questions). Differs: rounds exactly, half to even; a unit or a
    sentence around one number is read over.

    Args:
        decimals: digits after the point that are compared.
        tolerance: of the truth, what the answer may be away from it.

    Raises:
        ValueError: The truth is not a number.
    """
    truth = number_of(example)
    if truth is None:
        return None
    said = _said_number(rollout)
    if said is None:
        return 0.0
    return float(
        round(said, decimals) == round(truth, decimals) or abs(said - truth) <= Fraction(tolerance) * abs(truth)
    )


def regression_reward(example: Example, rollout: Rollout) -> float | None:
    """1 - |said - truth| / |truth|, at least 0; 0.0 without a number; None without a truth. A truth of 0 must be met.

    Reference: Video-R1, arXiv 2503.21776 (regression questions). Differs: no 1e-9 in the quotient.

    Raises:
        ValueError: The truth is not a number.
    """
    truth = number_of(example)
    if truth is None:
        return None
    said = _said_number(rollout)
    if said is None:
        return 0.0
    return float(max(0, 1 - abs(said - truth) / abs(truth))) if truth else float(said == truth)


def grounding_reward(example: Example, rollout: Rollout) -> float | None:
    """Intersection over union of the answered span and the true one, in time; 0.0 without a span; None without a truth.

    Raises:
        ValueError: The truth is not a span.
    """
    truth = span_of(example)
    if truth is None:
        return None
    text = final_answer(rollout)
    said = None if text is None else parse_span(text)
    if said is None:
        return 0.0
    both = min(said[1], truth[1]) - max(said[0], truth[0])
    return max(0.0, both) / (max(said[1], truth[1]) - min(said[0], truth[0])) if both > 0 else 0.0


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states: "1,000", "-3.5", "1/2", "$5", "12 people", "2 + 3 = 5", "The answer is 5.".

    None: no number, several ("5 or 6", "3-4", "10:30", "The answer is 5. It is 7."), a bound ("more than 5"), a denial
    ("not 5", "5 is wrong"), a doubt ("5, I guess"), or a part of a number or sum ("5 thousand", "2*3").
    """
    undone, text = _UNDONE.search(text), plain(text).replace("\u2212", "-")
    if _NOT_IT.search(text) or _PART.search(text) or is_denied(text):
        return None
    stated = [(match[1], match.end()) for match in _STATED.finditer(text)]
    if not stated and not undone:
        stated = [(match[0], match.end()) for match in _NUMBERS.finditer(text)]
    found, after = {_fraction(number) for number, _ in stated}, text[stated[-1][1] :] if stated else ""
    said_then = {_fraction(number) for number in _NUMBERS.findall(_BECAUSE.split(after)[0])}
    return found.pop() if len(found) == 1 and said_then <= found and not is_taken_back(after) else None


def parse_span(text: str) -> tuple[float, float] | None:
    """(start_s, end_s) of "12.5 to 20", "[12.5, 20]", "00:12 - 00:20.5"; None unless two times, the later one last."""
    text = plain(text)
    times = [_seconds(time) for time in _TIME.findall(text)]
    sure = not (_NOT_IT.search(text) or _BEFORE_ZERO.search(text) or is_denied(text) or is_taken_back(text))
    return (times[0], times[1]) if len(times) == 2 and times[0] < times[1] and sure else None


def number_of(example: Example) -> Fraction | None:
    """The true number; None if there is no truth. ValueError: it is not a number."""
    if example.answer is None:
        return None
    if (truth := parse_number(example.answer)) is None:
        raise ValueError(f"example {example.id}: the truth must be a number such as 12 or 3.5, got {example.answer!r}")
    return truth


def span_of(example: Example) -> tuple[float, float] | None:
    """The true (start_s, end_s); None if there is no truth. ValueError: it is not a span."""
    if example.answer is None:
        return None
    if (truth := parse_span(example.answer)) is None:
        raise ValueError(
            f"example {example.id}: the truth must be a span such as `12.5 to 20` (seconds) or `0:12 - 0:20`, "
            f"got {example.answer!r}"
        )
    return truth


def _said_number(rollout: Rollout) -> Fraction | None:
    said = final_answer(rollout)
    return None if said is None else parse_number(said)


def _fraction(number: str) -> Fraction:
    over, _, under = number.replace(",", "").partition("/")
    return Fraction(over.strip()) / (int(under) if under else 1)


def _seconds(time: str) -> float:
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
