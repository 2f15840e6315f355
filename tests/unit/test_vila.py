"""VILA: folders of three parts, written and refused; what is measured, encoded and prompted; tiles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import render
from PIL import Image
from safetensors.torch import load_file, save_file

from longrl.config import LoraConfig, ModelConfig
from longrl.generate import generate_command
from longrl.models import adapters, load_family, vila_vision
from longrl.models.merging import merge_folder
from longrl.models.vila import PARTS, Vila, tiny_content, tiny_tokenizer
from longrl.models.vila_tiles import choose_grid
from longrl.plan.shapes import shape_of
from longrl.types import Clip, Example, MediaError, MediaSize, Message
from longrl.video.encode import embed

TSP = '{"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 1, 1]]}'
S2 = {"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "28,56"}


@pytest.fixture(scope="module")
def tiny() -> Vila:
    return Vila.tiny(0, torch.float32)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def make(**changes: Any) -> Vila:
    tokenizer = tiny_tokenizer()
    return Vila.make(tiny_content(tokenizer) | changes, tokenizer, 0, torch.float32)


def load(folder: Path) -> Vila:
    family = load_family(ModelConfig(path=str(folder)))
    assert isinstance(family, Vila)
    return family


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = {part: load_file(folder / part / "model.safetensors") for part in PARTS}
    return {f"{part}/{name}": x for part in parts for name, x in parts[part].items()}


# ---- saving


def test_a_reload_is_the_same_model_key_for_key(tiny, folder, tmp_path):
    loaded = load(folder)
    loaded.save(tmp_path / "again")
    before, after = weights(folder), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = tiny.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.encoder_id == tiny.encoder_id
    assert loaded.stop_ids == tiny.stop_ids
    for name in ("config.json", "llm/config.json", "vision_tower/preprocessor_config.json"):
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()
    text = "12 What's first?\n\n<image> B."
    assert loaded.tokenizer.encode(text) == tiny.tokenizer.encode(text)


def test_names_are_those_of_nvlabs(folder):
    """benchmarks/vila_reference.py compares all of them with NVlabs' own code."""
    names = weights(folder).keys()
    layers = {name.replace(".0.", ".N.") for name in names if ".layers.0." in name}
    assert {
        "llm/model.layers.N.self_attn.q_proj.weight",
        "vision_tower/vision_model.encoder.layers.N.mlp.fc1.weight",
    } <= layers
    assert {"llm/model.norm.weight", "vision_tower/vision_model.embeddings.patch_embedding.weight"} <= names
    projector = {name for name in names if name.startswith("mm_projector/")}
    assert projector == {f"mm_projector/layers.{i}.{kind}" for i in (1, 2, 4) for kind in ("weight", "bias")}
    content = json.loads((folder / "config.json").read_text())
    assert content["mm_hidden_size"] == 64
    assert content["llm_cfg"]["rope_theta"] == 1e5


def test_weights_that_are_given_are_written(tiny, tmp_path):
    """As of a model whose weights are shared out to ranks, which holds none of them in full."""
    given = {name: x + 1 for name, x in tiny.model.state_dict().items()}
    tiny.save(tmp_path, given)
    saved = load(tmp_path).model.state_dict()
    assert all(torch.equal(saved[name], x) for name, x in given.items())


def test_adapters_go_into_the_body_and_are_merged(folder, tmp_path):
    family = load_family(ModelConfig(path=str(folder), lora=LoraConfig(rank=2)))
    trained = adapters.parameters(family.model)
    assert len(trained) == 2 * 7 * 4  # A and B of seven products in four layers
    assert all(name.startswith("llm.model.layers.") for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.01
    adapters.save(family, tmp_path / "adapters", trained)
    merge_folder(folder, tmp_path / "adapters", tmp_path / "merged", torch.bfloat16)
    in_memory = load_family(ModelConfig(path=str(tmp_path / "merged"))).model.state_dict()
    assert in_memory.keys() == load(folder).model.state_dict().keys()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_dtype"] == "torch.bfloat16"
    merge_folder(folder, tmp_path / "adapters", tmp_path / "merged in fp32", torch.float32)
    before, after = weights(folder), weights(tmp_path / "merged in fp32")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 28
    assert all(name.startswith("llm/model.layers.") for name in changed)


@pytest.mark.parametrize("model_type", ["vila", "llava_llama"])
def test_what_the_checkpoint_calls_itself_is_kept(folder, tmp_path, model_type):
    change_config(folder, model_type=model_type, fps=8.0)
    load(folder).save(tmp_path / "again")
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (content["model_type"], content["fps"]) == (model_type, 8.0)


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2"])
def test_its_sizes_are_planned(tmp_path, kind):
    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer) | {"mm_projector_cfg": {"mm_projector_type": kind}, "video_encoder": TSP}
    content["vision_tower_cfg"] |= {"vision_use_head": True, "image_size": 70}
    family = Vila.make(content, tokenizer, 0, torch.float32)
    family.save(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape
    assert shape.vision
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    model = family.model
    assert shape.trunk_parameters == count(model.llm)
    assert shape.vision.merger_parameters(shape.width) == count(model.mm_projector)
    assert shape.tower_parameters == count(model.vision_tower) + count(model.mm_projector)
    assert shape.vision.tokens("video", 9, 480, 640, None) == 3 * (family.vision.tokens("video") + 1)
    assert shape.vision.tokens("image", 1, 480, 640, None) == family.vision.tokens("image") + 1


# ---- refusing


def change_config(folder: Path, part: str = "", **changes: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_processor(folder: Path, **changes: Any) -> None:
    path = folder / "vision_tower" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def wider_body(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer)
    content["llm_cfg"] |= {"hidden_size": 192, "num_attention_heads": 6}
    Vila.make(content, tokenizer, 0, torch.float32).model.llm.save_pretrained(folder / "llm")


def lose_a_layer(folder: Path) -> None:
    path = folder / "vision_tower" / "model.safetensors"
    kept = {name: x for name, x in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(kept, path, metadata={"format": "pt"})


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tower": (
        lambda f: shutil.rmtree(f / "vision_tower"),
        "it has no vision_tower/config.json; a VILA",
    ),
    "no projector weights": (lambda f: (f / "mm_projector" / "model.safetensors").unlink(), "model/mm_projector"),
    "no processor": (lambda f: (f / "vision_tower" / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "a layer lost": (lose_a_layer, "4 weights are missing"),
    "mixed": (wider_body, "(a mlp_downsample_2x2_fix from 64, of its vision_tower, to 192, of its llm"),
    "another body": (lambda f: change_config(f, "llm", model_type="llama"), "its llm is of model_type 'llama'"),
    "another tower": (lambda f: change_config(f, "vision_tower", model_type="clip"), "expected 'siglip_vision_model'"),
    "projector": (
        lambda f: change_config(f, "mm_projector", mm_projector_type="mlp_downsample_4x4"),
        "'mlp_downsample_4x4' is not known; known: identity, linear, mlp<N>x_gelu, mlp_downsample, ",
    ),
    "other projector": (
        lambda f: change_config(f, "mm_projector", mm_projector_type="linear"),
        "a linear from 64",
    ),
    "no projector": (lambda f: change_config(f, "mm_projector", mm_projector_type=None), "has no mm_projector_type"),
    "tiling": (lambda f: change_config(f, image_aspect_ratio="pad"), "known: resize, dynamic, dynamic_s2"),
    "half of S2": (lambda f: change_config(f, image_aspect_ratio="dynamic_s2"), "dynamic_s2 is False"),
    "S2": (lambda f: change_config(f, s2=True), "fixed S2 scales are not supported"),
    "scales": (lambda f: change_config(f, **(S2 | {"s2_scales": "28,50"})), "s2_scales of config.json is '28,50'"),
    "patch": (lambda f: change_config(f, mm_vision_select_feature="patch"), "expected cls_patch"),
    "layer": (lambda f: change_config(f, mm_vision_select_layer=-5), "its vision_tower has 3 layers; expected -4 to 3"),
    "pool": (
        lambda f: change_config(f, video_encoder='{"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8,1,1],[1,2,2]]}'),
        "expected one size of frames, rows and columns",
    ),
    "pool too wide": (
        lambda f: change_config(f, video_encoder=TSP.replace("[4, 1, 1]", "[1, 2, 2]")),
        "pools 2 x 2",
    ),
    "encoder": (lambda f: change_config(f, image_encoder={"_target_": "x.Odd"}), "known: BasicImageEncoder"),
    "pool of nothing": (
        lambda f: change_config(f, video_encoder=TSP.replace("[4, 1, 1]", "[0, 1, 1]")),
        "video_encoder pools by [[0, 1, 1]]; expected one size",
    ),
    "no JSON of an encoder": (
        lambda f: change_config(f, video_encoder="{"),
        "video_encoder of config.json is '{'",
    ),
    "no tiles": (lambda f: change_config(f, max_tiles=0), "max_tiles of config.json is 0, expected a whole number, 1"),
    "fewer tiles than the least": (lambda f: change_config(f, min_tiles=13), "min_tiles of config.json is 13, max_til"),
    "tiles of all scales": (lambda f: change_config(f, **S2, max_tiles=3), "max_tiles of config.json is 3, but"),
    "scales in letters": (
        lambda f: change_config(f, **(S2 | {"s2_scales": "a,b"})),
        "s2_scales of config.json is 'a,",
    ),
    "no such scale": (lambda f: change_config(f, **S2, s2_resize_output_to_scale_idx=2), "is 2, but there are 2 s2_sc"),
    "layer in letters": (
        lambda f: change_config(f, mm_vision_select_layer="last"),
        "mm_vision_select_layer of config.json is 'last', expected a whole number",
    ),
    "a list": (
        lambda f: (f / "mm_projector" / "config.json").write_text("[]"),
        "its mm_projector/config.json is not a JSON object (it is a list)",
    ),
    "broken": (
        lambda f: (f / "llm" / "tokenizer.json").write_text("{"),
        "its llm/tokenizer.json is not a JSON object (Expecting property name",
    ),
    "processor of another tower": (
        lambda f: change_processor(f, size={"height": 56, "width": 56}),
        'size of vision_tower/preprocessor_config.json is {"height": 56, "width": 56}, but its vision_tower takes 28 x',
    ),
    "mean of one colour": (lambda f: change_processor(f, image_mean=0.5), "is 0.5; expected three numbers"),
    "template": (lambda f: change_config(f, chat_template="qwen2"), "there is no qwen2.jinja"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(folder, capfd, name):
    change, why = BAD[name]
    change(folder)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^model\.path ") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_chat_template_beside_config_json(folder):
    change_config(folder, chat_template="mine")
    (folder / "mine.jinja").write_text("{% for m in messages %}\n    {{ '[' + m.content + ']' }}\n{% endfor %}\n")
    family = load(folder)
    assert family.tokenizer.decode(family.template_ids(question("why?"), 0)) == "[why?]"


# ---- what is seen


def question(*parts: str | Clip) -> Example:
    return Example(id="q", messages=(Message(role="user", content=parts),), answer=None, kind="open")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    render(folder / "video.mp4")
    for name, size in {"wide": (40, 100), "small": (10, 12)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, [19, 1, 1]),
        ({"video_encoder": TSP}, [5, 1, 1]),
        ({"image_aspect_ratio": "dynamic", "max_tiles": 5}, [19, 4, 1]),
        (S2, [19, 1, 1]),
        (S2 | {"s2_resize_output_to_scale_idx": 1}, [19, 10, 12]),
    ],
    ids=["resized", "pooled", "tiles", "scales", "largest scale"],
)
def test_what_is_measured_is_what_encoding_gives(monkeypatch, files, changes, tokens):
    monkeypatch.setattr(vila_vision, "CHUNK_FRAMES", 8)
    family = make(**changes)
    video = Clip(path=str(files / "video.mp4"), num_frames=19)
    images = [Clip(path=str(files / name), kind="image") for name in ("wide.png", "small.png")]
    for clip, count in zip([video, *images], tokens, strict=True):
        media, size = embed(clip, family, None), family.measure(clip)
        assert size.num_tokens == len(media.embeds) == count
        assert size.prompt_tokens == family.prompt_tokens(media)
        assert size.num_bytes == media.embeds.nbytes + media.timestamps_s.nbytes
        example = question(clip, "What?")
        assert family.count_tokens(example, [size.prompt_tokens]) == len(family.prompt(example, (media,)))
        if clip is video:
            require_same_bits_by_chunk(family, clip, size, media.embeds)


def require_same_bits_by_chunk(family: Vila, clip: Clip, size: MediaSize, whole: torch.Tensor) -> None:
    assert (size.num_chunks, size.chunk_frames) == (3, 8)
    for i in range(size.num_chunks):
        (alone,) = family.encode(clip, range(i, i + 1))
        assert torch.equal(alone.embeds, whole[i * size.chunk_tokens : (i + 1) * size.chunk_tokens])


def test_a_thousand_frames_are_asked_about(tmp_path, capsys):
    """In chunks of 64; docs/models.md has the figures of 8,192."""
    path = render(tmp_path / "long.mp4", [i / 25 for i in range(1024)])
    clip, about = Clip(path=str(path), num_frames=1024), {"cache_dir": str(tmp_path / "cache")}
    generate_command("tiny:vila", [clip], "What?", 2, False, {"max_new_tokens": 4}, 0, False, True, about)
    found = json.loads(capsys.readouterr().out)
    assert 2048 < found["prompt_tokens"] < 2048 + 32
    assert len(found["responses"]) == 2


def test_a_clip_that_cannot_be_shown_smaller(tiny, files):
    clip = Clip(path=str(files / "video.mp4"), fps=1.0, max_pixels=28 * 28 - 1)
    for look in (tiny.measure, tiny.encode):
        with pytest.raises(MediaError, match=r"video\.mp4: max_pixels is 783, but .* 28 x 28 pixels; leave max_pixels"):
            look(clip)
    with pytest.raises(ValueError, match="vila takes text, image, video, not audio"):
        tiny.measure(Clip(path="a.wav", kind="audio"))


def test_encoder_id_tells_what_decides_the_embeddings(tiny):
    others = [Vila.tiny(1, torch.float32), make(mm_vision_select_layer=-1), make(video_encoder=TSP)]
    assert len({tiny.encoder_id, *(other.encoder_id for other in others)}) == 4
    body = Vila.tiny(0, torch.float32)
    torch.nn.init.zeros_(body.model.llm.lm_head.weight)
    assert body.encoder_id == tiny.encoder_id


# ---- prompts


def test_every_frame_is_followed_by_a_newline(tiny, files):
    clips = Clip(path=str(files / "video.mp4"), num_frames=3), Clip(path=str(files / "wide.png"), kind="image")
    prompt = tiny.prompt(question(" see ", clips[0], clips[1], "why? "), tuple(embed(x, tiny, None) for x in clips))
    assert tiny.tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>user\nsee <vila/video>\n<vila/video>\n<vila/video>\n<image>\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [len(ranges) for ranges in prompt.media_slots] == [3, 1]
    start = prompt.media_slots[0][0][0]
    assert prompt.media_slots == (tuple((start + i, start + i + 1) for i in (0, 2, 4)), ((start + 6, start + 7),))
    assert prompt.position_ids.tolist() == [list(range(len(prompt)))]


def test_every_tile_has_a_line_of_its_own(files):
    """2.5 : 1 is as near to two tiles as to three, for which it has pixels; a small one of the whole comes fourth."""
    family = make(image_aspect_ratio="dynamic", max_tiles=5)
    clip = Clip(path=str(files / "wide.png"), kind="image")
    prompt = family.prompt(question(clip, "why?"), (embed(clip, family, None),))
    assert "user\n" + 4 * "<image>\n\n" + "why?" in family.tokenizer.decode(prompt.token_ids)
    assert len(prompt.media_slots[0]) == 4


@pytest.mark.parametrize("parts", [("<image> why?",), ("<vila/video>",)])
def test_placeholders_without_media(tiny, parts):
    with pytest.raises(ValueError, match=r"example q: 1 media placeholders \((image|video)\) in the text for 0 clips"):
        tiny.prompt(question(*parts), ())


def test_media_without_placeholders(tiny, files):
    clip = Clip(path=str(files / "wide.png"), kind="image")
    media = embed(clip, tiny, None)
    with pytest.raises(ValueError, match=r"example q: 1 media placeholders \(image\) in the text for 2 clips"):
        tiny.prompt(question(clip, "why?"), (media, media))


@pytest.mark.parametrize(
    ("size", "least", "most", "grid"),
    [
        ((100, 100), 1, 12, (1, 1)),
        ((400, 400), 1, 12, (3, 3)),  # the most tiles of this shape, as there are pixels for them
        ((300, 300), 1, 12, (3, 3)),
        ((100, 210), 1, 12, (1, 2)),
        ((210, 100), 1, 12, (2, 1)),
        ((100, 100), 4, 12, (2, 2)),
        ((10, 1000), 1, 6, (1, 6)),
        ((100, 149), 1, 6, (2, 3)),
    ],
)
def test_the_grid_of_tiles_nearest_to_the_shape(size, least, most, grid):
    assert choose_grid(*size, side=100, least=least, most=most) == grid
