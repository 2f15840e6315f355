"""Rewards of the kinds of examples that are not choice questions, and penalties, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrl.rewards.maths import math_reward
from longrl.rewards.penalties import length_reward, repetition_reward
from longrl.rewards.quantity import grounding_reward, number_reward, parse_number, parse_span, regression_reward
from longrl.rewards.text import common, edits, ocr_reward, rouge_reward
from longrl.types import Example, Rollout

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


def rollout(text: str = "", tokens: tuple[int, ...] = ()) -> Rollout:
    return Rollout(token_ids=tokens, logprobs=(0.0,) * len(tokens), text=text, finish_reason="stop", policy_version=0)


def near(value: float | None):
    """Equal up to the rounding of a few operations."""
    return None if value is None else pytest.approx(value, abs=1e-15)


def example(answer: str | None) -> Example:
    return Example(id="q7", messages=(), answer=answer, kind="open")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[
            ("5", 5),
            ("5.", 5),
            ("-3.5", -3.5),
            ("\u22123", -3),
            ("+7", 7),
            (".5", 0.5),
            ("1,000", 1000),
            ("12,345.5", 12345.5),
        ],
        *[
            ("1e3", 1000),
            ("1e-3", 0.001),
            ("1/2", 0.5),
            ("3 / 4", 0.75),
            ("$5", 5),
            ("50%", 50),
            ("12 people", 12),
            ("5m", 5),
        ],
        *[
            ("about 5", 5),
            ("(5)", 5),
            ("**5**", 5),
            ("\\boxed{7}", 7),
            ("x = -4", -4),
            ("2 + 3 = 5", 5),
            ("The answer is 5.", 5),
        ],
        *[("There are 3 dogs and 2 cats, so the answer is 5.", 5), ("5 and 5.0", 5), ("<|im_end|>5", 5)],
        *[
            (text, None)
            for text in ("", "five", "5 or 6", "3-4", "5 - 3", "10:30", "1,5", "1.2.3", "B12", "1/0", "3 of 4", "5?")
        ],
        *[
            (text, None)
            for text in ("not 5", "more than 5", "at least 5", "> 5", "\\boxed{7} \\boxed{8}", "9" * 50, "1e999", "5 6")
        ],
        *[(text, None) for text in ("<|im_end|>", "isn't 5", "nan", "inf", "answer: 5, answer: 6")],
        *[("2*3 = 6", 6), ("2\u00d73 = 6", 6), ("5 km", 5), ("5!", 5)],
        *[
            (text, None)
            for text in ("0x10", "5k", "5 thousand", "2 million", "a dozen: 5", "minus 5", "- 5", "maybe 5", "5+")
        ],
        *[
            (text, None)
            for text in ("2*3", "2 \u00d7 3", "5\u00b2", "\u00b2", "2^3", "sqrt(5)", "\u221a5", "5.0.0", "10^2")
        ],
    ],
)
def test_parse_number(text, number):
    found = parse_number(text)
    assert (None if found is None else float(found)) == number


@pytest.mark.parametrize(
    ("said", "truth", "options", "value"),
    [
        ("3.14", "3.14", {}, 1.0),
        ("3.141", "3.1449", {}, 1.0),  # both 3.14
        ("3.14", "3.15", {}, 0.0),
        ("0.125", "0.12", {}, 1.0),  # half to even
        ("0.135", "0.14", {}, 1.0),
        ("104", "100", {}, 0.0),
        ("104", "100", {"tolerance": 0.05}, 1.0),
        ("106", "100", {"tolerance": 0.05}, 0.0),
        ("-104", "-100", {"tolerance": 0.05}, 1.0),
        ("3.4", "3", {"decimals": 0}, 1.0),
        ("", "3", {}, 0.0),
        ("3", None, {}, None),
    ],
)
def test_number(said, truth, options, value):
    assert number_reward(example(truth), rollout(said), **options) == value


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        *[
            ("10", "10", 1.0),
            ("9", "10", 0.9),
            ("12.5", "10", 0.75),
            ("20", "10", 0.0),
            ("500", "10", 0.0),
            ("-10", "10", 0.0),
        ],
        *[
            ("-9", "-10", 0.9),
            ("0", "0", 1.0),
            ("0.1", "0", 0.0),
            ("", "10", 0.0),
            ("9 or 10", "10", 0.0),
            ("10", None, None),
        ],
    ],
)
def test_regression(said, truth, value):
    assert regression_reward(example(truth), rollout(said)) == (
        None if value is None else pytest.approx(value, abs=1e-15)
    )


@pytest.mark.parametrize(
    ("text", "span"),
    [
        *[("12.5 to 20", (12.5, 20)), ("[12.5, 20]", (12.5, 20)), ("5-10", (5, 10)), ("from 5s to 10s", (5, 10))],
        *[("0:12 - 0:20.5", (12, 20.5)), ("01:00:00-01:00:10", (3600, 3610)), ("<|im_end|>1 to 2", (1, 2))],
        *[
            (text, None)
            for text in ("", "5", "20 to 10", "5 to 5", "5, 10, 15", "5 or 10", "1:75 to 2:00", "not 5 to 10")
        ],
        *[(text, None) for text in ("-5 to 10", "[-5, 10]", "12.5.3 to 20", "from -5 to 10")],
    ],
)
def test_parse_span(text, span):
    assert parse_span(text) == span


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        *[("10 to 20", "10 to 20", 1.0), ("15 to 25", "10 to 20", 5 / 15), ("12 to 14", "10 to 20", 0.2)],
        *[("0 to 100", "10 to 20", 0.1), ("20 to 30", "10 to 20", 0.0), ("30 to 40", "10 to 20", 0.0)],
        *[("0:10 to 0:20", "10 to 20", 1.0), ("", "10 to 20", 0.0), ("15", "10 to 20", 0.0), ("1 to 2", None, None)],
    ],
)
def test_grounding(said, truth, value):
    assert grounding_reward(example(truth), rollout(said)) == (
        None if value is None else pytest.approx(value, abs=1e-15)
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(*[st.integers(0, 50)] * 4)
def test_grounding_counts_seconds(a, b, c, d):
    """The twin: whole seconds, one by one."""
    if a >= b or c >= d:
        return
    ours, theirs = set(range(a, b)), set(range(c, d))
    expected = len(ours & theirs) / (max(b, d) - min(a, c)) if ours & theirs else 0.0
    assert grounding_reward(example(f"{c} to {d}"), rollout(f"{a} to {b}")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reward", [number_reward, regression_reward, grounding_reward])
def test_a_truth_that_cannot_be_read_is_an_error(reward):
    with pytest.raises(ValueError, match="example q7: the truth must be a"):
        reward(example("blue"), rollout("5"))


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        ("EXIT ONLY", "EXIT ONLY", 1.0),
        ("EXIT  ONLY\n", "EXIT ONLY", 1.0),
        ("EXIT", "EXIT ONLY", 0.5),  # one deleted of two
        ("EXIT NOW ONLY", "EXIT ONLY", 0.5),  # one inserted
        ("EXIT NEVER", "EXIT ONLY", 0.5),  # one replaced
        ("exit only", "EXIT ONLY", 0.0),
        ("ONLY EXIT", "EXIT ONLY", 0.0),  # two edits
        ("a b c d", "a x c d", 0.75),
        ("a b c d e f g h", "a b c", 0.0),
        ("", "EXIT", 0.0),
        ("<think>EXIT</think>", "EXIT", 0.0),
        ("x", None, None),
    ],
)
def test_ocr(said, truth, value):
    assert ocr_reward(example(truth), rollout(said)) == value


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        ("The cat sat.", "the cat sat", 1.0),
        # 1: the, sat, down of 4 and 4 -> 3/4; 2: sat down -> 1/3; L: the sat down -> 3/4
        ("the dog sat down", "the cat sat down", (3 / 4 + 1 / 3 + 3 / 4) / 3),
        # 1: all of 3 and 2 -> 2 * 2 / 5; 2: none; L: one -> 2 / 5
        ("b a c", "a b", (4 / 5 + 0 + 2 / 5) / 3),
        # a word counts as often as both have it: 1 of 4 and 2 -> 2 / 6; pairs: none; L: 2 / 6
        ("a a a a", "a b", (2 / 6 + 0 + 2 / 6) / 3),
        ("cat", "cat", 1.0),  # no pairs to compare
        ("the cat", "cat", (2 / 3 + 2 / 3) / 2),
        ("", "cat", 0.0),
        ("dog", "cat", 0.0),
        ("x", None, None),
    ],
)
def test_rouge(said, truth, value):
    assert rouge_reward(example(truth), rollout(said)) == near(value)


def slow_common(a: list[str], b: list[str]) -> int:
    """By the definition: the longest subsequence of one that is one of the other."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + slow_common(a[:-1], b[:-1])
    return max(slow_common(a[:-1], b), slow_common(a, b[:-1]))


def slow_edits(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(slow_edits(a[:-1], b) + 1, slow_edits(a, b[:-1]) + 1, slow_edits(a[:-1], b[:-1]) + (a[-1] != b[-1]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_distances_equal_their_definitions(a, b):
    assert common(a, b) == slow_common(a, b)
    assert edits(a, b) == slow_edits(a, b)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(WORDS, WORDS)
def test_text_rewards_lie_between_0_and_1_and_are_1_for_the_truth(said, truth):
    for reward in (ocr_reward, rouge_reward):
        if truth:
            value = reward(example(" ".join(truth)), rollout(" ".join(said)))
            assert value is not None
            assert 0 <= value <= 1
            assert (value == 1) == (said == truth)


@pytest.mark.parametrize(("reward", "truth"), [(rouge_reward, "?!"), (ocr_reward, "  ")])
def test_a_truth_without_words_is_an_error(reward, truth):
    with pytest.raises(ValueError, match="example q7: the truth holds no words"):
        reward(example(truth), rollout("x"))


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (900, -1.0)],
)
def test_length(tokens, value):
    got = length_reward(example("x"), rollout(tokens=(1,) * tokens), max_tokens=100, buffer_tokens=20)
    assert got == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_length_refuses_a_buffer_that_does_not_fit(buffer):
    with pytest.raises(ValueError, match=f"buffer_tokens is {buffer} with max_tokens 100"):
        length_reward(example("x"), rollout(), max_tokens=100, buffer_tokens=buffer)


@pytest.mark.parametrize(
    ("tokens", "ngram", "value"),
    [
        ((), 2, 0.0),
        ((1,), 2, 0.0),
        ((1, 2, 3, 4), 2, 0.0),
        ((1, 1, 1, 1), 2, -2 / 3),  # three pairs, one of a kind
        ((1, 2, 1, 2, 1), 2, -0.5),  # 12 21 12 21
        ((7,) * 119, 20, -0.99),  # a hundred runs, one of a kind
        ((1, 2, 2), 1, -1 / 3),
    ],
)
def test_repetition(tokens, ngram, value):
    assert repetition_reward(example("x"), rollout(tokens=tokens), ngram=ngram) == pytest.approx(value, abs=1e-15)


def test_repetition_needs_a_length():
    with pytest.raises(ValueError, match="ngram is 0"):
        repetition_reward(example("x"), rollout(), ngram=0)


@pytest.mark.parametrize(
    ("truth", "said", "value"),
    [
        *[
            ("1/2", "0.5", 1),
            ("1/2", "\\boxed{\\frac{2}{4}}", 1),
            ("0.5", "$\\frac12$", 1),
            ("5", "The answer is 5.", 1),
        ],
        *[("x^2+x", "x(x+1)", 1), ("x^2+x", "<answer>$x(x+1)$</answer>", 1), ("2", "$\\sin^2 x+\\cos^2 x+1$", 1)],
        *[
            ("\\frac{\\pi}{4}", "$\\pi/4$", 1),
            ("\\{1,2\\}", "$\\{2,1\\}$", 1),
            ("(1,2)", "(1, 2)", 1),
            ("50%", "0.5", 1),
        ],
        *[
            ("5", text, 0)
            for text in ("", "6", "-5", "five", "<|im_end|>", "5 or 6", "5, 6", "6 5", "1 2 3 4 5", "4\n5", "5?")
        ],
        *[
            ("5", text, 0)
            for text in ("\\boxed{5} \\boxed{6}", "$3$ $4$ $5$", "between 4 and 5", "5 of 6 things", "maybe 5")
        ],
        *[("5", text, 0) for text in ("<think>5</think>", "<think>5", "<answer>5</answer><answer>6</answer>", "not 5")],
        *[("5", text, 0) for text in ("\\ne 5", "$x \\neq 5$", "\u2260 5")],
        *[("x+1", "$x+1$ and $x+2$", 0), ("(1,2)", "(2,1)", 0), ("x^2", "x^3", 0), (None, "5", None)],
    ],
)
def test_math(truth, said, value):
    assert math_reward(example(truth), rollout(said)) == value


def test_math_needs_an_expression():
    with pytest.raises(ValueError, match="example q7: the truth is not a mathematical expression, got 'the blue one'"):
        math_reward(example("the blue one"), rollout("5"))


@pytest.mark.parametrize("text", ["", " ", "<|im_end|>", "<|im_end|><|im_end|>", "<think>", "<answer></answer>"])
def test_an_empty_response_earns_nothing(text):
    for reward, truth in [
        *[(number_reward, "5"), (regression_reward, "5"), (grounding_reward, "1 to 2"), (rouge_reward, "a cat")],
        *[(ocr_reward, "STOP"), (math_reward, "x+1")],
    ]:
        value = reward(example(truth), rollout(text))
        assert value is not None
        assert value == 0.0
        assert math.isfinite(value)
