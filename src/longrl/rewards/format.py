"""The shape of a response: `<think>...</think>` followed by `<answer>...</answer>`."""

from __future__ import annotations

import re

from longrl.types import Example, Rollout

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def format_reward(example: Example, rollout: Rollout) -> float:
    """1.0 if the whole response is one thought followed by one answer, with nothing before, between or after; else 0.0.

    Reference: DeepSeek-R1, arXiv 2501.12948, section 2.2.2 (format rewards).
    """
    # Each tag exactly once, in this order, leaves no room for nesting.
    once = all(rollout.text.count(tag) == 1 for tag in _TAGS)
    return 1.0 if once and _WHOLE.fullmatch(rollout.text) else 0.0


def parse_answer(text: str) -> str | None:
    """The text in the answer tag, stripped; None if there is none after the thought, or more than one, or the thought
    is not finished."""
    said = text.rpartition("</think>")[2]
    if "<think>" in said or said.count("<answer>") != 1 or said.count("</answer>") != 1:
        return None
    match = re.search(r"<answer>(.*)</answer>", said, re.DOTALL)
    return match[1].strip() if match else None


def parse_thought(text: str) -> str | None:
    """The text between the first `<think>` and the last `</think>`, stripped; None if there is no such pair."""
    match = re.search(r"<think>(.*)</think>", text, re.DOTALL)
    return match[1].strip() if match else None
