"""Rewards: the format, the answer, their weighted sum, and what happens when one cannot score."""

import logging
from decimal import Decimal

import pytest
import torch

from longrl.rewards import REWARDS, answer_reward, build_rewards, format_reward, parse_answer, parse_thought
from longrl.rewards.answer import normalise
from longrl.types import Example, Group, Message, Prompt, Rollout


def rollout(text: str) -> Rollout:
    return Rollout(token_ids=(1, 2), logprobs=(-0.1, -0.2), text=text, finish_reason="stop", policy_version=0)


def example(answer: str | None = "B", kind: str = "choice") -> Example:
    return Example(id="q7", messages=(Message(role="user", content=("?",)),), answer=answer, kind=kind)


def group(*texts: str, **kwargs) -> Group:
    prompt = Prompt(
        token_ids=torch.tensor([1]), position_ids=torch.zeros(1, 1, dtype=torch.int64), media=(), media_slots=()
    )
    return Group(id="g", example=example(**kwargs), prompt=prompt, rollouts=tuple(map(rollout, texts)))


def answered(answer: str) -> str:
    return f"<think>red, then blue.</think><answer>{answer}</answer>"


def raises_often(example: Example, rollout: Rollout) -> float:
    """Named in a configuration below as `package.module:attr`."""
    return 1.0 / (len(rollout.text) - 2)


def not_a_number(example: Example, rollout: Rollout) -> float:
    return float("nan")


def undecided(example: Example, rollout: Rollout) -> None:
    return None


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
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer


def test_parse_thought():
    assert parse_thought("<think> one\ntwo </think><answer>B</answer>") == "one\ntwo"
    assert parse_thought("<think>unfinished") is None


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "(b)", "B.", "B)", "B:", "B) text", "B. the blue one", " B \n"])
def test_choice_accepts(answer):
    assert answer_reward(example("B"), rollout(answered(answer))) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["A", "", "A or B", "B or A", "B) or C)", "B, C", "B/C", "(B) and (C)", "B) x C) y", "not B", "Blue", "BB", "B C"],
)
def test_choice_refuses(answer):
    assert answer_reward(example("B"), rollout(answered(answer))) == 0.0


def test_choice_text_may_hold_single_letters():
    assert answer_reward(example("B"), rollout(answered("B) a walk or a swim"))) == 1.0
    assert answer_reward(example("C"), rollout(answered("C. vitamin C"))) == 1.0


@pytest.mark.parametrize("text", ["B", "<think>B</think>", "<think>a</think>B", "<think>a"])
def test_no_answer_tag_is_wrong(text):
    assert answer_reward(example("B"), rollout(text)) == 0.0
    assert answer_reward(example("B", "open"), rollout(text)) == 0.0


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
    assert answer_reward(example(truth, "open"), rollout(answered(answer))) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("red", "red circle"), ("circle red", "red circle"), ("5.1", "5"), ("-5", "5"), ("", "red"), ("an", "the")],
)
def test_open_refuses(answer, truth):
    assert answer_reward(example(truth, "open"), rollout(answered(answer))) == 0.0


def test_normalise_as_documented():
    assert normalise("The  Red Circle.") == ("red", "circle")
    assert normalise("1,000") == normalise("1000.0") == (Decimal(1000),)


def test_without_a_truth_there_is_no_score():
    assert answer_reward(example(None), rollout(answered("B"))) is None


def test_choice_truth_must_be_a_letter():
    with pytest.raises(
        ValueError, match="example q7: the truth of a choice question must be an option letter, got 'blue'"
    ):
        answer_reward(example("blue"), rollout(answered("B")))


def test_weighted_sum():
    scored = build_rewards({"format": 0.1, "answer": 0.9})(
        group(answered("B"), answered("C"), "<answer>B</answer>", "B")
    )
    assert [one.reward for one in scored] == pytest.approx([1.0, 0.1, 0.9, 0.0], abs=1e-15)
    assert scored[1].rewards == {"format": 1.0, "answer": 0.0}
    assert [one.rollout.text for one in scored][3] == "B"


def test_a_part_that_cannot_score_makes_the_reward_none():
    scored = build_rewards({"format": 0.1, f"{__name__}:undecided": 0.9})(group(answered("B")))
    assert scored[0].reward is None
    assert scored[0].rewards == {"format": 1.0, f"{__name__}:undecided": None}


def test_a_part_of_weight_zero_is_only_watched():
    scored = build_rewards({"format": 1.0, f"{__name__}:undecided": 0.0})(group(answered("B")))
    assert scored[0].reward == 1.0


def test_a_reward_that_raises_is_counted_named_and_none(caplog):
    name = f"{__name__}:raises_often"
    rewards = build_rewards({name: 1.0})
    with caplog.at_level(logging.WARNING):
        scored = rewards(group("ab", "abc"))
    assert [one.reward for one in scored] == [None, 1.0]
    assert rewards.failures[name] == 1
    assert "example q7" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_reward_that_is_not_finite_is_a_failure():
    name = f"{__name__}:not_a_number"
    rewards = build_rewards({name: 1.0})
    assert rewards(group("x"))[0].reward is None
    assert rewards.failures[name] == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"anwser": 1.0}, "unknown reward 'anwser': expected one of answer, format; did you mean 'answer'"),
        ({"longrl.nowhere:reward": 1.0}, "cannot be imported: No module named 'longrl.nowhere'"),
        ({"longrl.rewards:nothing": 1.0}, "cannot be imported"),
        ({"format": float("nan")}, "rewards.format: the weight must be a finite number"),
        ({"format": 0.0}, "at least one reward needs a weight other than 0"),
        ({}, "at least one reward"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(weights)


def test_adding_a_reward_is_one_line(monkeypatch):
    monkeypatch.setitem(REWARDS, "brief", lambda example, rollout: -float(len(rollout.text)))
    assert build_rewards({"brief": 0.5})(group("abcd"))[0].reward == -2.0
