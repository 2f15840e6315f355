"""Checkpoint folders of Qwen2.5-VL: what is written, what is refused; and what identifies an encoder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from longrl.config import ModelConfig
from longrl.models import load_family
from longrl.models.qwen_processor import DEFAULT_LIMITS, frame_size
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.streams import split_length
from longrl.types import Clip, Group, LossInputs, MediaEmbeds, MediaError, Prompt

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tiny() -> Qwen25VL:
    return Qwen25VL.tiny(0, torch.float32)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, dtype: str = "float32") -> Qwen25VL:
    family = load_family(ModelConfig(path=str(folder), dtype=dtype))
    assert isinstance(family, Qwen25VL)
    return family


def logits(family: Qwen25VL) -> torch.Tensor:
    family.model.set_attn_implementation("sdpa")
    return family.model(input_ids=torch.arange(2, 60)[None]).logits


# ---- saving


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_reload_is_the_same_model(tmp_path, dtype):
    """Rotary frequencies are not in the checkpoint: they must be made in the same precision both times."""
    made = Qwen25VL.tiny(3, getattr(torch, dtype))
    made.save(tmp_path)
    loaded = load(tmp_path, dtype)
    assert loaded.model.dtype == made.model.dtype == getattr(torch, dtype)
    ours, theirs = dict(made.model.named_buffers()), dict(loaded.model.named_buffers())
    assert ours.keys() == theirs.keys()
    assert any("inv_freq" in name for name in ours)
    for name, buffer in ours.items():
        assert buffer.dtype == theirs[name].dtype
        assert torch.equal(buffer, theirs[name])
    # to the bit: weights that lie differently in memory would round differently, in fp64 at least
    assert torch.equal(logits(made), logits(loaded))
    assert made.encoder_id == loaded.encoder_id


def test_the_folder_is_complete_for_transformers(tiny, folder):
    """Not checked here, because they need torchvision: the video processor, and the processor that joins all."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in tiny.model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny.tokenizer.chat_template
    images = AutoImageProcessor.from_pretrained(folder)
    made = images(images=[np.zeros((90, 50, 3), np.uint8)], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 6, 4]]
    video = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert video["processor_class"] == "Qwen2_5_VLProcessor"
    assert tuple(video["size"].values()) == tiny.vision.limits["video"]


def test_the_shipped_model_has_the_files_of_its_recipe(tiny, root):
    """Made by an older one it shrank pictures to a single token."""
    for name, text in tiny.files.items():
        assert (root / "assets" / "warm_start" / name).read_text() == text


def test_processor_files_of_the_source_are_kept(folder, tmp_path):
    """Byte by byte, though the source may be gone by then; and none is invented beside them."""
    (folder / "video_preprocessor_config.json").unlink()
    kept = {
        "preprocessor_config.json": '{"min_pixels": 3136, "max_pixels": 50176, "image_mean": [0.5, 0.5, 0.5]}',
        "chat_template.json": '{"chat_template": "{{ messages }}"}',
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    family = load(folder)
    shutil.rmtree(folder)
    family.save(tmp_path / "again")
    for name, text in kept.items():
        assert (tmp_path / "again" / name).read_text() == text
    assert not (tmp_path / "again" / "video_preprocessor_config.json").exists()
    assert load(tmp_path / "again").vision.limits["video"][1] == 50176


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({"preprocessor_config": {"min_pixels": 3136, "max_pixels": 50176}}, (3136, 50176)),
        ({"preprocessor_config": {"size": {"shortest_edge": 784, "longest_edge": 7840}}}, (784, 7840)),
        ({"preprocessor_config": {"max_pixels": 9000, "size": {"shortest_edge": 784, "longest_edge": 1}}}, (784, 9000)),
        ({"preprocessor_config": {"max_pixels": 1}, "video_preprocessor_config": {"max_pixels": 9000}}, (100352, 9000)),
        (
            {"processor_config": {"video_processor": {"size": {"longest_edge": 9000}}}, "preprocessor_config": {}},
            (100352, 9000),
        ),
        ({"processor_config": {}, "preprocessor_config": {"max_pixels": 9000}}, (100352, 9000)),
        ({"preprocessor_config": {"min_pixels": None, "max_pixels": None}}, DEFAULT_LIMITS),
    ],
    ids=["pixels", "size", "both", "video first", "nested first", "not nested", "null"],
)
def test_limits_of_a_frame(folder, files, limits):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    family = load(folder)
    assert family.vision.limits["video"] == limits


# ---- refusing


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The message; nothing else may be printed."""
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^model\.path ") as caught:
        load(folder)
    assert capfd.readouterr() == ("", "")
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_missing_weights(folder, capfd):
    rewrite(folder, lambda weights: [weights.pop(key) for key in list(weights) if "layers.1.mlp" in key])
    line = refusal(folder, capfd)
    assert "3 weights are missing" in line
    assert "model.language_model.layers.1.mlp.down_proj.weight" in line


def test_weights_of_another_size(folder, capfd):
    key = "model.language_model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights.update({key: torch.zeros(5, 128)}))
    line = refusal(folder, capfd)
    assert "1 weights are missing or of another size" in line
    assert key in line


@pytest.mark.parametrize("size", [0, 5, 100_000])
def test_truncated_weights(folder, size, capfd):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    assert "its weights cannot be read" in refusal(folder, capfd)


def test_no_weights(folder, capfd):
    (folder / WEIGHTS).unlink()
    assert "has no model.safetensors; copy its weights again" in refusal(folder, capfd)


def test_no_tokenizer(folder, capfd):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no words in tokenizer.json" in refusal(folder, capfd)


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        (
            ["preprocessor_config.json", "video_preprocessor_config.json"],
            "it has no video_preprocessor_config.json or pre",
        ),
        (["preprocessor_config.json"], "it has no preprocessor_config.json, nor image_processor in processor_config"),
    ],
)
def test_no_processor(folder, capfd, lost, line):
    """transformers' own limits would make 879 tokens of a clip that has 21."""
    for name in lost:
        (folder / name).unlink()
    found = refusal(folder, capfd)
    assert line in found
    assert found.endswith("copy that file from where the model comes from")


def test_no_chat_template(folder, capfd):
    (folder / "chat_template.jinja").unlink()
    assert "chat_template.jinja" in refusal(folder, capfd)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "unheard_of"}'])
def test_not_a_model(folder, text, capfd):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder, capfd) or "no family for model_type 'unheard_of'" in refusal(folder, capfd)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_model_of_several_parts_is_no_text_model(folder, capfd, model_type):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    assert "is one of a model of several parts (text_config, vision_config)" in refusal(folder, capfd)


def test_sliding_window(folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["use_sliding_window"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert "set both off in config.json" in refusal(folder, capfd)


# ---- encoding


def test_encoder_id_tells_encoders_apart(tiny, tmp_path):
    """Another look, other weights, another dtype, another window: another id. The text body does not count."""
    made = {tiny.encoder_id, Qwen25VL.tiny(1, torch.float32).encoder_id, Qwen25VL.tiny(0, torch.float64).encoder_id}
    tiny.save(tmp_path)
    path = tmp_path / "video_preprocessor_config.json"
    path.write_text(path.read_text().replace("784", "3136"))
    made.add(load(tmp_path).encoder_id)
    path.unlink()  # the limits of images are those of videos then
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["window_size"] = 56
    (tmp_path / "config.json").write_text(json.dumps(config))
    made.add(load(tmp_path).encoder_id)
    assert len(made) == 5
    body = Qwen25VL.tiny(0, torch.float32)
    torch.nn.init.zeros_(body.model.lm_head.weight)
    assert body.encoder_id == tiny.encoder_id


def test_encoder_id_is_hashed_once_for_the_same_weights(monkeypatch):
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    family = Qwen25VL.tiny(0, torch.float32)
    before = family.encoder_id
    assert family.encoder_id == before
    assert len(hashed) == 1
    torch.nn.init.zeros_(next(family.model.model.visual.parameters()))
    assert family.encoder_id != before
    assert len(hashed) == 2


def test_a_video_too_narrow_is_named(tiny, tmp_path):
    path = tmp_path / "narrow.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 1024, 4, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((4, 1024, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"narrow\.mp4: a frame of 1024 x 4 pixels is too narrow"):
        tiny.encode(Clip(path=str(path), fps=1.0))


def test_frame_sizes():
    assert frame_size(1080, 1920, 28, 784, 100 * 784) == (196, 364)
    assert frame_size(1, 1, 28, 4 * 784, 8 * 784) == (56, 56)
    assert frame_size(2, 400, 28, 784, 784) == (28, 392)  # no side below 28
    with pytest.raises(ValueError, match="a frame of 401 x 2 pixels is too narrow"):
        frame_size(2, 401, 28, 784, 784)


# ---- records


def media(tokens: int = 4, **changes) -> MediaEmbeds:
    fields = {
        "embeds": torch.zeros(tokens, 8),
        "grid_thw": (tokens, 2, 2),
        "seconds_per_grid": 2.0,
        "timestamps_s": torch.zeros(2 * tokens),
        "key": "k",
    }
    return MediaEmbeds(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"embeds": torch.zeros(17, 8)},
        {"embeds": torch.zeros(4)},
        {"timestamps_s": torch.zeros(3)},
        {"timestamps_s": torch.zeros(4, 2)},
        {"deepstack": torch.zeros(3, 5, 8)},
        {"deepstack": torch.zeros(4, 8)},
    ],
)
def test_media_of_inconsistent_lengths(changes):
    with pytest.raises(AssertionError, match="media k"):
        media(**changes)


def test_a_prompt_that_ends_with_media_is_refused():
    whole = Prompt(
        token_ids=torch.zeros(6, dtype=torch.int64),
        position_ids=torch.zeros(3, 6, dtype=torch.int64),
        media=(media(),),
        media_slots=(((2, 6),),),
    )
    with pytest.raises(AssertionError, match="a prompt of 6 tokens ends with media"):
        split_length([whole])
    assert split_length([whole.followed_by([1])]) == 6


def test_a_group_has_rollouts():
    with pytest.raises(AssertionError, match="group g"):
        Group(id="g", example=None, prompt=None, rollouts=())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask"])
def test_loss_inputs_of_inconsistent_shapes(name):
    fields = {key: torch.zeros(2, 3) for key in ("logprobs", "old_logprobs", "ref_logprobs")}
    fields |= {"advantages": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    LossInputs(**fields)
    LossInputs(**{**fields, "ref_logprobs": None})
    with pytest.raises(AssertionError):
        LossInputs(**{**fields, name: fields[name][:1]})
