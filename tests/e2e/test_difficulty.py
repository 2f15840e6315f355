"""The difficulty filter: what it calls a question, and which rows it keeps, by the shipped warm start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longrl.config import EvalRunConfig
from longrl.evals.difficulty import KEPT, difficulty, filter_command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ([1, 0, 1], "sometimes right"),
        ([1, 1], "always right"),
        ([0, 0], "always wrong"),
        ([1, None, 1], "always right"),
        ([0, None, 1], "sometimes right"),
        ([0.9, 0.2, 0.95, 0.0], "sometimes right"),
        ([0.9, 0.9], "always right"),
        ([0.5, 0.5, None], "always wrong"),
        ([None, None], "unscored"),
        ([], "unscored"),
    ],
)
def test_difficulty_by_hand(said, name):
    assert difficulty([{"score": x, "reward": 0.0, "correct": x == 1} for x in said]) == name


@pytest.fixture(scope="module")
def settings(dataset, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("filter")
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(ROOT / "assets" / "warm_start")},
        "data": {"eval": str(dataset.train_rl)},
        "cache": {"dir": str(folder / "cache")},
        "rollout": {"max_new_tokens": 64},
        "eval": {"samples": 3},
    }


def test_rows_that_are_right_sometimes_are_kept_as_they_are(settings, dataset):
    out = Path(dataset.train_rl).parent / "kept.jsonl"
    found = filter_command(EvalRunConfig.model_validate(settings), out)
    rows = Path(dataset.train_rl).read_text().splitlines()
    kept = out.read_text().splitlines()
    out.unlink()
    assert 0 < len(kept) < len(rows)
    assert [json.loads(line)["id"] for line in kept] == found["sometimes right"]
    assert [json.loads(line) for line in kept] == [row for row in map(json.loads, rows) if row["id"] in found[KEPT]]
    assert json.loads((Path(settings["run_dir"]) / "filter.json").read_text()) == found
    told = json.loads((Path(settings["run_dir"]) / "eval.json").read_text())["examples"]
    right = {one["id"]: sum(response["correct"] for response in one["responses"]) for one in told}
    assert found["sometimes right"] == [name for name, count in right.items() if 0 < count < 3]
    assert found["always right"] == [name for name, count in right.items() if count == 3]
    assert sum(map(len, found.values())) == len(rows)


def test_rows_of_another_format(settings, dataset, tmp_path):
    """LongVideo-Reason's, whose ids are in another column; the files are elsewhere."""
    ours = [json.loads(line) for line in Path(dataset.train_rl).read_text().splitlines()]
    theirs = [
        {
            "problem_id": int(i),
            "data_type": "video",
            "videos": Path(row["video"]).name,
            "problem": "\n".join(
                [row["question"], *(f"{a}. {text}" for a, text in zip("ABCD", row["options"], strict=True))]
            ),
            "problem_type": "multiple choice",
            "answer": f"<answer>{row['answer']}</answer>",
            "reasoning": "It is seen.",
        }
        for i, row in enumerate(ours)
        if row.get("options")
    ]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(theirs))
    folder = str((Path(dataset.train_rl).parent / ours[0]["video"]).parent)
    changes = {
        "run_dir": str(tmp_path / "run"),
        "data": {"eval": str(source), "media_dir": folder},
        "eval": {"samples": 3, "temperature": 2.0},  # or it is right about all of one minute
    }
    out = tmp_path / "elsewhere" / "kept.jsonl"
    out.parent.mkdir()
    found = filter_command(EvalRunConfig.model_validate({**settings, **changes}), out)
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept
    assert kept == [row for row in theirs if str(row["problem_id"]) in found[KEPT]]


def test_a_file_elsewhere_or_one_that_exists_is_refused(settings, dataset, tmp_path):
    config = EvalRunConfig.model_validate(settings)
    with pytest.raises(ValueError, match=r"expected a file in .*, where relative paths in the rows start"):
        filter_command(config, tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match="there is such a file; remove it, or name another"):
        filter_command(config, Path(dataset.train_rl))


def test_nothing_left_says_why(settings, dataset, tmp_path):
    """A model of random weights is right about nothing."""
    config = EvalRunConfig.model_validate({**settings, "model": {"path": "tiny:qwen2_5_vl"}, "run_dir": str(tmp_path)})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 4})})
    with pytest.raises(ValueError, match=r"no question is left: \d+ always wrong; ask more often"):
        filter_command(config, Path(dataset.train_rl).parent / "none.jsonl")
