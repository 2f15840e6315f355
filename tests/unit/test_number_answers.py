"""Questions whose answer is a number or an expression: what a response states. See number_answers.yaml."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from longrl.rewards.maths import math_reward
from longrl.rewards.quantity import number_reward, regression_reward
from longrl.types import Example, Rollout

TABLE = yaml.safe_load(Path(__file__).with_name("number_answers.yaml").read_text(encoding="utf-8"))
HARD = {kind: [text for row in TABLE[kind]["hard"] for text in row["responses"]] for kind in TABLE}
CLEAR = {kind: [(truth, text) for truth, texts in TABLE[kind]["clear"] for text in texts] for kind in TABLE}
REWARDS = {"number": number_reward, "math": math_reward}
EXPRESSIONS = ["x^2", "x^3"]


def reward(kind: str, truth: str, text: str) -> float | None:
    rollout = Rollout(token_ids=(), logprobs=(), text=text, finish_reason="stop", policy_version=0)
    return REWARDS[kind](Example(id="q", messages=(), answer=truth, kind="number"), rollout)


def test_the_table_is_as_large_as_claimed():
    hard, clear = (sum(map(len, rows.values())) for rows in (HARD, CLEAR))
    page = " ".join((Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8").split())
    assert f"{hard} that earn nothing, and {clear} that" in page
    assert all(len(set(rows)) == len(rows) for kind in TABLE for rows in (HARD[kind], CLEAR[kind]))


def numbers(text: str) -> list[str]:
    """All that it might be taken to say."""
    return [*re.findall(r"\d+", text), "25", "-5", "5000", "3"]


def test_hard_numbers_earn_nothing_whatever_the_truth():
    wrong = {text: [truth for truth in numbers(text) if reward("number", truth, text)] for text in HARD["number"]}
    assert {text: truths for text, truths in wrong.items() if truths} == {}


def test_hard_numbers_are_not_near_either():
    rollouts = [
        Rollout(token_ids=(), logprobs=(), text=t, finish_reason="stop", policy_version=0) for t in HARD["number"]
    ]
    example = Example(id="q", messages=(), answer="5", kind="number")
    assert {one.text for one in rollouts if regression_reward(example, one)} == set()


def test_hard_expressions_earn_nothing_whatever_the_truth():
    wrong = {text: [truth for truth in EXPRESSIONS if reward("math", truth, text)] for text in HARD["math"]}
    assert {text: truths for text, truths in wrong.items() if truths} == {}


@pytest.mark.parametrize("kind", TABLE)
def test_clear_answers_earn_the_reward(kind):
    assert [row for row in CLEAR[kind] if reward(kind, *row) != 1.0] == []


@pytest.mark.parametrize("between", [". ", "\n", " or ", ", ", "; ", ". No, ", ". Wait: ", " and ", ". Actually, "])
def test_two_clear_answers_that_differ_earn_nothing(between):
    """But for the second, if it alone is said to be the answer: "5 seconds. The answer is 8."."""
    texts = [text for _, text in CLEAR["number"] if "5" in text and "<" not in text and not re.search(r"\d.*\d", text)]
    wrong = []
    for first, second in itertools.product(texts, texts):
        text = first + between + second.replace("5", "8")
        allowed = "8" if _STATED.search(second) and not _STATED.search(first) else ""
        if awarded := [truth for truth in "58" if reward("number", truth, text) and truth not in allowed]:
            wrong.append((text, awarded))
    assert wrong == []


_STATED = re.compile(r"answer|=|\\boxed", re.IGNORECASE)
