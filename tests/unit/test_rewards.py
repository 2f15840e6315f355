"""Rewards: the format, the answer, their weighted sum, and what happens when one cannot score."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longrl.config import EvalRunConfig
from longrl.rewards import REWARDS, Rewards, build_rewards
from longrl.rewards.answer import exact_reward
from longrl.rewards.choice import choice_reward
from longrl.scoring_config import BY_KIND, ScoringConfig
from longrl.types import KINDS, Example, Group, Message, Prompt, Rollout
from tests import in_process
from tests.unit.naughty import MuteError


def rollout(text: str) -> Rollout:
    return Rollout(token_ids=(1, 2), logprobs=(-0.1, -0.2), text=text, finish_reason="stop", policy_version=0)


def example(answer: str | None = "B", kind: str = "choice") -> Example:
    return Example(id="q7", messages=(Message(role="user", content=("?",)),), answer=answer, kind=kind)


def group(*texts: str, **kwargs) -> Group:
    prompt = Prompt(
        token_ids=torch.tensor([1]), position_ids=torch.zeros(1, 1, dtype=torch.int64), media=(), media_slots=()
    )
    return Group(id="g", example=example(**kwargs), prompt=prompt, rollouts=tuple(map(rollout, texts)))


def right(example: Example, rollout: Rollout) -> float | None:
    return {"choice": choice_reward, "open": exact_reward}[example.kind](example, rollout)


def build(weights: dict[str, float], **scoring) -> Rewards:
    """Rewards of which none runs in a worker."""
    return build_rewards(weights, ScoringConfig.model_validate({**in_process(weights), **scoring}))


def answered(answer: str) -> str:
    return f"<think>red, then blue.</think><answer>{answer}</answer>"


def raises_often(example: Example, rollout: Rollout) -> float:
    """Named in a configuration below as `package.module:attr`."""
    return 1.0 / (len(rollout.text) - 2)


def not_a_number(example: Example, rollout: Rollout) -> float:
    return float("nan")


def undecided(example: Example, rollout: Rollout) -> None:
    return None


def test_weighted_sum():
    scored = build_rewards({"format": 0.1, "answer": 0.9})(
        group(answered("B"), answered("C"), "<answer>B</answer>", "C")
    )
    assert [one.reward for one in scored] == pytest.approx([1.0, 0.1, 0.9, 0.0], abs=1e-15)
    assert scored[1].rewards == {"format": 1.0, "answer": 0.0}
    assert [one.rollout.text for one in scored][3] == "C"


PARTS = st.lists(st.tuples(st.floats(-10, 10), st.none() | st.floats(-1e6, 1e6)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PARTS, st.floats(-5, 5))
def test_the_reward_is_the_weighted_sum_of_its_parts_or_none(parts, scale):
    weights, values = {str(i): w for i, (w, _) in enumerate(parts)}, {str(i): v for i, (_, v) in enumerate(parts)}
    assume(any(weights.values()))
    rewards = Rewards(weights, ScoringConfig(), dict.fromkeys(weights, raises_often))
    reward = rewards.score(example(), rollout(""), values).reward
    expected = None if any(w and values[n] is None for n, w in weights.items()) else 0.0
    if expected is not None:
        expected = sum(w * v for n, w in weights.items() if (v := values[n]) is not None)
    assert reward == (None if expected is None else pytest.approx(expected, abs=1e-6))  # of 6 products up to 1e7
    scaled = {name: None if value is None else scale * value for name, value in values.items()}
    other = rewards.score(example(), rollout(""), scaled).reward
    assert other == (None if reward is None else pytest.approx(scale * reward, abs=1e-6))


@given(st.permutations(["ab", "abc", "abcd", "abcdef", "b"]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_rollout_earns_the_same_in_any_company(texts):
    rewards = build({f"{__name__}:raises_often": 1.0, "format": 0.5})
    together = rewards(group(*texts))
    alone = [rewards(group(text))[0] for text in texts]
    assert [one.rewards for one in together] == [one.rewards for one in alone]
    assert [one.reward for one in together] == [one.reward for one in alone]
    assert sum(one.reward is None for one in together) == 1


def test_a_part_that_cannot_score_makes_the_reward_none():
    scored = build({"format": 0.1, f"{__name__}:undecided": 0.9})(group(answered("B")))
    assert scored[0].reward is None
    assert scored[0].rewards == {"format": 1.0, f"{__name__}:undecided": None}


def test_a_part_of_weight_zero_is_only_watched():
    scored = build({"format": 1.0, f"{__name__}:undecided": 0.0})(group(answered("B")))
    assert scored[0].reward == 1.0


def test_a_reward_that_raises_is_counted_named_and_none(caplog):
    name = f"{__name__}:raises_often"
    rewards = build({name: 1.0})
    with caplog.at_level(logging.WARNING):
        scored = rewards(group("ab", "abc"))
    assert [one.reward for one in scored] == [None, 1.0]
    assert rewards.failures[name] == 1
    assert "example q7" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def raises_at_length(example: Example, rollout: Rollout) -> float:
    raise ValueError("long \n" * 80_000)


def raises_mutely(example: Example, rollout: Rollout) -> float:
    raise MuteError


@pytest.mark.parametrize(("name", "said"), [("raises_at_length", "ValueError: long long"), ("raises_mutely", "Mute")])
def test_what_a_reward_raises_is_said_in_a_line(name, said, caplog):
    rewards = build({f"{__name__}:{name}": 1.0}, max_failures=0)
    with pytest.raises(RuntimeError, match=said) as stopped:
        rewards(group("a"))
    for line in (str(stopped.value), *caplog.messages):
        assert said in line
        assert len(line) < 600
        assert "\n" not in line


def test_a_reward_that_is_not_finite_is_a_failure():
    name = f"{__name__}:not_a_number"
    rewards = build({name: 1.0})
    assert rewards(group("x"))[0].reward is None
    assert rewards.failures[name] == 1


def test_too_many_failures_stop_the_run():
    name = f"{__name__}:not_a_number"
    rewards = build({name: 1.0}, max_failures=3)
    rewards(group("a", "b", "c"))
    with pytest.raises(RuntimeError, match=r"has failed on 4 of its last 4 responses, scoring.max_failures allows 3"):
        rewards(group("d"))


def test_a_reward_that_has_never_worked_stops_the_run_and_says_why_once(caplog):
    name = f"{__name__}:not_a_number"
    rewards = build({name: 1.0})
    one = group(*["a"] * 20)
    rewards(one)  # of one example, which may be at fault
    with pytest.raises(RuntimeError, match=r"has failed on 21 of its last 21 responses, none was scored"):
        rewards(replace(one, example=replace(one.example, id="another")))
    assert len([line for line in caplog.messages if "failed: " in line]) == 1


def test_a_response_is_counted_once_by_whatever_names_a_reward_is_called():
    name = f"{__name__}:not_a_number"
    rewards = build({name: 0.5, "answer": 0.5}, by_kind={"choice": name}, max_failures=2)
    assert {one.failed for one in rewards(group("a", "b"))} == {(name, "answer")}
    with pytest.raises(RuntimeError, match=r"failed on 3 of its last 3 responses, .* allows 2; .*; mend it, or set"):
        rewards(group("c"))


def test_failures_that_are_long_past_do_not_stop_the_run():
    name = f"{__name__}:raises_often"
    rewards = build({name: 1.0}, max_failures=1)
    rewards(group("ab"))
    rewards(group(*["abc"] * 1000))
    rewards(group("ab"))
    assert rewards.failures[name] == 2


KINDS_SCORED = [
    ("choice", "B", "The answer is B.", 1.0),
    ("open", "red circle", "A red circle.", 1.0),
    ("number", "3", "3 of them", 1.0),
    ("ocr", "EXIT ONLY", "EXIT", 0.5),
    ("free_text", "the cat", "the dog", (1 / 2 + 0 + 1 / 2) / 3),
    ("regression", "10", "9", 0.9),
    ("grounding", "10 to 20", "15 to 25", 5 / 15),
]


@pytest.mark.parametrize(("kind", "truth", "said", "value"), KINDS_SCORED)
def test_answer_is_the_reward_of_the_examples_kind(kind, truth, said, value):
    rewards = build_rewards({"answer": 1.0})
    asked = group(answered(said), answer=truth, kind=kind)
    rewards.require([asked.example])
    [one] = rewards(asked)
    assert one.reward == pytest.approx(value, abs=1e-15)
    assert rewards(group(answered(said), answer=None, kind=kind))[0].reward is None


def test_every_kind_has_a_reward():
    assert set(BY_KIND) == set(KINDS)
    assert set(BY_KIND.values()) <= set(REWARDS)
    assert {kind for kind, *_ in KINDS_SCORED} | {"math"} == set(KINDS)


def test_kinds_can_be_scored_by_something_else():
    scoring = ScoringConfig(by_kind={"open": "rouge"}, options={"rouge": {}})
    rewards = build_rewards({"answer": 1.0}, scoring)
    assert rewards(group("the dog", answer="the cat", kind="open"))[0].reward == pytest.approx(1 / 3)
    assert rewards(group("B", answer="B", kind="choice"))[0].reward == 1.0


def test_accuracy_does_not_hang_on_the_weights():
    scored = build_rewards({"format": 1.0}).begin(group(answered("B"), "B"), held_out=True).result()
    assert [(one.reward, one.rewards["answer"]) for one in scored] == [(1.0, 1.0), (0.0, 1.0)]


def test_failures_of_accuracy_alone_are_counted_and_stop_nothing(caplog):
    broken = f"{__name__}:not_a_number"
    rewards = build({"format": 1.0}, by_kind={"choice": broken}, in_process=[broken], max_failures=3)
    one = group(*["a"] * 20)
    for name in ("q7", "another"):
        scored = rewards.begin(replace(one, example=replace(one.example, id=name)), held_out=True).result()
        assert {(one.reward, one.rewards["answer"]) for one in scored} == {(0.0, None)}
    assert rewards.failures == {"format": 0, "answer": 40}
    assert f"reward {broken} of example q7 failed: ValueError" in caplog.text


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        *[("choice", "blue"), ("number", "many"), ("regression", "1 or 2"), ("grounding", "at noon")],
        *[("math", "the blue one"), ("math", "$$"), ("ocr", " "), ("free_text", "?!")],
    ],
)
def test_truths_that_cannot_be_read_are_found_before_the_run(kind, truth):
    with pytest.raises(ValueError, match="example q7: the truth "):
        build_rewards({"answer": 1.0}).require([example(truth, kind)])
    build_rewards({"format": 1.0}).require([example(truth, kind)])
    with pytest.raises(ValueError, match="example q7: the truth "):  # which evaluation needs
        build_rewards({"format": 1.0}).require([], [example(truth, kind)])


def test_math_without_math_verify_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr("longrl.rewards.maths.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"math-verify, which is not installed: pip install 'longrl\[math\]'"):
        build_rewards({"answer": 1.0}).require([example("1", "math")])
    with pytest.raises(ValueError, match="math-verify, which is not installed"):
        build_rewards({"format": 1.0}).require([], [example("1", "math")])
    build_rewards({"answer": 1.0}).require([example("B")])


LENGTH = {"options": {"length": {"max_tokens": 4, "buffer_tokens": 4}}}


def test_options_reach_the_reward():
    assert build_rewards({"length": 1.0}, ScoringConfig.model_validate(LENGTH))(group("x"))[0].reward == -0.5


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({}, r"'length' cannot be called as .*: missing a required argument: 'max_tokens'; set scoring.options.length"),
        ({"options": {"length": {"max_tokens": 4, "size": 2}}}, "; mend scoring.options.length"),
        ({"options": {"lenght": {}}}, "scoring: 'lenght' is no reward of this run; these are length"),
        ({"in_process": ("my:rouge",)}, "scoring: 'my:rouge' is no reward of this run"),
        ({"in_process": ("math",)}, "'math' is built in, expected rewards of your own, module:attr or file.py:attr"),
        ({"by_kind": {"opne": "rouge"}}, "there is no kind 'opne', expected one of choice, open"),
        ({"by_kind": {"open": "answer"}}, "open is scored by `answer`, which is what this says the meaning of"),
        ({**LENGTH, "by_kind": {"open": "roug"}}, "unknown reward 'roug'.*did you mean 'rouge'"),
    ],
)
def test_bad_scoring(scoring, message):
    with pytest.raises(ValueError, match=message):
        build_rewards({"length": 1.0}, ScoringConfig.model_validate(scoring))


def test_a_reward_from_a_file(tmp_path, monkeypatch):
    counts = "calls = []\ndef reward(example, rollout):\n    calls.append(1)\n    return len(calls)\n"
    (tmp_path / "mine.py").write_text(counts)
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):  # the same module each time
        assert build({"mine.py:reward": 1.0})(group("x"))[0].reward == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward = 3", "reward 'mine.py:reward' is of type int, expected a function"),
        ("def reward(example): return 1", "cannot be called as"),
        ("def other(example, rollout): return 1", "cannot be imported: there is no 'reward' in "),
        ("def reward(:", "cannot be imported: invalid syntax"),
        ("1 / 0", "cannot be imported: division by zero; expected `package.module:attr` or `file.py:attr`"),
        (None, "there is no file"),
    ],
)
def test_a_file_that_cannot_be_used_is_found_at_the_start(text, message, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_rewards({"mine.py:reward": 1.0})


def test_the_preset_of_video_r1_is_the_default():
    preset = EvalRunConfig.model_validate({"run_dir": "x", "model": {"path": "tiny:qwen2_5_vl"}, "rewards": "r1v"})
    assert preset.rewards == EvalRunConfig.model_fields["rewards"].default == {"format": 0.1, "answer": 0.9}
    with pytest.raises(ValueError, match="there is no preset 'r2v', expected r1v"):
        EvalRunConfig.model_validate({"run_dir": "x", "model": {"path": "tiny:qwen2_5_vl"}, "rewards": "r2v"})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"anwser": 1.0}, "unknown reward 'anwser': expected one of answer, choice, .*; did you mean 'answer'"),
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
