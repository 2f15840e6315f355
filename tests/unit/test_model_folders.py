"""Checkpoint folders of every family: what is wrong is told in a line, and what published ones have besides is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import longrl
from longrl.config import ModelConfig
from longrl.models import load_family
from longrl.models.vila import Vila, tiny_content, tiny_tokenizer
from longrl.models.vila_config import FOLDS
from longrl.types import Clip, Example, Message
from longrl.video.encode import embed

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def twins() -> dict[str, Any]:
    """Family -> its twin, made when it is asked for."""

    class Twins(dict):
        def __missing__(self, name: str) -> Any:
            self[name] = load_family(ModelConfig(path=f"tiny:{name}"))
            return self[name]

    return Twins()


def change(file: Path, **changes: Any) -> None:
    """Of a file of JSON; a dict goes into the one that is there."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content))


def add(file: Path, *names: str) -> None:
    """Weights that the file has not."""
    weights = load_file(file) | {name: torch.zeros(2) for name in names}
    save_file(weights, file, metadata={"format": "pt"})


def drop(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(weights)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def lose_an_old_shard(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model-00001-of-00002.bin")
    places = dict.fromkeys(weights, "pytorch_model-00001-of-00002.bin") | {"b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def replace_projector(folder: Path) -> None:
    """mlp2x_gelu, it says, and holds mlp3x_gelu: one of the two has been copied from elsewhere."""
    weights = {f"layers.{i}.weight": torch.zeros(128, 64 if i == 0 else 128) for i in (0, 2, 4)}
    weights |= {f"layers.{i}.bias": torch.zeros(128) for i in (0, 2, 4)}
    save_file(weights, folder / "mm_projector" / WEIGHTS, metadata={"format": "pt"})
    change(folder / "mm_projector" / "config.json", mm_projector_type="mlp2x_gelu")


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "fewer layers than weights": (
        "qwen2",
        lambda f: change(f / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "24 weights have no place in the model that config.json describes: model.layers.2.input_layernorm.weight, ",
    ),
    "a layer too many": (
        "qwen3",
        lambda f: add(f / WEIGHTS, "model.layers.9.mlp.up_proj.weight"),
        "1 weights have no place in the model that config.json describes: model.layers.9.mlp.up_proj.weight; copy",
    ),
    "both parts cut down": (
        "qwen2_5_vl",
        lambda f: change(
            f / "config.json",
            text_config={"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
            vision_config={"depth": 1, "fullatt_block_indexes": [0]},
        ),
        "weights have no place in the model that config.json describes: model.language_model.layers.2.",
    ),
    "a deeper projector": (
        "vila",
        replace_projector,
        "mm_projector: 2 weights have no place in the model that config.json describes: layers.4.bias, layers.4.weight",
    ),
    "a deeper tower": (
        "vila",
        lambda f: add(f / "vision_tower" / WEIGHTS, "vision_model.encoder.layers.3.mlp.fc1.bias"),
        "1 weights have no place in the model that config.json describes: ",
    ),
    "an identity of two widths": (
        "vila",
        lambda f: change(f / "mm_projector" / "config.json", mm_projector_type="identity"),
        "mm_projector: identity makes no 128 numbers of 64; name the mm_projector_type that was trained",
    ),
    "no tokenizer": (
        "qwen2",
        lambda f: drop(f, "tokenizer*"),
        " has no words in tokenizer.json (or vocab.json with merges.txt); copy its tokenizer again",
    ),
    "no tokenizer.json": (
        "qwen2",
        lambda f: drop(f, "tokenizer.json"),
        " has no words in tokenizer.json (or vocab.json with merges.txt); copy its tokenizer again",
    ),
    "no tokenizer of VILA": (
        "vila",
        lambda f: drop(f, "llm/tokenizer*"),
        "/llm has no words in tokenizer.json (or vocab.json with merges.txt); copy its tokenizer again",
    ),
    "an empty tokenizer": (
        "qwen2",
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "/tokenizer.json says what transformers cannot use (KeyError: 'added_tokens'); copy it again",
    ),
    "a tokenizer of another time": (
        "qwen2",
        lambda f: change(f / "tokenizer.json", pre_tokenizer={"type": "NotYet"}),
        "/tokenizer.json says what transformers cannot use (Exception: ",
    ),
    "a lost file of old weights": (
        "qwen2",
        lose_an_old_shard,
        " lacks 1 of the 2 files that pytorch_model.bin.index.json names: pytorch_model-00002-of-00002.bin; copy",
    ),
    "files by number": (
        "qwen2",
        lambda f: (drop(f, WEIGHTS), (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": 3}}')),
        " lacks 1 of the 1 files that model.safetensors.index.json names: 3; copy",
    ),
    "several model types": (
        "qwen2",
        lambda f: change(f / "config.json", model_type=["qwen2"]),
        "no family for model_type ['qwen2']; known: qwen2, ",
    ),
    "width in letters": (
        "qwen2",
        lambda f: change(f / "config.json", hidden_size="big"),
        "Field 'hidden_size' expected int, got str (value: 'big')); copy it again",
    ),
    "no heads": (
        "vila",
        lambda f: change(f / "llm" / "config.json", num_attention_heads=0),
        "/llm/config.json says what transformers cannot use (ZeroDivisionError: ",
    ),
    "no weights": ("vila", lambda f: drop(f, "llm/model*"), "/llm has no model.safetensors; copy its weights again"),
    "a shard lost": (
        "qwen2",
        lose_a_shard,
        " lacks 1 of the 2 files that model.safetensors.index.json names: model-00002-of-00002.safetensors; copy",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(twins, tmp_path, capfd, name):
    family, spoil, why = BAD[name]
    twins[family].save(tmp_path)
    spoil(tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^model\.path ") as caught:
        load_family(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for x in", "unexpected 'end of template'"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
    ],
)
def test_chat_templates_that_fail(twins, tmp_path, template, why):
    twins["qwen2"].save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    family = load_family(ModelConfig(path=str(tmp_path)))
    example = Example(id="q", messages=(Message(role="user", content=("why?",)),), answer=None, kind="open")
    with pytest.raises(ValueError, match=r"example q: .*; mend chat_template\.jinja, or the messages$") as caught:
        family.prompt(example, ())
    assert f"{tmp_path} fails on its messages ({why}" in str(caught.value)


def test_a_path_that_is_none():
    with pytest.raises(ValueError, match=r"longrl\.load: path is 3, expected a model's folder or tiny:FAMILY; write"):
        longrl.load(3)  # pyright: ignore


@pytest.mark.parametrize(
    ("family", "file", "names"),
    [
        ("qwen2", WEIGHTS, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("qwen2_5_vl", WEIGHTS, ["visual.rotary_pos_emb.inv_freq"]),
        ("qwen2_5_omni", WEIGHTS, ["talker.model.norm.weight", "token2wav.code2wav_dit_model.x.weight"]),
        ("vila", f"llm/{WEIGHTS}", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("vila", f"vision_tower/{WEIGHTS}", ["vision_model.head.probe", "vision_model.embeddings.position_ids"]),
    ],
)
def test_what_published_files_hold_besides_is_not_read(twins, tmp_path, family, file, names):
    twins[family].save(tmp_path)
    add(tmp_path / file, *names)
    load_family(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp2x_gelu", *FOLDS])
def test_every_projector_of_vila_is_asked_and_kept(tmp_path, kind):
    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer) | {"mm_projector_cfg": {"mm_projector_type": kind}}
    content["vision_tower_cfg"]["hidden_size"] = 128 if kind == "identity" else 72
    family = Vila.make(content, tokenizer, 0, torch.float32)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    clip = Clip(path=str(tmp_path / "red.png"), kind="image")
    message = Message(role="user", content=(clip, "which colour?"))
    example = Example(id="q", messages=(message,), answer=None, kind="open")
    family.save(tmp_path / "model")
    read = load_family(ModelConfig(path=str(tmp_path / "model")))
    media, again = (embed(clip, one, None) for one in (family, read))
    size = read.measure(clip)
    assert size.num_bytes == media.embeds.nbytes + media.timestamps_s.nbytes
    assert len(family.prompt(example, (media,))) == family.count_tokens(example, [size.prompt_tokens])
    assert torch.equal(media.embeds, again.embeds)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_a_tied_head_may_be_in_the_file(twins, tmp_path, family):
    twins[family].save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    embed = next(weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    save_file(weights | {"lm_head.weight": embed.clone()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    load_family(ModelConfig(path=str(tmp_path)))
