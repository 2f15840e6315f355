"""`longrl check` of a generator: rewards, sizes and packages as the run finds them, without loading it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from longrl.check import check_command
from longrl.check_flow import flow_rows, require_size
from longrl.config import ModelConfig
from longrl.config_files import load_config
from longrl.flow_config import FlowConfig, MediaConfig
from longrl.models.media import load_media_family
from longrl.rewards.media import MediaRewards
from tests.unit.test_flow import BASE

SIZES = [
    (16, 16, 1),
    (16, 32, 5),
    (17, 16, 1),
    (16, 30, 1),
    (16, 16, 4),
    (128, 132, 1),
    (8, 8, 2),
    (1, 2, 1),
    (20, 20, 1),
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red picture")
    Path("run.yaml").write_text(BASE)

    def load(*overrides):
        loaded = load_config([Path("run.yaml")], overrides)
        assert isinstance(loaded, FlowConfig)
        return loaded

    return load


def said(require) -> str | None:
    try:
        require()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_sizes_are_those_of_the_family(tmp_path, name):
    family = load_media_family(ModelConfig(path=f"tiny:{name}"))
    family.pipe.save_pretrained(tmp_path / name)
    messages = set()
    for height, width, frames in SIZES:
        expected = said(lambda size=(height, width, frames): family.require_size(*size))
        media = MediaConfig(height=height, width=width, frames=frames)
        for path in (f"tiny:{name}", str(tmp_path / name)):
            found = said(lambda path=path, media=media: require_size(path, media))
            assert found == expected
        messages.add(expected)
    assert len(messages) > 4
    odd = tmp_path / name / "vae" / "config.json"
    for text in (
        "[]",
        '{"block_out_channels": 1, "scale_factor_temporal": 0}',
        '{"scale_factor_spatial": "8"}',
        "{",
        None,
    ):
        odd.unlink() if text is None else odd.write_text(text)
        require_size(str(tmp_path / name), MediaConfig(height=17, width=17))  # nothing is known


def test_published_wan_has_the_defaults_of_diffusers(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for part, content in (("vae", {"z_dim": 16}), ("transformer", {"patch_size": [1, 2, 2]})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    require_size(str(tmp_path), MediaConfig(height=480, width=832, frames=81))
    with pytest.raises(ValueError, match=r"media\.frames is 80, expected 1 \+ a multiple of 4, .*use 81"):
        require_size(str(tmp_path), MediaConfig(height=480, width=832, frames=80))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards.colou=1", "reward: unknown reward 'colou': expected one of .*clip.*vlm; did you mean 'colour'"),
        ("rewards={'my.py:f': 1}", "reward 'my.py:f' cannot be imported: there is no file"),
        ("rewards.colour=0", "at least one reward needs a weight other than 0"),
        ("media.width=17", r"media\.width is 17, expected a multiple of 4 up to 128"),
        ("media.frames=2", r"media\.frames is 2, but the model makes images"),
        ("scorers.services.mine={url: 'http://h/', key_env: NO_SUCH_KEY}", "variable NO_SUCH_KEY is not set"),
        ("scorers.vlm.models.a={model: m, key_env: NO_SUCH_KEY}", "variable NO_SUCH_KEY is not set"),
    ],
)
def test_what_a_run_refuses(config, override, words):
    weights = {"services": "rewards.mine=1", "vlm": "rewards.vlm=1"}
    more = [weight for name, weight in weights.items() if name in override]
    with pytest.raises(ValueError, match=f"the run cannot start: .*{words}"):
        check_command(config(override, *more))


def test_a_run_lists_all_rewards_too():
    with pytest.raises(ValueError, match=r"unknown reward 'colou'.* clip, colour, hpsv2, jpeg_size, ocr, pickscore"):
        MediaRewards({"colou": 1.0})


@pytest.mark.parametrize("package", ["diffusers", "openai", "httpx2", "rapidocr"])
def test_missing_packages_are_named(config, monkeypatch, package):
    there = importlib.util.find_spec
    monkeypatch.setattr("longrl.check_flow.find_spec", lambda name: None if name == package else there(name) or True)
    scorers = ["scorers.services.mine={url: 'http://h/'}", "scorers.vlm.models.a={model: m, key_env: null}"]
    rewards = ["rewards={colour: 1, mine: 1, vlm: 1, ocr: 1}"]
    problems = [problem for _, _, problem in flow_rows(config(*scorers, *rewards)) if problem]
    assert len(problems) == 1
    assert f"{package}" in problems[0]
    assert "pip install 'longrl[" in problems[0]


def test_rewards_are_rows_and_no_plan_is_promised(config, capsys):
    check_command(config())
    shown = capsys.readouterr().out
    assert "  reward     colour, weight 1\n" in shown
    assert "  plan       memory and time of generators are not planned\n" in shown
    for options, words in (({"device": "H100"}, "--device H100"), ({"processes": 2}, "--processes 2")):
        with pytest.raises(ValueError, match=f"{words}: runs of kind flow are not planned; leave "):
            check_command(config(), **options)
    with pytest.raises(ValueError, match="no device 'TPU'"):
        check_command(config(), "TPU")
