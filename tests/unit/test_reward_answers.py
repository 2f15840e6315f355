"""What a response answers: the format, the one option, the exact answer."""

import dataclasses
from decimal import Decimal

import pytest

from longrl.rewards import format_reward, parse_answer, parse_thought
from longrl.rewards.answer import normalise
from longrl.rewards.choice import choice_reward
from tests.unit.test_rewards import answered, example, right, rollout


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>B</answer>",
        "  <think>\na\n\nb\n</think>\n<answer>\nB\n</answer>\n",
        "<think></think><answer></answer>",
    ],
)
def test_format_accepts(text):
    assert format_reward(example(), rollout(text)) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "<answer>B</answer>",
        "<think>a</think>",
        "<think>a</think><answer>B",
        "<think>a<answer>B</answer></think>",
        "<answer>B</answer><think>a</think>",
        "<think>a</think>so<answer>B</answer>",
        "Sure. <think>a</think><answer>B</answer>",
        "<think>a</think><answer>B</answer> done",
        "<think>a</think><answer>A</answer><answer>B</answer>",
        "<think>a<think>b</think></think><answer>B</answer>",
        "<think>a</think><answer><answer>B</answer></answer>",
        "<think>a</think><answer>B</answer><think>b</think><answer>C</answer>",
        "<think>a<answer></think><answer>B</answer>",
        "<THINK>a</THINK><answer>B</answer>",
        "</think>a<think></answer>B<answer>",
    ],
)
def test_format_refuses(text):
    assert format_reward(example(), rollout(text)) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer> B </answer>", "B"),
        ("<answer>red\ncircle</answer>", "red\ncircle"),
        ("<think>is it <answer>A</answer>?</think><answer>B</answer>", "B"),
        ("<answer></answer>", ""),
        ("B", None),
        ("<think><answer>B</answer></think>", None),
        ("<think>a</think><answer>A</answer><answer>B</answer>", None),
        ("<think>a</think></answer>B<answer>", None),
        ("<think>a</think><answer>B", None),
        ("<think>maybe <answer>B</answer> or", None),
        ("<think>a</think><think>or <answer>B</answer>", None),
        ("thought before</think><answer>B</answer>", "B"),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer


def test_parse_thought():
    assert parse_thought("<think> one\ntwo </think><answer>B</answer>") == "one\ntwo"
    assert parse_thought("<think>unfinished") is None


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "(b)", "B.", "B)", "B:", "B) text", "B. the blue one", " B \n"])
def test_choice_accepts(answer):
    assert right(example("B"), rollout(answered(answer))) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["A", "", "A or B", "B or A", "B) or C)", "B, C", "B/C", "(B) and (C)", "B) x C) y", "not B", "Blue", "BB", "B C"],
)
def test_choice_refuses(answer):
    assert right(example("B"), rollout(answered(answer))) == 0.0


def test_choice_text_may_hold_single_letters():
    assert right(example("B"), rollout(answered("B) a walk or a swim"))) == 1.0
    assert right(example("C"), rollout(answered("C. vitamin C"))) == 1.0


@pytest.mark.parametrize("text", ["B", "<think>a</think>B"])
def test_without_an_answer_tag_all_that_follows_the_thought_counts(text):
    assert right(example("B"), rollout(text)) == 1.0
    assert right(example("B", "open"), rollout(text)) == 1.0
    cut = dataclasses.replace(rollout(text), finish_reason="length")
    assert right(example("B"), cut) == right(example("B", "open"), cut) == 0.0


@pytest.mark.parametrize("text", ["<think>B</think>", "<think>B", "<answer>B", "<answer>B</answer><answer>B</answer>"])
def test_what_cannot_be_parsed_is_wrong(text):
    assert right(example("B"), rollout(text)) == 0.0
    assert right(example("B", "open"), rollout(text)) == 0.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("The  Red Circle.", "red circle"),
        ("red-circle", "red circle"),
        ("5", "5.0"),
        ("1,000", "1000"),
        ("-3.50", "-3.5"),
        ("5 circles", "5.0 circles"),
        ("the", "The"),
        ("It\u2019s over!", "its over"),
        ("\uff15", "5"),
        ("CAFÉ", "café"),
    ],
)
def test_open_accepts(answer, truth):
    assert right(example(truth, "open"), rollout(answered(answer))) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("red", "red circle"), ("circle red", "red circle"), ("5.1", "5"), ("-5", "5"), ("", "red"), ("an", "the")],
)
def test_open_refuses(answer, truth):
    assert right(example(truth, "open"), rollout(answered(answer))) == 0.0


def test_normalise_as_documented():
    assert normalise("The  Red Circle.") == ("red", "circle")
    assert normalise("1,000") == normalise("1000.0") == (Decimal(1000),)


def test_without_a_truth_there_is_no_score():
    assert right(example(None), rollout(answered("B"))) is None


def test_choice_truth_must_be_a_letter():
    with pytest.raises(
        ValueError, match="example q7: the truth of a choice question must be an option letter, got 'blue'"
    ):
        choice_reward(example("blue"), rollout(answered("B")))
