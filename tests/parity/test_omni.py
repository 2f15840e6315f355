"""Qwen2.5-Omni against transformers from samples and pixels: features, embeddings, positions, log-probs, gradients."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor

from longrl import Audio, Image, Video
from longrl.config import ModelConfig
from longrl.data.synthetic.render import render
from longrl.data.synthetic.world import make_story
from longrl.models import load_family, omni_audio
from longrl.models.omni import Omni
from longrl.models.omni_audio import RATE
from longrl.models.qwen_vision import Resize
from longrl.models.streams import make_streams
from longrl.policy import Policy
from longrl.types import Clip, Example, MediaError, Message, Prompt
from longrl.video.audio import read_audio
from longrl.video.decode import read_frames
from longrl.video.encode import embed
from longrl.video.image import read_image
from tests.parity.test_shared_prefix import gradients, largest_difference, responses_of

SECONDS = 10.6


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """With sound, five windows and a piece."""
    path = tmp_path_factory.mktemp("omni") / "video.mp4"
    render(make_story(3, SECONDS), path, fps=2.0, width=64, height=64, audio=True)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def clips_of(video: Path, picture: Path) -> dict[str, tuple[Clip, ...]]:
    """Sparse frames too: several windows of sound pass between two of them."""
    seen, sparse = Video(str(video), fps=2.0), Video(str(video), num_frames=4)
    heard = Clip(path=str(video), kind="audio", with_video=True)
    return {
        "sound": (Audio(str(video)),),
        "sound, image, video": (Audio(str(video), start_s=1.0, end_s=4.5), Image(str(picture)), seen),
        "video with sound": (seen, heard),
        "sparse video with sound": (sparse, heard),
    }


def make(dtype: torch.dtype, clips: tuple[Clip, ...]) -> tuple[Omni, Prompt]:
    family = Omni.tiny(0, dtype)
    family.vision.limits["video"] = (28 * 28, 56 * 56)
    family.vision.limits["image"] = (28 * 28, 40 * 70)
    example = Example(
        id="q", messages=(Message(role="user", content=("look", *clips, "what?")),), answer=None, kind="open"
    )
    media = tuple(embed(clip, family, None) for clip in clips)
    prompt = family.prompt(example, media)
    assert len(prompt) == family.count_tokens(example, [family.prompt_tokens(one) for one in media])
    for clip, one in zip(clips, media, strict=True):
        size = family.measure(clip)
        assert (size.num_tokens, size.prompt_tokens) == (len(one.embeds), family.prompt_tokens(one))
    return family, prompt


def stock_inputs(family: Omni, prompt: Prompt) -> dict:
    """What transformers' own extractor and rules make of the files; patches by our processor, tested by itself."""
    extract = WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    keys = ("sound", "length", "image", "image grid", "video", "video grid")
    found: dict[str, list] = {name: [] for name in (*keys, "seconds")}
    for media in prompt.media:
        clip = media.clip
        assert clip
        if clip.kind == "audio":
            samples = read_audio(clip.path, clip.start_s, clip.end_s)
            made = extract(samples, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
            found["sound"].append(made["input_features"].to(family.model.dtype))
            found["length"].append(made["attention_mask"])
            continue
        chunks = [read_image(clip.path)] if clip.kind == "image" else read_frames(clip)
        frames = np.concatenate([chunk.pixels for chunk in chunks])
        even = np.concatenate([frames, frames[-1:].repeat(len(frames) % 2, 0)])
        rows, grid = family.vision.patches(even, Resize(clip.kind, len(frames), None))
        found[clip.kind].append(rows)
        found[f"{clip.kind} grid"].append(grid)
        if clip.kind == "video":
            found["seconds"].append(media.seconds_per_grid)
    names = {
        "input_features": lambda: torch.cat(found["sound"]),
        "feature_attention_mask": lambda: torch.cat(found["length"]),
        "pixel_values": lambda: torch.cat(found["image"]),
        "image_grid_thw": lambda: torch.tensor(found["image grid"]),
        "pixel_values_videos": lambda: torch.cat(found["video"]),
        "video_grid_thw": lambda: torch.tensor(found["video grid"]),
    }
    inputs = {name: make() for (name, make), key in zip(names.items(), keys, strict=True) if found[key]}
    return inputs | {"video_second_per_grid": torch.tensor(found["seconds"])} if found["seconds"] else inputs


# as in test_shared_prefix: transformers' norms and rotary embedding compute in fp32 whatever the dtype; so do the
# features of sound, here and there
F64, F32 = (torch.float64, 5e-7), (torch.float32, 1e-5)


@pytest.mark.parametrize(
    ("case", "dtype", "bound"),
    [
        ("sound", *F64),
        ("sound, image, video", *F32),
        ("video with sound", *F64),
        ("video with sound", *F32),
        ("sparse video with sound", *F32),
    ],
)
def test_whole_forward_and_gradients(monkeypatch, video, picture, case, dtype, bound):
    """Stock transformers finds its own positions and merges its own embeddings; the towers learn, in pieces of a window
    (of a temporal patch) here, in one graph there."""
    monkeypatch.setattr(omni_audio, "BACKWARD_WINDOWS", 1)
    clips = clips_of(video, picture)[case]
    family, prompt = make(dtype, clips)
    policy = Policy(family, train=("language", "projector", "tower"))
    responses = responses_of(family, [4, 6])
    weights = torch.tensor([1.0, -0.7], dtype=dtype)
    prefix = policy.prefix([prompt, prompt])
    streams, seen = make_streams([prompt] * 2, responses, prefix.length), []

    def loss(logprobs, entropy, rows):
        seen.append(logprobs.detach())
        return (weights[rows, None] * logprobs).sum()

    policy.backward(prefix, streams, loss)
    ours, model = gradients(family), family.model
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa", "audio_config": "sdpa"})
    heard = any(clip.with_video for clip in clips)
    for response, weight, mine in zip(responses, weights, torch.cat(seen), strict=True):
        ids = torch.cat([prompt.token_ids, torch.tensor(response)])[None]
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=heard,
            **stock_inputs(family, prompt),
        ).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        (weight * logp.sum()).backward()
        rest = len(prompt) - prefix.length - 1
        assert (mine[rest : rest + len(response)] - logp.detach()).abs().max() < max(bound, 1e-5)
    assert largest_difference(ours, gradients(family)) < bound


def test_features(video):
    """transformers' extractor, and what comes in pieces; fp32, features up to 1.5."""
    family = Omni.tiny(0, torch.float32)
    samples = read_audio(str(video))
    theirs = WhisperFeatureExtractor(feature_size=128, chunk_length=300)(
        samples, sampling_rate=16000, return_tensors="pt"
    )["input_features"][0]
    sound, ceiling = family.audio._read(Audio(str(video)))
    count = -(-len(samples) // 160)
    pieces = [family.audio.log_mel(sound, i, min(i + 130, count)) for i in range(0, count, 130)]
    ours = omni_audio.scaled(torch.cat(pieces, 1), ceiling)
    assert (ours - theirs[:, :count]).abs().max() < 1e-5


def test_sound_of_more_than_five_minutes(tmp_path):
    """Where Qwen's extractor would cut it off, features are those of an extractor of longer sound, and tokens go on."""
    path, seconds = tmp_path / "long.wav", 305
    noise = np.random.default_rng(0).integers(-9000, 9000, RATE * seconds).astype(np.int16)
    noise[: 300 * RATE] //= 4  # the loudest comes last, and sets the scale of all
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(noise.tobytes())
    family, samples = Omni.tiny(0, torch.float32), read_audio(str(path))
    theirs = WhisperFeatureExtractor(feature_size=128, chunk_length=320)(
        samples, sampling_rate=RATE, return_tensors="pt"
    )["input_features"][0]
    sound, ceiling = family.audio._read(Audio(str(path)))
    last = omni_audio.scaled(family.audio.log_mel(sound, 29900, 30500), ceiling)
    assert (last - theirs[:, 29900:30500]).abs().max() < 1e-5
    whole = torch.cat([chunk.embeds for chunk in family.encode(Audio(str(path)))])
    assert len(whole) == family.measure(Audio(str(path))).num_tokens == 25 * seconds
    tail = torch.cat([chunk.embeds for chunk in family.encode(Audio(str(path)), range(2, 3))])
    assert torch.equal(tail, whole[2 * 64 * 50 :])


def test_chunks_have_the_same_bits_whoever_makes_them(monkeypatch, video):
    monkeypatch.setattr(omni_audio, "CHUNK_WINDOWS", 2)
    family, clip = Omni.tiny(0, torch.float32), Audio(str(video), start_s=0.5)
    whole, size = list(family.encode(clip)), family.measure(clip)
    assert len(whole) == size.num_chunks == 3  # 5.05 windows
    assert sum(len(chunk.embeds) for chunk in whole) == size.num_tokens
    assert all(len(chunk.embeds) == size.chunk_tokens for chunk in whole[:-1])
    (part,) = family.encode(clip, range(1, 2))
    assert torch.equal(part.embeds, whole[1].embeds)
    assert torch.equal(part.timestamps_s, whole[1].timestamps_s)


def test_no_sound_is_an_error(video, tmp_path):
    silent = tmp_path / "silent.mp4"
    render(make_story(0, 10.0), silent, fps=1.0, width=64, height=64)
    family = Omni.tiny(0, torch.float32)
    with pytest.raises(MediaError, match="has no audio track"):
        family.measure(Clip(path=str(silent), kind="audio", with_video=True))
    with pytest.raises(MediaError, match="too short"):
        family.measure(Audio(str(video), start_s=1.0, end_s=1.02))


def test_checkpoints_of_the_whole_model(tmp_path):
    """Read for their thinker, which is what an export holds, under the names it had (transformers before 5.23: without
    the `thinker.` in front, which all read alike)."""
    family = Omni.tiny(0, torch.float32)
    family.save(tmp_path / "thinker")
    weights = load_file(tmp_path / "thinker" / "model.safetensors")
    whole = tmp_path / "whole"
    family.save(whole)
    config = json.loads((whole / "config.json").read_text())
    about = {"model_type": "qwen2_5_omni", "thinker_config": config, "token2wav_config": {}}
    (whole / "config.json").write_text(json.dumps(about | {"talker_config": {"model_type": "qwen2_5_omni_talker"}}))
    others = {"talker.codec_head.weight": torch.zeros(2), "token2wav.x": torch.zeros(2)}
    save_file({f"thinker.{k}": v for k, v in weights.items()} | others, whole / "model.safetensors", {"format": "pt"})
    loaded = load_family(ModelConfig(path=str(whole)))
    assert loaded.encoder_id == family.encoder_id
    loaded.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    front = "" if hasattr(family.model, "audio_tower") else "thinker."
    assert again.keys() == {f"{front}{name}" for name in weights}
    assert all(torch.equal(again[f"{front}{name}"], weights[name]) for name in weights)
    assert load_family(ModelConfig(path=str(tmp_path / "again"))).encoder_id == family.encoder_id


def test_encoder_id_tells_ears_and_eyes_apart():
    family = Omni.tiny(0, torch.float32)
    seen = {family.encoder_id}
    for tower in (family.audio.tower, family.vision.visual):
        with torch.no_grad():
            next(tower.parameters()).add_(1)
        assert family.encoder_id not in seen
        seen.add(family.encoder_id)
    assert family.encoder_id in seen


def test_what_ends_a_response_is_found_where_the_checkpoint_says_it(tmp_path):
    """In generation_config.json, in config.json, at the tokenizer; in none of them is an error that names them."""
    family = Omni.tiny(0, torch.float32)
    end = family.token_id("<|im_end|>")
    family.save(tmp_path)
    files = {name: tmp_path / name for name in ("generation_config.json", "config.json", "tokenizer_config.json")}
    about = {name: json.loads(path.read_text()) for name, path in files.items()}
    about["generation_config.json"]["eos_token_id"] = [end, 5]
    about["config.json"]["eos_token_id"] = 7
    about["config.json"]["text_config"].pop("eos_token_id", None)

    def stop_ids() -> frozenset[int]:
        for name, path in files.items():
            path.write_text(json.dumps(about[name]))
        return load_family(ModelConfig(path=str(tmp_path))).stop_ids

    assert stop_ids() == {end, 5}
    del about["generation_config.json"]["eos_token_id"]
    assert stop_ids() == {7}
    del about["config.json"]["eos_token_id"]
    assert stop_ids() == {end}
    del about["tokenizer_config.json"]["eos_token"]
    with pytest.raises(ValueError, match=r"no eos_token_id in generation_config\.json, config"):
        stop_ids()
