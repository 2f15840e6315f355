"""Evaluation on real files: what counts, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longrl.config import EvalRunConfig, ModelConfig
from longrl.data.examples import Skips, load_examples
from longrl.data.prompts import response_ids
from longrl.evals.runner import evaluate, run_eval
from longrl.models import load_family
from longrl.policy import Policy
from longrl.rewards import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.types import Prefix, Prompt
from tests.e2e.test_training import with_unusable


def config(tmp_path: Path, rows: Path, **changes) -> EvalRunConfig:
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "tiny:qwen2_5_vl"},
        "data": {"eval": str(rows), "on_error": "skip"},
        "cache": {"dir": str(tmp_path / "cache")},
        "rollout": {"max_new_tokens": 1},
        "eval": {"samples": 2},
        **changes,
    }
    return EvalRunConfig.model_validate(settings)


def test_questions_about_unusable_videos_count_as_wrong(dataset, tmp_path):
    rows = with_unusable(dataset.test, tmp_path / "rows.jsonl")
    asked = len(rows.read_text().splitlines())
    result = run_eval(config(tmp_path, rows))
    assert result.overall.num_questions == asked
    written = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert written["num_questions"] == asked
    assert sorted(written["skipped"]) == ["broken0", "broken1", "broken2", "broken3", "gone"]
    assert "gone.mp4" in written["skipped"]["gone"]
    assert [one["responses"] for one in written["examples"] if one["id"] in written["skipped"]] == [[]] * 5


def test_a_control_takes_the_media_away(dataset, tmp_path, monkeypatch):
    seen: list[Prompt] = []
    monkeypatch.setattr(Policy, "prefix", watched(Policy.prefix, seen))
    run_eval(config(tmp_path, dataset.test, control="without_media", run_dir=str(tmp_path / "without")))
    assert json.loads((tmp_path / "without" / "eval.json").read_text())["stage"] == "without_media"
    assert {len(prompt.media) for prompt in seen} == {0}
    seen.clear()
    run_eval(config(tmp_path, dataset.test, control="shuffled"))
    assert {"shuffled" in media.key for prompt in seen for media in prompt.media} == {True}


def test_a_control_holds_no_more_videos_than_the_evaluation_and_asks_bare_questions_together(
    dataset, tmp_path, monkeypatch
):
    video = json.loads(dataset.test.read_text().splitlines()[0])["video"]
    seen = {"type": "video", "video": str(dataset.test.parent / video)}
    # text before the video keeps questions about it apart
    asked = [[{"type": "text", "text": f"Question {k}."}, seen, {"type": "text", "text": "When?"}] for k in range(3)]
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": parts}], "answer": "1", "kind": "number"} for parts in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    at_once: dict[str, set[int]] = {}
    decode = NativeEngine._decode_in_turns  # pyright: ignore[reportPrivateUsage]

    def counted(engine, prefixes, *rest):
        at_once.setdefault(stage, set()).add(len(prefixes))
        return decode(engine, prefixes, *rest)

    monkeypatch.setattr(NativeEngine, "_decode_in_turns", counted)
    for stage in (None, "shuffled", "without_media"):
        run_eval(config(tmp_path, path, control=stage, run_dir=str(tmp_path / f"{stage}")))
    assert at_once["shuffled"] == at_once[None] == {1}
    assert max(at_once["without_media"]) > 1


def test_a_control_that_would_change_nothing_is_refused(dataset, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "q", "problem": "1 + 1?", "answer": "2", "kind": "number"}) + "\n")
    for control in ("shuffled", "without_media"):
        with pytest.raises(ValueError, match=f"control is {control}, but none of 1 questions has a clip of kind video"):
            run_eval(config(tmp_path, rows, control=control))
    assert not (tmp_path / "run").exists()


def watched(prefix, seen: list[Prompt]):
    def watching(policy, prompts, *rest, **named):
        seen.extend(prompts)
        return prefix(policy, prompts, *rest, **named)

    return watching


def test_accuracy_needs_no_reward_of_that_name_and_divides_by_all(dataset, tmp_path):
    """Every response is made to say A: right is what A is the truth of."""
    rows = with_unusable(dataset.test, tmp_path / "rows.jsonl")
    settings = config(tmp_path, rows, rewards={"format": 1.0})
    skips = Skips(settings.data)
    examples = load_examples(rows, settings.data, settings.video, skips, keep_skipped=True)
    policy = Policy(load_family(settings.model))
    said = "<think>a guess.</think><answer>A</answer>"
    result = evaluate(policy, examples, settings, skips, build_rewards(settings.rewards), stage="eval", forced=said)
    usable = [example for example in examples if example.id not in result.skipped]
    right = sum(example.answer == "A" for example in usable if example.kind == "choice")
    assert right > 0
    assert len(result.skipped) == 5
    assert result.overall.accuracy == pytest.approx(right / len(examples))


class CountingPolicy(Policy):
    """Counts how often a prefix is computed."""

    prefixes = 0

    def prefix(self, prompts: list[Prompt]) -> Prefix:
        self.prefixes += 1
        return super().prefix(prompts)


def test_a_video_is_prefilled_once_however_its_questions_are_ordered(dataset, tmp_path):
    examples = load_examples(dataset.train_rl, config(tmp_path, dataset.train_rl).data, config(tmp_path, Path()).video)
    videos = len({example.clips for example in examples})
    assert videos == 2
    alternating = sorted(examples, key=lambda example: example.id[::-1])
    assert [one.clips for one in alternating[:3]] != [one.clips for one in examples[:3]]
    settings = config(tmp_path, dataset.train_rl)
    policy = CountingPolicy(load_family(settings.model))
    result = evaluate(
        policy, alternating, settings, Skips(settings.data), build_rewards(settings.rewards), stage="eval"
    )
    assert policy.prefixes == videos
    assert [one["id"] for one in result.examples] == [example.id for example in alternating]


def test_a_demonstrated_response_ends_with_the_token_that_ends_a_turn():
    """Real checkpoints have a second stop token, with a smaller id than the one that the chat template writes."""
    family = load_family(ModelConfig(path="tiny:qwen2_5_vl"))
    end, other = family.tokenizer.convert_tokens_to_ids("<|im_end|>"), 0
    assert family.model.generation_config is not None
    family.model.generation_config.eos_token_id = [end, other]
    assert family.stop_ids == {end, other}
    ids = response_ids(family, "<answer>A</answer>")
    assert ids[-1] == end
    assert family.tokenizer.decode(ids[:-1]) == "<answer>A</answer>"
