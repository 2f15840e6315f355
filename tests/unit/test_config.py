"""Configuration files: what is read, what is refused and with which words, and that it can be written back."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import get_args

import pytest

from longrl import types
from longrl.config import DataConfig, RlConfig
from longrl.config_files import KINDS, load_arguments, load_config, save_config
from longrl.data.adapters.formats import FORMATS

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

BASE = """\
kind: rl
run_dir: runs/x
model:
  path: tiny:qwen2_5_vl
steps: 10
optim:
  lr: 1e-6
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def message(paths: list[Path], *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(paths, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_merge_left_to_right_then_overrides(base, tmp_path):
    second = write(tmp_path / "second.yaml", "optim: {betas: [0.5, 0.6]}\nsteps: 20\n")
    config = load_config([base, second], ["steps=30", "optim.weight_decay=0.5"])
    assert isinstance(config, RlConfig)
    assert config.steps == 30
    assert config.optim.lr == 1e-6  # the first file's, kept beside the second's
    assert config.optim.betas == (0.5, 0.6)  # replaced, not joined
    assert config.optim.weight_decay == 0.5


def test_rewards_are_chosen_as_a_whole_or_one_by_one(base, tmp_path):
    first = write(tmp_path / "first.yaml", "rewards: {format: 0.1, answer: 0.4, 'my.py:brevity': 0.5}\n")
    second = write(tmp_path / "second.yaml", "rewards: {answer: 0.9}\njudge: null\n")
    assert load_config([base, first, second]).rewards == {"answer": 0.9}
    assert load_config([base, first], ["rewards={answer: 0.9}"]).rewards == {"answer": 0.9}
    changed = load_config([base, first], ["rewards.answer=1", "rewards.format=null", "rewards.my.py:brevity=0.2"])
    assert changed.rewards == {"answer": 1.0, "my.py:brevity": 0.2}
    words = "there is no such reward to remove; those that are set: answer"
    assert message([base, second], "rewards.anser=null") == f"override 'rewards.anser=null': {words}"
    assert load_config([base, second], ["rewards.my_rewards.py:short=0"]).rewards == {
        "answer": 0.9,
        "my_rewards.py:short": 0.0,
    }
    for empty in ("rewards: {format: 0.1, answer: }\n", "rewards: {format: 0.1, answer: null}\n"):
        assert "rewards.answer: got null" in message([base, write(tmp_path / "empty.yaml", empty)])
    assert "rewards.answer: got null" in message([base, second], "rewards={format: 1, answer: null}")


@pytest.mark.parametrize("text", ["{}\n", "rewards: r1v\n"])
def test_one_reward_is_changed_where_a_preset_or_the_default_applies(base, tmp_path, text):
    given = write(tmp_path / "given.yaml", text)
    assert load_config([base, given]).rewards == {"format": 0.1, "answer": 0.9}
    assert load_config([base, given], ["rewards.length=0.05"]).rewards == {"format": 0.1, "answer": 0.9, "length": 0.05}
    assert load_config([base, given], ["rewards.format=null"]).rewards == {"answer": 0.9}
    assert message([base, given], "rewards.x=null").endswith("those that are set: format, answer")


def test_one_reward_of_what_are_none(base, tmp_path):
    for text, words in (("none", "there is no preset 'none'"), ("5", "got 5, expected names with weights")):
        given = write(tmp_path / "given.yaml", f"rewards: {text}\n")
        assert f"rewards: {words}" in message([base, given], "rewards.format=1")


@pytest.mark.parametrize("text", ["off", "no", "1:30", "0123", "2024-01-01"])
def test_what_only_yaml_1_1_takes_for_another_type_is_text(text, base, tmp_path):
    path = write(tmp_path / "text.yaml", f"data: {{system_prompt: {text}}}\n")
    assert load_config([base, path]).data.system_prompt == text
    assert load_config([base], [f"data.system_prompt={text}"]).data.system_prompt == text


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1E+2", 100), ("-1.5e-3", -0.0015), (".5", 0.5), ("7", 7)]
)
def test_numbers(text, value, base):
    assert load_config([base], [f"rewards.format={text}"]).rewards["format"] == value


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null(text, base):
    assert load_config([base], ["data.train=x", f"data.train={text}"]).data.train is None


def test_kl_off_is_not_false(base):
    assert load_config([base], ["algo.kl=off"]).algo.kl == "off"


def test_missing_file(tmp_path):
    assert message([tmp_path / "nope.yaml"]) == f"{tmp_path}/nope.yaml: no such configuration file"


def test_folder_and_binary_instead_of_a_file(tmp_path):
    assert "is a folder" in message([tmp_path])
    (tmp_path / "video.yaml").write_bytes(b"\x00\x00\x00\x18ftypmp42\xff\xfe")
    assert "not a text file (byte 12 is not UTF-8)" in message([tmp_path / "video.yaml"])
    (tmp_path / "zeros.yaml").write_bytes(b"kind: rl\x00")
    assert f"{tmp_path}/zeros.yaml: malformed YAML" in message([tmp_path / "zeros.yaml"])


def test_malformed_yaml_names_line_and_column(tmp_path):
    path = write(tmp_path / "bad.yaml", "kind: rl\nmodel: {path: x\nsteps: 3\n")
    assert message([path]).startswith(f"{path}:3:6: malformed YAML: ")


def test_top_level_must_be_a_mapping(tmp_path):
    assert "got [1, 2], expected a mapping" in message([write(tmp_path / "list.yaml", "- 1\n- 2\n")])


def test_duplicate_key(tmp_path):
    path = write(tmp_path / "twice.yaml", BASE + "optim:\n  lr: 1\n")
    assert message([path]) == f"{path}:8: duplicate key 'optim'; keep one"
    path = write(tmp_path / "deep.yaml", BASE + "  lr: 2\n")
    assert message([path]) == f"{path}:8: duplicate key 'optim.lr'; keep one"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps: !!python/name:os.system x", "is not supported; write a plain value"),
        ("data: &d {train: *d}", "an anchor (&name) may not hold its own alias (*name)"),
        ("data: " + 5000 * "[", "nested too deeply"),
        ("rewards: {1: 0.5}", 'key "1" is not text'),
    ],
)
def test_yaml_beyond_plain_data_is_refused(line, words, tmp_path):
    path = write(tmp_path / "odd.yaml", line + "\n")
    text = message([path])
    assert text.startswith(f"{path}:")
    assert words in text


def test_anchors_and_aliases(base, tmp_path):
    path = write(tmp_path / "alias.yaml", "rollout: {temperature: &t 0.5}\neval: {temperature: *t}\n")
    assert load_config([base, path]).eval.temperature == 0.5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("algo: {kll: off}", "unknown key 'algo.kll'; did you mean 'algo.kl'?"),
        ("rolout: {group_size: 4}", "unknown key 'rolout'; did you mean 'rollout'?"),
        ("lr: 0.1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("cache: {zzz: 1}", "unknown key 'cache.zzz'; the keys here are dir, max_gib"),
    ],
)
def test_unknown_key_names_the_nearest_and_the_line(line, words, base, tmp_path):
    path = write(tmp_path / "more.yaml", f"# a comment\n{line}\n")
    assert message([base, path]) == f"{path}:2: {words}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=abc", 'steps: got "abc", expected a valid integer'),
        ("steps=1.5", "steps: got 1.5, expected a valid integer"),
        ("steps=true", "steps: got true, expected a valid integer"),
        ("steps=-1", "steps: got -1, expected greater than or equal to 1"),
        ("optim.lr=.nan", "optim.lr: got NaN, expected a finite number"),
        ("optim=3", "optim: got 3, expected a mapping"),
        ("run_dir=2024", "run_dir: got 2024, expected a valid string"),
        ("run_dir.x=1", 'run_dir: got {"x": 1}, expected a valid string'),
        ("model.dtype=half", "model.dtype: got \"half\", expected 'float32', 'bfloat16' or 'float64'"),
        (
            "model.dtype=bfloat16",
            "model: model.dtype is bfloat16, which has no room for small updates; train in float32, with compute_dtype "
            "bfloat16 perhaps, or train adapters (model.lora)",
        ),
        ("model.lora={rnak: 4}", "unknown key 'model.lora.rnak'; did you mean 'model.lora.rank'?"),
        (
            "model.lora.targets=[]",
            "model.lora.targets: targets is empty, so nothing would be trained; name some, or null for all",
        ),
        ("optim.betas=[1]", "optim.betas.1: missing; every configuration of kind rl sets it"),
        ("video.num_frames=8", "video: set exactly one of fps and num_frames; write `fps: null` to use num_frames"),
        (
            "optim.warmup_steps=10",
            "optim: warmup_steps is 10, expected fewer than the 10 steps of the run; "
            "set optim.warmup_steps to at most 9, or steps to more",
        ),
        (
            "rollout.top_k=50",
            "rollout: top_k is 50, but training must draw from the distribution of all tokens, as it scores under "
            "that; remove it, or set eval.top_k for evaluation",
        ),
        (
            "rollout.top_p=0.9",
            "rollout: top_p is 0.9, but training must draw from the distribution of all tokens, as it scores under "
            "that; remove it, or set eval.top_p for evaluation",
        ),
        ("rollout.temperature=0", "rollout: temperature is 0, so all rollouts of a group would be the same; use 1.0"),
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (
            "kind=qickstart",
            f"kind: got \"qickstart\", expected one of {', '.join(KINDS)}; did you mean 'quickstart'?",
        ),
        ("steps={", "malformed YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_bad_override(override, words, base):
    assert message([base], override) == f"override {override!r}: {words}"


def test_an_encoder_that_learns_takes_one_update_a_batch():
    """Its embeddings are made once a step."""
    settings = {"run_dir": "r", "steps": 1, "model": {"path": "m", "train": ["projector"]}}
    with pytest.raises(ValueError, match=r"algo\.updates_per_batch is 2.*set it to 1"):
        RlConfig.model_validate({**settings, "algo": {"updates_per_batch": 2}})
    assert RlConfig.model_validate(settings).algo.updates_per_batch == 1


@pytest.mark.parametrize("override", ["steps", "=3", "optim..lr=1", ".=1"])
def test_override_without_key_or_equals(override, base):
    assert message([base], override) == f"override {override!r}: expected key=value, for example optim.lr=1e-6"


def test_wrong_type_in_a_file_names_the_line(tmp_path):
    path = write(tmp_path / "typed.yaml", BASE.replace("1e-6", "fast"))
    assert message([path]) == f'{path}:7: optim.lr: got "fast", expected a valid number'


def test_all_errors_are_given(base):
    assert message([base], "steps=x", "optim.lr=y", "nope=1", "stepps=2").split("; override") == [
        "override 'nope=1': unknown key 'nope'; the keys here are "
        + ", ".join(name for name in KINDS["rl"].model_fields),
        " 'stepps=2': unknown key 'stepps'; did you mean 'steps'?",
        " 'steps=x': steps: got \"x\", expected a valid integer",
        " 'optim.lr=y': optim.lr: got \"y\", expected a valid number",
    ]


def test_a_misspelt_key_is_one_error(base, tmp_path):
    path = write(tmp_path / "misspelt.yaml", base.read_text().replace("steps:", "stepps:"))
    assert message([path]).endswith("unknown key 'stepps'; did you mean 'steps'?")


def test_warm_up_longer_than_the_run_says_how_to_mend_it(base):
    text = message([base], "optim.warmup_steps=3", "steps=2")
    assert text.endswith(
        "expected fewer than the 2 steps of the run; set optim.warmup_steps to at most 1, or steps to more"
    )


def test_missing_key_and_missing_kind(tmp_path):
    path = write(tmp_path / "short.yaml", "kind: sft\nrun_dir: x\nsteps: 1\n")
    assert message([path]) == f"{path}: model: missing; every configuration of kind sft sets it"
    empty = write(tmp_path / "empty.yaml", "")
    assert message([empty]) == f"{empty}: kind: missing, expected one of {', '.join(KINDS)}"


def test_arguments_split_at_the_equals_sign(base):
    assert load_arguments([str(base), "steps=3"], "rl").steps == 3
    with pytest.raises(ValueError, match="no configuration file among the arguments"):
        load_arguments(["steps=3"])
    with pytest.raises(ValueError, match="kind: got 'rl', this command runs sft"):
        load_arguments([str(base)], "sft")


NASTY = [
    "off",
    "1e-6",
    "1:30",
    "~",
    "",
    " x ",
    "a: b",
    "#",
    "two\nlines\n",
    "tab\there",
    "'\"",
    "ü × 视频",
    "\x85\u2028",
    "0x1f",
]


@pytest.mark.parametrize("text", NASTY)
def test_saved_configuration_reads_back_equal(text, base, tmp_path):
    config = RlConfig.model_validate(
        {
            "run_dir": "runs/../x y",
            "model": {"path": text},
            "steps": 3,
            "data": {"system_prompt": text},
            "rewards": {text: 0.1 + 0.2, "m.n:o": 5e-324},
            "optim": {"lr": 1e-6, "max_grad_norm": 1.7976931348623157e308},
        }
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([tmp_path / "saved.yaml"]) == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "saved.yaml"]


def test_a_failed_save_names_the_path_and_leaves_nothing(base, tmp_path):
    target = tmp_path / "taken"
    (target / "in").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):  # a folder cannot be replaced by a file
        save_config(load_config([base]), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "taken"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configuration_parses_and_saves(path, tmp_path):
    config = load_config([path])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([tmp_path / "saved.yaml"]) == config


def test_the_configuration_page_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "make_config_page.py"))
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == script["make_page"](), "run `make docs`"


def test_configuration_knows_all_formats_and_kinds():
    named = {name: get_args(DataConfig.model_fields[name].annotation) for name in ("format", "kind")}
    assert named["format"] == ("auto", *FORMATS)
    assert get_args(named["kind"][0]) == types.KINDS
