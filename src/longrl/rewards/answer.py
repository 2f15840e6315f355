"""Is the answer right? Option letters for choice questions, normalised exact match for open ones."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from longrl.rewards.format import parse_answer
from longrl.types import Example, Rollout

_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?:[).:]|$))\s*(.*)", re.DOTALL)
# A second option on offer: " or C", ", (C)", "/ C." or another marker such as " C)".
_SECOND = re.compile(r"(?:\b(?:or|and)\b|[,/;&])\s*\(?[A-Za-z](?:[).:]|\s*$)|(?:^|\s)\(?[A-Z]\)")
_TOKEN = re.compile(r"(?:(?<!\S)-)?\d+(?:,\d{3})*(?:\.\d+)?|\w+")
_ARTICLES = frozenset(("a", "an", "the"))


def answer_reward(example: Example, rollout: Rollout) -> float | None:
    """1.0 if the answer tag holds the truth, else 0.0 (also without a tag); None if the example has no truth.

    Choice questions accept the letter as "B", "b", "(B)", "B.", "B:" or "B) text"; naming two options is wrong. Open
    questions compare `normalise`d texts.

    Raises:
        ValueError: The truth of a choice question is not an option letter.
    """
    if example.answer is None:
        return None
    said = parse_answer(rollout.text)
    if example.kind != "choice":
        return float(said is not None and _same(said, example.answer))
    truth = parse_letter(example.answer)
    if truth is None:
        raise ValueError(
            f"example {example.id}: the truth of a choice question must be an option letter, got {example.answer!r}"
        )
    return float(said is not None and parse_letter(said) == truth)


def parse_letter(text: str) -> str | None:
    """The one option letter that `text` names, in upper case; None if it names none or several."""
    match = _LETTER.fullmatch(text.strip())
    if match is None or _SECOND.search(match[3]):
        return None
    return (match[1] or match[2]).upper()


def normalise(text: str) -> tuple[str | Decimal, ...]:
    """Words and numbers of `text`, without case, punctuation, articles, thousands separators and spacing.

    "The  Red Circle." -> ("red", "circle"); "1,000" and "1000.0" -> (Decimal(1000),).
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    words = [word for word in _TOKEN.findall(folded) if word not in _ARTICLES]
    return tuple(
        Decimal(word.replace(",", "")) if re.fullmatch(r"-?[\d,]*\d(\.\d+)?", word) else word for word in words
    )


def _same(said: str, truth: str) -> bool:
    wanted = normalise(truth)
    if not wanted:  # nothing but articles or punctuation: then those are the answer
        return said.strip().casefold() == truth.strip().casefold()
    return normalise(said) == wanted
