"""VILA against its parts put together by hand: transformers' tower and body, read from the folders, and loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM, SiglipVisionModel

from longrl.models import vila_vision
from longrl.models.streams import make_streams
from longrl.models.vila import Vila, tiny_content, tiny_tokenizer
from longrl.policy import Policy
from longrl.types import Clip, Example, Message, Prompt
from longrl.video.decode import read_frames
from longrl.video.encode import embed
from longrl.video.image import read_image
from tests.parity.test_shared_prefix import gradients, largest_difference, responses_of
from tests.unit.media import render

SIDE, LENGTHS = 42, [5, 2, 7]
"""Pixels of a picture: 3 x 3 patches, which 2 does not divide."""
TSP = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 1, 1]]}
CASES: dict[str, dict[str, Any]] = {
    "resized": {"kind": "mlp_downsample_3x3_fix", "mm_vision_select_layer": -1},
    "tiles": {"kind": "mlp_downsample", "image_aspect_ratio": "dynamic", "max_tiles": 6},
    "scales": {
        "kind": "mlp2x_gelu",
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "s2_scales": "42,84",
        "s2_resize_output_to_scale_idx": -1,
    },
    "pooled": {"kind": "mlp_downsample_2x2_fix", "video_encoder": json.dumps(TSP)},
    "media beyond the rows": {"kind": "mlp_downsample", "rows": 512},
}
"""rows: embeddings that the body has; the tokenizer has three tokens more, of media, as NVlabs' published ones."""


def make(case: dict[str, Any], dtype: torch.dtype) -> Vila:
    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer) | case
    content["mm_projector_cfg"] = {"mm_projector_type": content.pop("kind")}
    content["llm_cfg"] |= {"vocab_size": content.pop("rows", len(tokenizer))}
    content["vision_tower_cfg"] |= {"image_size": SIDE, "hidden_size": 24, "intermediate_size": 48}
    return Vila.make(content, tokenizer, 0, dtype)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    """Ten frames, so that pooling four leaves two, and an image twice as wide as high."""
    folder = tmp_path_factory.mktemp("clips")
    picture = np.random.default_rng(0).integers(0, 256, (50, 105, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "image.png")
    return [
        Clip(path=str(render(folder / "video.mp4")), num_frames=10),
        Clip(path=str(folder / "image.png"), kind="image"),
    ]


def make_prompts(family: Vila, clips: list[Clip]) -> list[Prompt]:
    media = tuple(embed(clip, family, None) for clip in clips)
    return [
        family.prompt(
            Example(
                id=text,
                messages=(Message(role="user", content=("first", clips[0], "then", clips[1], text)),),
                answer=None,
                kind="open",
            ),
            media,
        )
        for text in ("what changed?", "who?")
    ]


# ---- the parts, put together by hand


class ByHand:
    """What a folder's parts make of pictures; every step in loops over rows and columns."""

    def __init__(self, folder: Path, case: dict[str, Any]) -> None:
        self.tower = SiglipVisionModel.from_pretrained(folder / "vision_tower")
        self.weights = load_file(folder / "mm_projector" / "model.safetensors")
        self.kind, self.layer = case["kind"], case.get("mm_vision_select_layer", -2)
        self.scales = 2 if case.get("dynamic_s2") else 1
        self.pool = 4 if "video_encoder" in case else 1

    def see(self, image: Image.Image, width: int, height: int) -> torch.Tensor:
        """Features [rows, columns, C] of an image resized to so many tiles."""
        fitted = torch.from_numpy(np.array(image.resize((width * SIDE, height * SIDE)))) / 127.5 - 1
        rows = []
        for y in range(height):
            tiles = []
            for x in range(width):
                tile = fitted[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE].permute(2, 0, 1)[None]
                seen = self.tower(pixel_values=tile.to(self.tower.dtype), output_hidden_states=True)
                tiles.append(seen.hidden_states[self.layer][0].reshape(3, 3, -1))
            rows.append(torch.cat(tiles, 1))
        return torch.cat(rows, 0)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """[rows, columns, C] -> [tokens, D]"""
        fold = 3 if "3x3" in self.kind else 2 if "downsample" in self.kind else 1
        side = len(features)
        tokens = []
        for top in range(0, side, fold):
            for left in range(0, side, fold):
                patches = [
                    features[y, x] if max(y, x) < side else torch.zeros_like(features[0, 0])
                    for y in range(top, top + fold)
                    for x in range(left, left + fold)
                ]
                tokens.append(self.layers(torch.cat(patches)))
        return torch.stack(tokens)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """The weights in the file's order: a vector of a norm, a matrix of a product, a GELU between products."""
        places = sorted({int(name.split(".")[1]) for name in self.weights})
        multiplied = False
        for place in places:
            weight, bias = self.weights[f"layers.{place}.weight"], self.weights[f"layers.{place}.bias"]
            if weight.ndim == 1:
                x = torch.nn.functional.gelu(x) if multiplied else x
                x, multiplied = torch.nn.functional.layer_norm(x, x.shape, weight, bias), False
            else:
                x = torch.nn.functional.gelu(x) if multiplied else x
                x, multiplied = weight @ x + bias, True
        return x

    def frames(self, pixels: np.ndarray) -> Iterator[torch.Tensor]:
        seen = [self.project(torch.cat([self.see(Image.fromarray(x), 1, 1)] * self.scales, -1)) for x in pixels]
        for first in range(0, len(seen), self.pool):
            some = seen[first : first + self.pool]
            yield sum(some[1:], some[0]) / len(some)

    def scaled(self, image: Image.Image) -> torch.Tensor:
        """Two scales: a square tile, each of whose features lies over 2 x 4 of those of 2 x 4 tiles."""
        small, large = self.see(image, 1, 1), self.see(image, 4, 2)
        whole = torch.stack(
            [torch.stack([torch.cat([small[y // 2, x // 4], large[y, x]]) for x in range(12)]) for y in range(6)]
        )
        rows = []
        for top in (0, 3):
            tiles = [self.project(whole[top : top + 3, left : left + 3]).reshape(3, 3, -1) for left in (0, 3, 6, 9)]
            rows.append(torch.cat(tiles, 1))
        return torch.cat(rows, 0).flatten(0, 1)


def prompt_embeds(name: str, folder: Path, body: Qwen2ForCausalLM, family: Vila, clips: list[Clip], text: str):
    """[T, D]: what the model reads, written out."""
    hand, image = ByHand(folder, CASES[name]), Image.open(clips[1].path)
    embed_text = lambda text: body.model.embed_tokens(  # noqa: E731
        torch.tensor(family.tokenizer.encode(text, add_special_tokens=False))
    )
    newline = embed_text("\n")
    parts = [embed_text("<|im_start|>user\nfirst")]
    frames = np.concatenate([chunk.pixels for chunk in read_frames(clips[0])])
    for seen in hand.frames(frames):
        parts += [seen, newline]
    parts.append(embed_text("then"))
    if name == "tiles":  # 2 x 1 is nearest to 2.1 : 1; a small one of the whole comes last
        both = hand.see(image, 2, 1)
        for tile in (both[:, :3], both[:, 3:], hand.see(image, 1, 1)):
            parts += [hand.project(tile), newline, newline]
    elif name == "scales":
        parts += [hand.scaled(image), newline]
    else:
        parts += [hand.project(hand.see(image, 1, 1)), newline]
    return torch.cat([*parts, embed_text(f"{text}<|im_end|>\n<|im_start|>assistant\n")])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logprobs_equal_those_of_the_parts_put_together_by_hand(tmp_path, clips, name):
    family = make(CASES[name], torch.float32)
    family.save(tmp_path)
    body = Qwen2ForCausalLM.from_pretrained(tmp_path / "llm")
    prompts, responses = make_prompts(family, clips), responses_of(family, [7, 3])
    policy = Policy(family)
    prefix = policy.prefix(prompts)
    ours, _ = policy.logprobs(prefix, make_streams(prompts, responses, prefix.length))
    for mine, text, response in zip(ours, ("what changed?", "who?"), responses, strict=True):
        embeds = prompt_embeds(name, tmp_path, body, family, clips, text)
        after = body.model.embed_tokens(torch.tensor(response))
        logits = body(inputs_embeds=torch.cat([embeds, after])[None]).logits[0, len(embeds) - 1 : -1]
        theirs = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        assert (mine[mine != 0] - theirs).abs().max() < 1e-5


# ---- the encoder learns


def one_graph(family: Vila, prompts: list[Prompt], responses: list[list[int]], weights: torch.Tensor) -> None:
    """The slow twin: each response by itself, all of a clip's pixels in one graph."""
    decoder = family.model.get_decoder()
    decoder.set_attn_implementation("sdpa")
    for prompt, response, weight in zip(prompts, responses, weights, strict=True):
        whole = prompt.followed_by(response)
        embeds = family.model.get_input_embeddings()(whole.token_ids)
        for i, media in enumerate(prompt.media):
            assert media.clip
            if media.clip.kind == "video":
                seen = family.vision.encode_frames(read_frames(media.clip))
            else:
                seen = family.vision.encode_image(read_image(media.clip.path))
            embeds = embeds.index_copy(0, prompt.slot(i), seen.embeds)
        hidden = decoder(inputs_embeds=embeds[None], position_ids=whole.position_ids).last_hidden_state[0]
        logits = family.model.get_output_embeddings()(hidden[len(prompt) - 1 : -1])
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        (weight * logprobs.sum()).backward()


# as in test_shared_prefix, transformers' norms and rotary embedding compute in fp32 whatever the dtype: seen are
# 0.6e-7 to 1.6e-7, the same however the encoder's pass is divided; a frame taken for another moves them by 1
@pytest.mark.parametrize(("name", "patches"), [*((name, 1) for name in CASES), ("pooled", 4096)])
def test_gradients_equal_one_graph_through_everything(monkeypatch, clips, name, patches):
    monkeypatch.setattr(vila_vision, "BACKWARD_PATCHES", patches)
    family = make(CASES[name], torch.float64)
    prompts = make_prompts(family, clips)
    policy = Policy(family, train=("language", "projector", "tower"))
    rows = [prompt for prompt in prompts for _ in LENGTHS]
    responses = responses_of(family, LENGTHS * len(prompts))
    weights = torch.linspace(-1, 1.5, len(rows), dtype=torch.float64)
    prefix = policy.prefix(prompts)
    streams = make_streams(rows, responses, prefix.length)
    policy.backward(prefix, streams, lambda logprobs, entropy, part: (weights[part, None] * logprobs).sum())
    ours = gradients(family)
    one_graph(family, rows, responses, weights)
    theirs = gradients(family)
    layers = {name.split(".layers.")[1].split(".")[0] for name in ours if "vision_tower" in name and ".layers." in name}
    assert len(layers) == (3 if name == "resized" else 2)  # of three; what is after the chosen one does not learn
    assert any(key.startswith("mm_projector.") for key in ours)
    assert largest_difference(ours, theirs) < 3e-7
