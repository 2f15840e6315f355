"""What `longrl check` refuses because a run would, at its start. More of it: test_cli.py, test_flow_check.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from longrl.algo.losses import LOSSES
from longrl.algo_config import LOSS_NAMES
from longrl.check import check_command, require_model
from longrl.config import ModelConfig, QuickstartConfig
from longrl.config_files import load_config
from longrl.plan.shapes import shape_of
from longrl.registry import require_name, resolve
from longrl.rewards import build_rewards
from longrl.rewards.media import MEDIA_REWARDS
from longrl.scorers_config import TOYS
from longrl.scoring_config import ScoringConfig

ROW = {"id": 1, "question": "1 + 1?", "answer": "2"}
BASE = {
    "kind": "rl",
    "run_dir": "runs/x",
    "model": {"path": "tiny:qwen2"},
    "steps": 10,
    "data": {"train": "rows.jsonl"},
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW))

    def run(processes=None, **settings):
        given = {name: value for name, value in {**BASE, **settings}.items() if value is not None}
        Path("run.yaml").write_text(json.dumps(given))
        check_command(load_config([Path("run.yaml")]), processes=processes)

    return run


def test_names_that_need_torch_are_those_that_it_would_find():
    assert set(LOSS_NAMES) == set(LOSSES)
    assert set(TOYS) == set(MEDIA_REWARDS)


OWN = """\
import os.path, json as text
try:
    from math import *
except ImportError:
    fallback = 1
def short(example, rollout):
    inside = 1
    return 0.0
a, (b, *c) = 1, (2, 3)
"""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"algo": {"loss": "clp"}},
            r"algo\.loss: unknown loss 'clp': expected one of cispo, clip, gspo; did you mean 'c",
        ),
        ({"algo": {"advantage": "grop"}}, r"algo\.advantage: unknown advantage 'grop'.*did you mean 'grpo'\?"),
        (
            {"algo": {"loss": "own.py:lose"}},
            r"loss 'own\.py:lose' cannot be imported: there is no 'lose' in .*/own\.py",
        ),
        ({"rewards": {"no.py:short": 1}}, r"there is no file .*/no\.py"),
        (
            {"rewards": {"own.py:shrt": 1}},
            r"there is no 'shrt' in .*/own\.py, did you mean 'short'\?; expected `package",
        ),
        ({"rewards": {"__main__:short": 1}}, r"reward '__main__:short' cannot be imported: there is no module '__main"),
        ({"rewards": {"bad.py:short": 1}}, r"reward 'bad\.py:short' cannot be imported: .*bad\.py, line 1"),
        ({"rewards": {"longrl.rewards.txt:x": 1}}, r"there is no module 'longrl\.rewards\.txt'"),
        ({"rewards": {"longrl.rewards.text:rouge": 1}}, r"there is no 'rouge' in .*did you mean 'rouge_n'\?"),
        ({"rewards": {"format": 0}}, "at least one reward needs a weight other than 0"),
        ({"scoring": {"by_kind": {"open": "rogue"}}}, "unknown reward 'rogue'.*did you mean 'rouge'"),
    ],
)
def test_names_of_losses_advantages_and_rewards(check, settings, words):
    Path("own.py").write_text(OWN.replace("from math import *", "from math import pi"))
    Path("bad.py").write_text("def short(:\n")
    with pytest.raises(ValueError, match=f"the run cannot start: .*{words}"):
        check(**settings)


def test_names_of_ones_own_are_looked_up_and_nothing_is_run(check):
    Path("own.py").write_text(OWN.replace("from math import *", "raise SystemExit"))
    check(algo={"loss": "own.py:short", "advantage": "longrl.algo.advantages:grpo"}, rewards={"own.py:b": 1})
    for name in ("own.py:c", "own.py:os", "own.py:text", "own.py:fallback", "json:loads"):
        require_name(name, (), "reward")
    Path("own.py").write_text(OWN)
    for name in ("own.py:pi", "math:pi"):  # by a star, whose names are not known; a module that is compiled
        require_name(name, (), "reward")
        resolve(name, {}, "reward")
    with pytest.raises(ValueError, match=r"there is no 'lodas' in .*, did you mean 'loads'"):
        require_name("json:lodas", (), "reward")


@pytest.mark.parametrize(
    "text",
    [
        "for name in ('score',): globals()[name] = print",
        "import sys\nsetattr(sys.modules[__name__], 'sc' + 'ore', print)",
        "exec('score = print')",
        "def make():\n    global score\n    score = print\nmake()",
        "match print:\n    case score: pass",
        "def other(one=(score := print)): ...",
        "def __getattr__(name): return print",
        "import sys\nsys.modules[__name__].__dict__['sc' + 'ore'] = print",
        "import sys\nsys.modules[__name__].score = print",
        "match {}:\n    case {**score}: score = print",
    ],
)
def test_names_that_a_run_would_find_are_not_refused(tmp_path, text):
    (tmp_path / "own.py").write_text(text)
    require_name(f"{tmp_path}/own.py:score", (), "reward")
    assert resolve(f"{tmp_path}/own.py:score", {}, "reward") is print


def test_a_module_in_a_package_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").write_text("from .score import one")
    (tmp_path / "own_package/score.py").write_text("one = 1")
    require_name("own_package:score", (), "reward")
    assert resolve("own_package:score", {}, "reward").one == 1


@pytest.mark.parametrize(
    ("settings", "row", "words"),
    [
        ({"rewards": {"number": 1}}, {"answer": "two"}, r"data\.train: example 1: the truth must be a number"),
        ({"rewards": {"answer": 1}}, {"answer": "two", "kind": "number"}, r"data\.train: .*1 .*expected a number"),
        ({"scoring": {"options": {"format": {"x": 1}}}}, {}, r"cannot be called as \(example, rollout, x=1\)"),
        ({"scoring": {"options": {"length": {"n": 1}}}}, {}, "scoring: 'length' is no reward of this run; these are"),
        ({"scoring": {"in_process": ["own.py:short"]}}, {}, r"scoring: 'own\.py:short' is no reward of this run"),
        (
            {"model": {"path": "tiny:qwen3_vl"}, "video": {"max_pixels": 800}},
            {"video": "a.mp4"},
            r"data\.train: example 1: max_pixels is 800, but what the model sees has at least 32 x 32 pixels; set",
        ),
        ({}, {"video": "a.mp4"}, "example 1 has a clip of kind video, but tiny:qwen2 reads text alone"),
    ],
)
def test_rows_and_their_rewards(check, settings, row, words):
    Path("rows.jsonl").write_text(json.dumps({**ROW, **row}))
    Path("a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=f"the run cannot start: .*{words}"):
        check(**settings)


@pytest.mark.parametrize(
    "settings", [{"rewards": {"judge": 1}}, {"scoring": {"by_kind": {"open": "judge"}}}], ids=["rewards", "by_kind"]
)
def test_the_quickstart_asks_no_judge(settings):
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/tiny/quickstart.yaml").read_text())
    with pytest.raises(ValueError, match="the quickstart asks no judge, but its rewards name judge; leave it out"):
        QuickstartConfig.model_validate({**shipped, **settings})


def test_what_a_judge_would_refuse(check, monkeypatch):
    judge = {"models": {"one": {"model": "m", "key_env": "A_KEY"}}, "limits": {"concurrency": 1}}
    monkeypatch.setenv("A_KEY", "one")
    check(rewards={"judge": 1}, judge=judge)
    with pytest.raises(ValueError, match=r"judge\.limits\.concurrency is 1, but 2 processes divide it; set it to more"):
        check(2, rewards={"judge": 1}, judge=judge)
    check(2, rewards={"judge": 1}, judge=judge, parallel={"sp": 2})  # which share their prompts
    monkeypatch.setenv("A_KEY", "two words")
    with pytest.raises(ValueError, match=r"judge\.models\.one: .* A_KEY does not hold an API key"):
        check(rewards={"judge": 1}, judge=judge)


def test_options_of_what_only_evaluation_calls(check):
    settings = {"rewards": {"format": 1}, "scoring": {"options": {"number": {"decimals": 1}}}}
    data = {**BASE["data"], "eval": "rows.jsonl"}
    check(**settings, data=data, eval_every_steps=2)
    build_rewards(settings["rewards"], ScoringConfig.model_validate(settings["scoring"]), evaluates=True)
    with pytest.raises(ValueError, match="'number' is no reward of this run"):
        check(**settings)


def test_truths_that_only_evaluation_needs(check):
    Path("held_out.jsonl").write_text(json.dumps({**ROW, "answer": "a red ball"}))
    settings = {"rewards": {"format": 1}, "scoring": {"by_kind": {"open": "number"}}}
    data = {**BASE["data"], "eval": "held_out.jsonl"}
    check(**settings, data={"train": "held_out.jsonl"})
    with pytest.raises(ValueError, match=r"data\.eval: example 1: the truth must be a number"):
        check(**settings, data=data, eval_every_steps=2)


def test_rows_of_text_have_no_pixels(check):
    check(model={"path": "tiny:qwen3_vl"}, video={"max_pixels": 800})


def test_pictures_of_one_size_cannot_be_made_smaller():
    shape = shape_of("tiny:vila")
    assert shape
    assert shape.vision
    shape.vision.require_pixels(784)
    with pytest.raises(ValueError, match="max_pixels is 783, but the model's pictures all have 28 x 28 pixels"):
        shape.vision.require_pixels(783)


@pytest.mark.parametrize(("server", "where"), [(None, ""), ({"urls": ["http://127.0.0.1:1"]}, " in evaluation")])
def test_servers_draw_one_prompt_at_a_time(check, capsys, server, where):
    check(rollout={"prompts_in_flight": 2, "server": server}, model={"path": "tiny:qwen2_5_vl"})
    assert f", 2 prompts in flight{where}, weights" in capsys.readouterr().out


def test_rows_of_a_control(check):
    settings = {"kind": "eval", "control": "shuffled", "data": {"eval": "rows.jsonl"}, "steps": None}
    with pytest.raises(ValueError, match=r"data\.eval: control is shuffled, but none of 1 questions has a clip"):
        check(**settings)


@pytest.mark.parametrize("settings", [{"rewards": {"math": 1}}, {"rewards": {"answer": 1}, "data": {"kind": "math"}}])
def test_a_missing_package_of_a_reward_is_named_once(check, monkeypatch, settings):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "math_verify" else there(name))
    with pytest.raises(ValueError, match="math-verify, which is not installed") as caught:
        check(**{**settings, "data": {"train": "rows.jsonl", **settings.get("data", {})}})
    assert str(caught.value).count("math-verify,") == 1


def test_names_of_a_quickstart(check):
    quickstart = {
        "kind": "quickstart",
        "videos": {"dir": "v"},
        "model": {"path": "tiny:qwen2_5_vl"},
        "sft": {"steps": 2},
    }
    Path("q.yaml").write_text(json.dumps({**quickstart, "rl": {"steps": 2, "algo": {"loss": "clp"}}}))
    with pytest.raises(ValueError, match=r"rl\.algo\.loss: unknown loss 'clp'"):
        check_command(load_config([Path("q.yaml")]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ROW, "answer": ""}, r"bad\.jsonl:1 \(id '1'\): answer is '', expected a text that is not empty"),
        ({**ROW, "video": "gone.mp4"}, "video gone.mp4: no such file; mend the row, or set data.on_error to skip"),
        ("", "no usable example in 0 rows"),
    ],
)
def test_rows_that_a_run_refuses(check, row, words):
    Path("bad.jsonl").write_text(row and json.dumps(row))
    with pytest.raises(ValueError, match=rf"data\.train: .*{words}"):
        check(data={"train": "bad.jsonl"})
    held_out = {"train": "rows.jsonl", "eval": "bad.jsonl"}
    check(data=held_out)  # which it does not read
    with pytest.raises(ValueError, match=rf"data\.eval: .*{words}"):
        check(data=held_out, eval_every_steps=5)
    with pytest.raises(ValueError, match=r"data\.train: .*response is missing"):
        check(kind="sft")
    check(data={"train": "of/the-hub@train"})


def test_the_model_in_a_folder_of_the_wrong_level_is_named(tmp_path):
    for run, step in (("sft", 450), ("rl", 20), ("rl", 40)):
        folder = tmp_path / run / "checkpoints" / f"step_{step:06d}" / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    sft, rl = (f"{tmp_path}/{run}/checkpoints/step_{step}/model" for run, step in (("sft", "000450"), ("rl", "000040")))
    for path, named in ((f"{rl}/..", rl), (tmp_path / "rl", rl), (tmp_path, f"{rl} or {sft}")):
        with pytest.raises(ValueError, match=r"not a Hugging Face folder \(no config\.json\); did you mean ") as caught:
            require_model(ModelConfig(path=str(path)))
        assert str(caught.value).replace("/model/../model", "/model").endswith(f"did you mean {named}?")


def test_a_folder_has_a_model_of_a_known_kind_with_all_its_weights(tmp_path):
    def problem() -> str:
        with pytest.raises(ValueError, match=f"^model.path: {tmp_path}") as caught:
            require_model(ModelConfig(path=str(tmp_path)))
        return str(caught.value)

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no family for model_type 'llama'; known: qwen2, " in problem()
    (tmp_path / "config.json").write_text('{"model_type": ["qwen2"]}')
    assert "no family for model_type" in problem()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "has no model.safetensors; copy" in problem()
    save_file({"a": torch.zeros(99)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of the 2 files that model.safetensors.index.json names: model-2.safetensors; copy" in problem()
    whole = (tmp_path / "model-1.safetensors").read_bytes()
    (tmp_path / "model-2.safetensors").write_bytes(whole[:-9])
    assert "model-2.safetensors: its weights cannot be read (" in problem()
    (tmp_path / "model-2.safetensors").write_bytes(whole)
    assert "has no words in tokenizer.json (or vocab.json with merges.txt); copy" in problem()
    (tmp_path / "vocab.json").touch()
    assert "has no words in tokenizer.json" in problem()
    (tmp_path / "merges.txt").touch()
    require_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {}}')
    assert "has no video_preprocessor_config.json or preprocessor_config.json, nor video_processor in" in problem()
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 3136}')
    require_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vila", "llm_cfg": {}}')
    assert f"{tmp_path}/llm has no model.safetensors" in problem()


def test_rows_that_a_model_does_not_hear(check):
    row = {"id": "1", "question": "what?", "answer": "a dog", "audio": "a.wav"}
    Path("a.wav").touch()
    Path("rows.jsonl").write_text(json.dumps(row))
    for path, words in (("tiny:qwen2_5_vl", "does not hear; leave out sound"), ("tiny:qwen2", "reads text alone")):
        with pytest.raises(ValueError, match=rf"has a clip of kind audio, but {path} {words}"):
            check(model={"path": path}, video={"max_pixels": 784})


def test_rows_that_the_run_does_not_read_are_said(check, capsys):
    check(data={"train": "rows.jsonl", "eval": "rows.jsonl"})
    assert "data.eval  rows.jsonl (this run does not read it: eval_every_steps is 0)" in capsys.readouterr().out
