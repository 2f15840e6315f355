"""Scorers of images and videos: CLIPs against their forward passes written out, OCR, and what cannot be loaded."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPConfig, CLIPModel

from longrl.check_flow import flow_rows
from longrl.config_files import load_config
from longrl.flow_config import FlowConfig
from longrl.flow_types import Media, MediaPrompt
from longrl.rewards.media import MediaRewards
from longrl.rewards.media_checkpoints import from_open_clip
from longrl.rewards.media_ocr import Ocr, quoted, score
from longrl.rewards.media_scorer import sampled
from longrl.scorers_config import ScorersConfig
from tests.media_scoring import ENDS, SIDE, WIDTH, WORDS, save_clip


def close(got: Sequence[float | None], expected: torch.Tensor, scale: float = 1.0) -> None:
    """The same sums in fp32, in another order."""
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-5, atol=1e-5 * scale)


def media(pixels: np.ndarray, text: str = "a red cat") -> Media:
    return Media(prompt=MediaPrompt(id="p", text=text), pixels=pixels)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Not square, so that cropping matters; rows that differ in their text's place would be noticed."""
    return np.random.default_rng(0).integers(0, 256, (3, 7, 20, 28, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


def pixels_by_hand(frame: np.ndarray) -> torch.Tensor:
    """[3, SIDE, SIDE]: 28 x 20 becomes 22 x 16, of which the middle 16 x 16 is normalised."""
    small = np.asarray(Image.fromarray(frame).resize((22, SIDE), Image.Resampling.BICUBIC))[:, 3:19] / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy((small - mean) / std).float().permute(2, 0, 1)


def ids_by_hand(text: str) -> torch.Tensor:
    letters = [letter for word in text.split() for letter in (*word[:-1], f"{word[-1]}</w>")]
    return torch.tensor([[WORDS[x] for x in (ENDS[0], *letters, ENDS[1])]])


def cosines_by_hand(folder: Path, frames: np.ndarray, text: str) -> torch.Tensor:
    """By CLIPModel's own forward, whose logits are scaled cosines. [N]"""
    model = CLIPModel.from_pretrained(folder)
    pixels = torch.stack([pixels_by_hand(frame) for frame in frames])
    with torch.no_grad():
        found = model(input_ids=ids_by_hand(text), pixel_values=pixels)
    return found.logits_per_image[:, 0] / model.logit_scale.exp()


def rewards(name: str, **sections) -> MediaRewards:
    return MediaRewards({name: 1.0}, ScorersConfig.model_validate({"max_rows": 2, "frames": 3, **sections}))


def test_clip_and_pick_score_equal_the_whole_model(clip_folder, pictures):
    images = pictures[:, :1]
    cosines = cosines_by_hand(clip_folder, images[:, 0], "a red cat")
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    section = {"path": str(clip_folder)}
    got = rewards("clip", clip=section)(media(images)).total
    close(got, 2.5 * cosines.clamp(min=0))
    got = rewards("pickscore", pickscore=section | {"processor": str(clip_folder)})(media(images)).total
    close(got, scale * cosines, scale)
    assert cosines.std() > 1e-2  # pictures are told apart
    other = rewards("pickscore", pickscore=section)(media(images, "a blue dog")).total
    assert abs(torch.tensor(other) - torch.tensor(got)).min() > 1e-2  # and so are prompts


def test_a_video_is_the_mean_of_sampled_frames(clip_folder, pictures):
    assert sampled(media(pictures), 3).tolist() == pictures[:, [0, 3, 6]].tolist()
    assert sampled(media(pictures), 9) is not None
    assert sampled(media(pictures), 9).shape == pictures.shape
    means = torch.stack([cosines_by_hand(clip_folder, pictures[:, i], "a red cat") for i in (0, 3, 6)]).mean(0)
    got = rewards("pickscore", pickscore={"path": str(clip_folder)})(media(pictures)).total
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    close(got, scale * means, scale)


# HPSv2: open_clip's layout and computation


def open_clip_file(path: Path) -> dict[str, torch.Tensor]:
    """Random tensors with open_clip's names and shapes, as HPSv2's file holds them."""
    drawn = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (20, 32),
        "text_projection": (32, WIDTH),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (17, 48),
        "visual.proj": (48, WIDTH),
        "visual.conv1.weight": (48, 3, 4, 4),
        "token_embedding.weight": (len(WORDS), 32),
    }
    norms = [("visual.ln_pre", 48), ("visual.ln_post", 48), ("ln_final", 32)]
    for side, width in (("visual.transformer", 48), ("transformer", 32)):
        for i in range(2):
            block = f"{side}.resblocks.{i}"
            norms += [(f"{block}.ln_1", width), (f"{block}.ln_2", width)]
            for inner, out, into in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 64, width),
                ("mlp.c_proj", width, 64),
            ):
                shapes |= {f"{block}.{inner}.weight": (out, into), f"{block}.{inner}.bias": (out,)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
    tensors = {name: 0.3 * torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    for name, width in norms:
        tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=drawn)
        tensors[f"{name}.bias"] = 0.3 * torch.randn(width, generator=drawn)
    tensors["logit_scale"] = torch.tensor(4.0)
    torch.save({"epoch": 1, "state_dict": tensors}, path)
    return tensors


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def tower(x: torch.Tensor, w: dict[str, torch.Tensor], side: str, heads: int, mask: torch.Tensor | None):
    """[L, N, D]"""
    for i in range(2):
        at = f"{side}.resblocks.{i}"
        h, inner = norm(x, w, f"{at}.ln_1"), (w[f"{at}.attn.in_proj_weight"], w[f"{at}.attn.in_proj_bias"])
        out = w[f"{at}.attn.out_proj.weight"], w[f"{at}.attn.out_proj.bias"]
        x = x + F.multi_head_attention_forward(
            h, h, h, h.shape[-1], heads, *inner, None, None, False, 0.0, *out, need_weights=False, attn_mask=mask
        )[0]  # fmt: skip
        h = F.gelu(F.linear(norm(x, w, f"{at}.ln_2"), w[f"{at}.mlp.c_fc.weight"], w[f"{at}.mlp.c_fc.bias"]))
        x = x + F.linear(h, w[f"{at}.mlp.c_proj.weight"], w[f"{at}.mlp.c_proj.bias"])
    return x


def open_clip_by_hand(w: dict[str, torch.Tensor], frames: np.ndarray, text: str) -> torch.Tensor:
    pixels = torch.stack([pixels_by_hand(frame) for frame in frames])
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=4).flatten(2).permute(2, 0, 1)
    x = (
        torch.cat([w["visual.class_embedding"].expand(1, len(frames), -1), x])
        + w["visual.positional_embedding"][:, None]
    )
    x = tower(norm(x, w, "visual.ln_pre"), w, "visual.transformer", 3, None)
    images = norm(x[0], w, "visual.ln_post") @ w["visual.proj"]
    ids = F.pad(ids_by_hand(text), (0, 20 - ids_by_hand(text).shape[1]))  # open_clip pads with 0
    x = (w["token_embedding.weight"][ids[0]] + w["positional_embedding"])[:, None]
    x = norm(tower(x, w, "transformer", 2, torch.full((20, 20), -torch.inf).triu(1)), w, "ln_final")
    return F.normalize(images) @ F.normalize(x[ids[0].argmax(), 0] @ w["text_projection"], dim=0)


def test_hpsv2_reads_open_clip_and_computes_the_same(clip_folder, pictures, tmp_path):
    weights = open_clip_file(tmp_path / "hps.pt")
    section = {"path": str(tmp_path / "hps.pt"), "processor": str(clip_folder)}
    got = rewards("hpsv2", hpsv2=section)(media(pictures[:, :1])).total
    expected = open_clip_by_hand(weights, pictures[:, 0], "a red cat")
    close(got, expected)
    assert expected.std() > 1e-2
    with pytest.raises(ValueError, match=r"visual\.trunk\.x is not of a CLIP of open_clip"):
        from_open_clip({"visual.trunk.x": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_aesthetic_heads(kind, clip_folder, pictures, tmp_path):
    drawn, sizes = torch.Generator().manual_seed(2), (WIDTH, 32, 16, 8, 4, 1)
    if kind == "mlp":
        parts = [torch.nn.Linear(into, out) for into, out in itertools.pairwise(sizes)]
        dropout = torch.nn.Dropout(0.2)
        head = torch.nn.Sequential(parts[0], dropout, parts[1], dropout, parts[2], dropout, parts[3], parts[4]).eval()
        named = {f"layers.{name}": x for name, x in head.state_dict().items()}
    else:
        head = torch.nn.Linear(WIDTH, 1)
        named = head.state_dict()
    for x in named.values():
        x.copy_(torch.randn(x.shape, generator=drawn))
    torch.save(named, tmp_path / "head.pth")
    section = {"path": str(clip_folder), "head": str(tmp_path / "head.pth")}
    got = rewards("aesthetic", aesthetic=section)(media(pictures[:, :1], "x " * 99)).total  # the prompt does not matter
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        pixels = torch.stack([pixels_by_hand(frame) for frame in pictures[:, 0]])
        vectors = model.visual_projection(model.vision_model(pixels).pooler_output)
        expected = head(vectors / vectors.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-4)  # five layers, values of hundreds


# What cannot be loaded


def test_what_is_missing_is_named_with_what_to_download(clip_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "none").mkdir()
    CLIPConfig.from_pretrained(clip_folder).save_pretrained(tmp_path / "none")
    torch.save({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "narrow.pth")
    torch.save({"layers.0.weight": torch.zeros(1, 5)}, tmp_path / "other.pth")
    good = str(clip_folder)
    for name, section, words in [
        ("pickscore", {"path": str(empty)}, r"scorers\.pickscore\.path .*no config\.json\); .*: hf download yuv"),
        ("clip", {"path": str(tmp_path / "no")}, r"no config\.json\); .*: hf download openai/clip-vit-large"),
        ("clip", {"path": str(tmp_path / "none")}, "scorers.clip.path .*cannot be loaded as a CLIP"),
        ("clip", {"path": good, "processor": str(empty)}, "scorers.clip.processor .*no CLIPImageProcessorPil in it"),
        ("hpsv2", {"path": str(tmp_path / "no.pt"), "processor": good}, "no such file; .*: hf download xswu/HPSv2"),
        ("hpsv2", {"path": str(tmp_path / "text.pt"), "processor": good}, "hpsv2.path .*not a file of tensors"),
        ("hpsv2", {"path": str(tmp_path / "narrow.pth"), "processor": good}, "weight is not of a CLIP of open_clip"),
        ("aesthetic", {"path": good, "head": str(tmp_path / "no.pth")}, r"aesthetic\.head .*; download sac.logos.ava1"),
        ("aesthetic", {"path": good, "head": str(tmp_path / "narrow.pth")}, r"layers are \(1, 5\), the CLIP gives 24"),
        ("aesthetic", {"path": good, "head": str(tmp_path / "other.pth")}, "not a head that is known"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            rewards(name, **{name: section})
        assert "\n" not in str(caught.value)


def test_a_checkpoint_with_a_hole_is_refused(clip_folder, tmp_path):
    """transformers would draw what is missing at random."""
    weights = open_clip_file(tmp_path / "x.pt")
    del weights["visual.proj"]
    torch.save({"state_dict": weights}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"it has no visual_projection\.weight"):
        rewards("hpsv2", hpsv2={"path": str(tmp_path / "x.pt"), "processor": str(clip_folder)})


def test_prompts_longer_than_a_clip(clip_folder, pictures, caplog):
    section, prompts = (
        {"path": str(clip_folder)},
        [MediaPrompt(id="a", text="cat"), MediaPrompt(id="b", text="x " * 30)],
    )
    with pytest.raises(ValueError, match=r"reward clip: prompt b has 32 tokens, its CLIP takes 20 \(1 of 2 prompts"):
        rewards("clip", clip=section).require(prompts)
    cutting = rewards("clip", clip=section | {"too_long": "cut"})
    with caplog.at_level(logging.WARNING):
        cutting.require(prompts)
    assert "sees the first 20 tokens of 1 prompts: b" in caplog.text
    long, cut = (cutting(media(pictures[:, :1], "x " * count)).total for count in (30, 18))
    assert long == cut


BASE = """\
kind: flow
run_dir: runs/x
model: {path: tiny:sd3, lora: {rank: 4}}
prompts: {train: prompts.txt, negative: ""}
media: {height: 16, width: 16}
steps: 10
"""


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("rewards: {clip: 1.0}", "rewards names clip, but there is no scorers.clip; set scorers.clip.path"),
        ("rewards: {vlm: 1.0}", "set scorers.vlm.models"),
        ("rewards: {colour: 1.0}\nscorers: {clip: {path: x}}", "scorers.clip is set, but rewards does not name clip"),
        ("rewards: {ocr: 1.0}\nscorers: {services: {ocr: {url: 'http://x'}}}", "'ocr' is another reward's name"),
        ("rewards: {a: 1.0}\nscorers: {services: {a: {url: 'http://u:secret@x'}}}", "holds no user, key or query"),
    ],
)
def test_sections_that_do_not_fit_are_refused(lines, words, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{BASE}{lines}\n")
    with pytest.raises(ValueError, match="scorers") as caught:
        load_config([tmp_path / "c.yaml"])
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_longrl_check_names_missing_checkpoints(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{BASE}rewards: {{clip: 1.0, ocr: 1.0}}\nscorers: {{clip: {{path: no-such}}}}\n")
    config = load_config([tmp_path / "c.yaml"])
    assert isinstance(config, FlowConfig)
    rows = {value: problem for _, value, problem in flow_rows(config)}
    missing = rows["clip, weight 1: no-such"]
    assert "hf download openai/clip-vit-large-patch14 --local-dir no-such" in (missing or "")
    assert rows["ocr, weight 1: rapidocr"] is None


# Failures


def broken(batch: Media) -> list[float | None]:
    return [None, *[0.5] * (len(batch) - 1)]


def test_failures_are_none_and_capped(pictures):
    name = f"{__name__}:broken"
    scored = MediaRewards({name: 1.0}, ScorersConfig(max_failures=3))
    for _ in range(3):
        assert scored(media(pictures)).total == [None, 0.5, 0.5]
    assert scored.failures == {name: 3}
    with pytest.raises(
        RuntimeError, match=r"broken has failed on 4 of its last 12 samples, scorers\.max_failures allows 3"
    ):
        scored(media(pictures))


# OCR


def test_ocr_reads_what_is_painted():
    def painted(text: str) -> np.ndarray:
        image = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(image).text((20, 20), text, fill="black", font=ImageFont.load_default(40))
        return np.asarray(image)[None]

    ocr = Ocr(threads=1, frames=2)
    pixels = np.stack([painted("Open Shop"), painted("Open")])
    assert ocr(media(pixels, 'a sign that says "Open Shop"')) == pytest.approx([1, 0.5])
    assert ocr.read(np.full((64, 64, 3), 255, np.uint8)) == ""


def test_ocr_scores():
    assert quoted(MediaPrompt(id="p", text='"New  York" and “City”')) == "newyorkcity"
    assert [score(said, "open") for said in ("OPEN", "o pen", "opne", "opens", "", "entirely different")] == [
        1, 1, 0.5, 0.75, 0, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="reward ocr: prompt p has no text in double quotes"):
        MediaRewards({"ocr": 1.0}).require([MediaPrompt(id="p", text="a sign")])
