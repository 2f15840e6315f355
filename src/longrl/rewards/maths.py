"""Answers that are mathematical expressions, compared as such by math-verify."""

from __future__ import annotations

import importlib.util
import re

from longrl.rewards.answer import final_answer
from longrl.rewards.denial import is_denied, is_taken_back
from longrl.rewards.quantity import parse_number
from longrl.types import Example, Rollout

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_BOXED = re.compile(r"\\boxed\s*(\{.*?\}+)")
_DOLLARS = re.compile(r"\$+([^$]+)\$+")
_CUE = re.compile(r"\banswer(?: is|:| is:)", re.I)
_PROSE = re.compile(r"(?<!\\)\b[a-z]{4,}", re.I)
_OTHERS = re.compile(r"\?|\\neq?\b|\u2260|\b(?:or|not|\w+n't)\b", re.I)
_SENTENCES = re.compile(r"\n|[.!;]\s+\S")


def math_reward(example: Example, rollout: Rollout) -> float | None:
    """1.0 if the answer equals the true expression ("1/2", "\\frac{2}{4}", "x(x+1)" and "x^2+x"), else 0.0.

    None without a truth. Parsing and simplifying can take for ever, so this has no time limit of its own and always
    runs in a worker process (pool.py).

    Raises:
        ValueError: The truth is not an expression.
    """
    from math_verify import parse, verify

    if example.answer is None:
        return None
    truth = parse(_delimited(example.answer), parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not truth:
        raise ValueError(f"example {example.id}: the truth is not a mathematical expression, got {example.answer!r}")
    said = final_answer(rollout)
    if said is None or (_is_unsure(said) and not _is_unsure(example.answer)):
        return 0.0
    said = _CUE.split(said)[-1]
    if not _is_one(said):
        return 0.0
    parsed = parse(_delimited(said), parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(truth, parsed, timeout_seconds=None))


def is_plain_number(truth: str) -> bool:
    """Whether it is an expression for sure, without a look at what it takes long to parse."""
    return re.fullmatch(r"-?\d+(\.\d+)?", truth) is not None


def require_math_verify() -> None:
    """Raises ValueError where math-verify is not installed; imports nothing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("the reward math needs math-verify, which is not installed: pip install 'longrl[math]'")


def _is_unsure(text: str) -> bool:
    """Whether it names alternatives, or denies or takes back what it says."""
    return bool(_OTHERS.search(text)) or is_denied(text) or is_taken_back(text)


def _is_one(said: str) -> bool:
    """Whether there is one expression to compare: math-verify would take the last of several."""
    if "\\boxed" in said:
        return len(set(_BOXED.findall(said))) == 1
    if marked := _DOLLARS.findall(said):
        return len(set(marked)) == 1
    return parse_number(said) is not None if _PROSE.search(said) else not _SENTENCES.search(said.strip())


def _delimited(text: str) -> str:
    """An expression that stands alone, in dollars, as math-verify wants it; sentences as they are."""
    return text if _MARKED.search(text) or _PROSE.search(text) else f"${text}$"
