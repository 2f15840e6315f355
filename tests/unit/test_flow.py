"""Image and video generation: windows, advantages, DiffusionNFT's loss, prompt files, rewards, refusals."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longrl.algo.flow import group_advantages, nft_loss
from longrl.config import ModelConfig
from longrl.config_files import load_config
from longrl.data.media_prompts import load_prompts, require_negative, step_prompts, whole_prompts
from longrl.flow_config import PRESETS, FlowAlgoConfig, FlowConfig
from longrl.flow_types import Media, MediaPrompt
from longrl.models.media import load_media_family
from longrl.report.media import GAP_PX, gain, save_samples
from longrl.rewards.media import MediaRewards, brightness, colour, jpeg_size, smoothness
from longrl.rollout.flow_window import stochastic_steps, trained_steps

BASE = """\
kind: flow
run_dir: runs/x
model: {path: tiny:sd3, lora: {rank: 4}}
prompts: {train: prompts.txt, negative: ""}
media: {height: 16, width: 16}
rewards: {colour: 1.0}
steps: 10
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


# Configuration


def test_presets_set_what_is_not_said(base):
    plain, fast = load_config([base]), load_config([base], ["flow.preset=flow_grpo_fast", "flow.kl_coef=0.5"])
    assert isinstance(plain, FlowConfig)
    assert isinstance(fast, FlowConfig)
    assert (plain.flow.window, plain.flow.shared_start) == (None, False)
    assert (fast.flow.window, fast.flow.shared_start, fast.flow.kl_coef) == (2, True, 0.5)
    assert load_config([base], ["flow.preset=flow_grpo_fast", "flow.window=1"]).flow.window == 1
    load_config([base], ["flow.window_range=[4, 5]"])  # one step, and not the last
    for name in PRESETS:
        guidance = ["sampling.guidance=1"] if name == "diffusion_nft" else []
        assert load_config([base], [f"flow.preset={name}", *guidance]).flow.preset == name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompts.negative=null"], "sampling.guidance is 4.5, but prompts.negative is not set"),
        (
            ["flow.window=10"],
            "flow.window is 10 steps within 0 to 10, but sampling.steps is 10, of which the last is not",
        ),
        (["sampling.steps=2", "flow.window=2"], "use more steps or a smaller window"),
        (["flow.window=1.5"], "flow.window: got 1.5, expected a whole number of steps, or a share of them below 1"),
        (["flow.window=0.95"], "flow.window is 10 steps within 0 to 10"),
        (["flow.window=3", "flow.window_range=[4, 6]"], "window_range is [4, 6], expected room for the window of 3"),
        (["flow.window_range=[4, 12]"], "flow.window is all steps within 4 to 12, but sampling.steps is 10"),
        (["flow.window_range=[9, 10]"], "the only stochastic step is the last"),
        (["sampling.steps=1"], "the only stochastic step is the last, which is not trained"),
        (["flow.preset=diffusion_nft"], "flow.method nft learns without guidance; set sampling.guidance to 1"),
        (["flow.preset=grpo"], "flow.preset: got \"grpo\", expected 'flow_grpo'"),
        (["model.train=[tower]", "model.lora=null"], "train and compute_dtype are of language models"),
        (["model.path=models/sd", "warm_up_steps=3"], "warm_up_steps is of tiny twins, but model.path is models/sd"),
        (["model.lora=null", "model.dtype=bfloat16"], "model.dtype is bfloat16, which has no room for small updates"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, words, base):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config([base], overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Windows


def test_windows_of_the_presets():
    full = FlowAlgoConfig()
    assert stochastic_steps(full, 10, 1, 0) == range(10)
    assert trained_steps(full, 10, range(10), 1, 0) == list(range(9))  # all but the last
    fast = FlowAlgoConfig.model_validate({"preset": "flow_grpo_fast"})
    drawn = [stochastic_steps(fast, 10, i, 0) for i in range(1, 200)]
    assert {window.start for window in drawn} == set(range(8))  # never the last step, which is not trained
    assert all(trained_steps(fast, 10, window, 1, 0) == list(window) for window in drawn)
    mix = FlowAlgoConfig.model_validate({"preset": "mix_grpo"})
    assert [len(stochastic_steps(mix, steps, 1, 0)) for steps in (6, 10, 25, 50)] == [1, 2, 4, 8]
    starts = [stochastic_steps(mix, 10, i, 0).start for i in (1, 25, 26, 176, 200, 201, 226)]
    assert starts == [0, 0, 1, 7, 7, 0, 1]  # and from the end back
    dance = FlowAlgoConfig.model_validate({"preset": "dance_grpo"})
    chosen = [tuple(trained_steps(dance, 10, range(10), i, 0)) for i in range(1, 30)]
    assert {len(steps) for steps in chosen} == {5}  # 0.6 of nine
    assert {step for steps in chosen for step in steps} == set(range(9))
    nft = FlowAlgoConfig.model_validate({"preset": "diffusion_nft"})
    assert stochastic_steps(nft, 10, 1, 0) == range(10, 10)
    assert trained_steps(nft, 10, range(10, 10), 1, 0) == list(range(10))


# Advantages and losses


def test_advantages_by_hand():
    groups = [[1.0, 2.0, 3.0], [5.0, None, 5.0], [7.0, None, None]]
    own = group_advantages(groups, "group", 5.0)
    assert own[0] == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])
    assert own[1:] == [[0, 0, 0], [0, 0, 0]]
    std = np.std([1, 2, 3, 5, 5, 7], ddof=1)
    assert group_advantages(groups, "batch", 5.0)[0] == pytest.approx([-1 / (std + 1e-4), 0, 1 / (std + 1e-4)])
    assert group_advantages(groups, "group", 0.5)[0] == [-0.5, 0, 0.5]


def test_nft_loss_against_a_plain_one():
    generator = torch.Generator().manual_seed(0)
    v, old, x0, noise = torch.randn(4, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    v = v.requires_grad_()
    sigma, advantages = torch.tensor([[0.2, 0.5, 0.9], [5.0, -5.0, 1.0]], dtype=torch.float64)
    x = torch.stack([(1 - s) * a + s * b for s, a, b in zip(sigma, x0, noise, strict=True)])
    ours = nft_loss(v, old, x, x0, sigma, advantages, beta=0.5, bound=5.0)
    plain = []
    for i, r in enumerate((1.0, 0.0, 0.6)):
        good, bad = 0.5 * old[i] + 0.5 * v[i], 1.5 * old[i] - 0.5 * v[i]
        parts = []
        for one in (good, bad):
            error = x[i] - sigma[i] * one - x0[i]
            parts.append((error**2).mean() / error.abs().mean().detach())
        plain.append(5.0 / 0.5 * (r * parts[0] + (1 - r) * parts[1]))
    assert torch.allclose(ours, torch.stack(plain), rtol=1e-6)
    gradient = torch.autograd.grad(ours.sum(), v)[0]
    assert torch.allclose(gradient, torch.autograd.grad(torch.stack(plain).sum(), v)[0], rtol=1e-6, atol=1e-9)


def test_nft_pulls_to_good_samples_and_pushes_from_bad_ones():
    """At v = v_old, what a bad sample gives is the mirror image of what a good one gives."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, old = torch.randn(3, 1, 2, 4, 4, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.5])
    x = 0.5 * x0 + 0.5 * noise

    def gradient(advantage):
        v = old.clone().requires_grad_()
        loss = nft_loss(v, old, x, x0, sigma, torch.tensor([advantage]), beta=1.0, bound=5.0)
        return torch.autograd.grad(loss.sum(), v)[0]

    assert (gradient(5.0) * (noise - x0 - old)).sum() < 0  # downhill is towards the sample's own velocity
    assert torch.allclose(gradient(-5.0), -gradient(5.0))
    assert gradient(0.0).abs().max() < 1e-12


# Prompt files


def test_prompt_files(tmp_path, caplog):
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a red picture\n\n  blue paint \n")
    assert [(p.id, p.text) for p in load_prompts(text)] == [("1", "a red picture"), ("3", "blue paint")]
    assert "p.txt: 1 empty lines were passed over" in caplog.text
    geneval = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}
    rows.write_text(json.dumps(geneval) + "\n" + json.dumps({"id": "x", "prompt": "y"}))
    first, second = load_prompts(rows)
    assert (first.id, first.text) == ("1", "a photo of two clocks")
    assert first.extra == {"tag": "counting", "include": [{"class": "clock", "count": 2}]}
    assert second.id == "x"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', ":2: prompt is ' ', expected a text that is not empty"),
        ("p.jsonl", '{"text": "a"}\n', ":1: prompt is missing"),
        ("p.jsonl", '{"prompt": "a"\n', ":1: malformed JSON at column"),
        ("p.jsonl", "[1]\n", ":1: got [1], expected a mapping"),
        ("p.jsonl", '{"prompt": "a", "id": 2}\n{"prompt": "b"}\n', ":2: id '2' stands twice"),
        ("p.jsonl", '{"prompt": "a", "id": true}\n', ":1: id is True"),
        ("p.txt", "\n \n", "no prompts; expected one a line"),
        ("p.csv", "a\n", "expected a file of prompts that ends in .txt or .jsonl"),
    ],
)
def test_bad_prompt_files(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_prompts(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary_prompt_files(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory; expected a file of prompts"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        load_prompts(tmp_path / "b.txt")


def test_order_of_prompts():
    prompts = [MediaPrompt(id=str(i), text=str(i)) for i in range(5)]
    seen = [one for step in range(1, 6) for one in step_prompts(prompts, step, 3, 7)]
    assert [epoch for epoch, _ in seen] == [0] * 5 + [1] * 5 + [2] * 5
    for epoch in range(3):
        assert sorted(p.id for e, p in seen if e == epoch) == ["0", "1", "2", "3", "4"]
    assert seen == [one for step in range(1, 6) for one in step_prompts(prompts, step, 3, 7)]
    assert seen != [one for step in range(1, 6) for one in step_prompts(prompts, step, 3, 8)]


def test_prompts_too_long_are_named_and_counted(caplog):
    prompts = [MediaPrompt(id="a", text="short"), MediaPrompt(id="b", text="long " * 9)]

    def lengths(text):
        return [("tokenizer", len(text), 10), ("tokenizer_3", len(text), 100)]

    with pytest.raises(ValueError, match=r"prompt b \('long .* has 45 tokens, tokenizer takes 10; shorten it, or set"):
        whole_prompts(prompts, lengths, "raise")
    assert whole_prompts(prompts, lengths, "skip", "eval.txt") == (prompts[:1], ["b"])
    assert "eval.txt: prompt b ('long" in caplog.text
    assert whole_prompts(prompts, lengths, "cut") == (prompts, ["b"])
    with pytest.raises(ValueError, match="all 1 prompts are too long"):
        whole_prompts(prompts[1:], lengths, "skip")


def test_a_negative_prompt_is_never_cut_silently(caplog):
    def lengths(text):
        return [("tokenizer", len(text), 10)]

    assert require_negative("", lengths, "raise") == []
    assert caplog.text == ""
    for too_long in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"negative has 12 tokens, tokenizer takes 10; .*prompts.too_long to cut"):
            require_negative("blurred hand", lengths, too_long)
    assert require_negative("blurred hand", lengths, "cut") == ["negative"]
    assert "prompts.negative has 12 tokens, tokenizer takes 10: cut there" in caplog.text


# Rewards


def media(pixels, text="a red picture", fps=None):
    return Media(prompt=MediaPrompt(id="p", text=text), pixels=np.asarray(pixels, np.uint8), fps=fps)


def flat(*colours, frames=1, side=4):
    return np.array(colours, np.uint8)[:, None, None, None].repeat(frames, 1).repeat(side, 2).repeat(side, 3)


def test_colour_reward_depends_on_the_prompt():
    pictures = flat((255, 0, 0), (0, 255, 255), (0, 255, 0), (102, 102, 102))
    assert colour(media(pictures)) == pytest.approx([1, 0, 1 / 3, 1 - (0.6 + 0.4 + 0.4) / 3])
    assert colour(media(pictures, "All is GREEN."))[2] == 1
    for text in ("a picture", "red and blue"):
        with pytest.raises(ValueError, match="of the colours red, green"):
            colour(media(pictures, text))


def test_other_toy_rewards():
    assert brightness(media(flat((255, 0, 0), (255, 255, 255)))) == pytest.approx([1 / 3, 1])
    noisy = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3))
    assert jpeg_size(media(noisy))[0] > 2 * jpeg_size(media(flat((9, 9, 9), side=32)))[0]
    still = flat((9, 9, 9), frames=3)
    jump = still.copy()
    jump[:, 1] = 60
    assert smoothness(media(still)) == [1]
    assert smoothness(media(jump)) == pytest.approx([1 - 51 / 255])
    with pytest.raises(ValueError, match="smoothness in time is of videos"):
        smoothness(media(flat((1, 2, 3))))


def late(batch):
    future: Future = Future()
    future.set_result([0.5] * len(batch))
    return future


def patchy(batch):
    return [None, *[1.0] * (len(batch) - 1)]


def test_rewards_are_weighted_and_failures_are_none():
    two = media(flat((255, 0, 0), (0, 0, 0)))
    scored = MediaRewards({"colour": 2.0, f"{__name__}:late": 1.0, "smoothness": 0.0})(two)
    assert scored.total == pytest.approx([2.5, 2 * (1 - 1 / 3) + 0.5])
    assert scored.rewards["smoothness"] == [None, None]  # it raised, but is only watched
    assert MediaRewards({"colour": 1.0, f"{__name__}:patchy": 1.0})(two).total == [None, pytest.approx(1 + 2 / 3)]
    rewards = MediaRewards({"colour": 1.0, "smoothness": 1.0})
    assert rewards(two).total == [None, None]
    assert rewards.failures == {"smoothness": 2}
    with pytest.raises(ValueError, match=r"unknown reward 'color'.*did you mean 'colour'"):
        MediaRewards({"color": 1.0})
    with pytest.raises(ValueError, match="at least one reward needs a weight"):
        MediaRewards({"colour": 0.0})


# Report


def test_samples_are_pictures_and_playable_videos(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 16, 32, 3)).astype(np.uint8)
    path = save_samples(tmp_path / "a" / "one", media(pixels[:, :1]))
    image = Image.open(path)
    assert image.size == (3 * 32 * 12 + 2 * GAP_PX, 16 * 12)
    assert image.getpixel((32 * 12 + 1, 0)) == (255, 255, 255)
    assert image.getpixel((32 * 12 + GAP_PX, 0)) == tuple(pixels[1, 0, 0, 0])
    path = save_samples(tmp_path / "a" / "two", media(flat((200, 30, 30), (30, 200, 30), frames=5, side=16), fps=4.0))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (stream.codec_context.name, stream.average_rate, len(frames)) == ("h264", 4, 5)
    assert abs(frames[4][40, 40].astype(int) - [200, 30, 30]).max() < 12
    assert abs(frames[4][40, 240].astype(int) - [30, 200, 30]).max() < 12


def test_gain_is_paired():
    before = {"prompts": [{"rewards": [1.0, 5.0], "swapped": [0.0, 0.0]}, {"rewards": [None, 3.0], "swapped": [0, 0]}]}
    after = {"prompts": [{"rewards": [2.0, 7.0], "swapped": [0.0, 0.0]}, {"rewards": [4.0, 6.0], "swapped": [0, 0]}]}
    mean, error, pairs = gain(before, after)
    assert (mean, pairs) == (2.0, 3)
    assert error == pytest.approx(1 / 3**0.5)
    assert gain(before, after, "swapped")[0] == 0


def test_without_diffusers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r"needs diffusers: pip install 'longrl\[flow\]'"):
        load_media_family(ModelConfig(path="tiny:sd3"))


def test_pipelines_without_a_family_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="no family for FluxPipeline; known: StableDiffusion3Pipeline, WanPipeline"):
        load_media_family(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="the seed 'x' is not a number; write tiny:wan@0"):
        load_media_family(ModelConfig(path="tiny:wan@x"))
