"""What each family takes, as the tests of this folder try it, and what they try it on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from longrl import Audio, Image, Video
from longrl.config import ModelConfig, RolloutConfig
from longrl.data.prompts import response_ids
from longrl.models import load_family
from longrl.models.family import Family
from longrl.models.qwen_vision import Resize
from longrl.policy import Policy
from longrl.rollout.native import NativeEngine
from longrl.types import Clip, Example, Message, Prompt
from longrl.verify import Case, make_case
from longrl.video.audio import read_audio
from longrl.video.decode import read_frames
from longrl.video.encode import embed
from longrl.video.image import read_image

SEEN = ("text", "image", "several images", "interleaved", "video")
HEARD = ("audio", "video with its sound")
TAKES: dict[str, tuple[str, ...]] = {
    "qwen2": ("text",),
    "qwen3": ("text",),
    "qwen2_5_vl": SEEN,
    "qwen3_vl": SEEN,
    "qwen2_5_omni": (*SEEN, *HEARD),
    "vila": SEEN,
}
"""Family -> what may be in its prompts. All else is refused (tested too). A family more is a line more."""
SIDE, SECONDS, FPS = 64, 10.6, 1.0
"""Of the video: pixels; 11 frames, so that the last one stands for two; five of Omni's windows of sound and a piece."""
QUESTIONS = ("What comes first?", "Is it red?")


def taking(kind: str) -> pytest.MarkDecorator:
    """Parametrises a test over the families that take such media."""
    return pytest.mark.parametrize("name", [name for name, kinds in TAKES.items() if kind in kinds])


every = taking("text")


def contents(files: Path) -> dict[str, tuple[str | Clip, ...]]:
    """Kind of prompt -> what is in it, but for the question."""
    video, heard = str(files / "video.mp4"), str(files / "video.mp4")
    first, second = Image(str(files / "a.png")), Image(str(files / "b.png"))
    seen = Video(video, fps=FPS)
    return {
        "text": ("Think of a clip.",),
        "image": (first, "Look."),
        "several images": (first, second),
        "interleaved": ("At first", second, "and then", seen, "and in between", first),
        "video": (seen, "Look."),
        "audio": ("Listen.", Audio(heard, start_s=0.5)),
        "video with its sound": (seen, Audio(heard, with_video=True)),
    }


@cache
def twin(name: str, dtype: torch.dtype) -> Family:
    """With room for four tokens in a pair of frames."""
    family = load_family(ModelConfig(path=f"tiny:{name}", dtype=str(dtype).removeprefix("torch.")))  # pyright: ignore
    limits = getattr(getattr(family, "vision", None), "limits", {})
    if "video" in limits:
        limits["video"] = (784, int(SECONDS * FPS + 1) * SIDE**2 if name == "qwen3_vl" else SIDE**2)
    return family


def untied(name: str, folder: Path) -> Path:
    """A twin's folder with a head of its own, as the large published models have it."""
    family: Any = load_family(ModelConfig(path=f"tiny:{name}"))
    for config in (family.model.config, family.model.config.get_text_config()):
        config.tie_word_embeddings = False
    drawn = torch.randn(family.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    family.model.lm_head.weight = torch.nn.Parameter(0.08 * drawn)
    family.save(folder)
    return folder


def ask(family: Family, content: tuple[str | Clip, ...]) -> tuple[list[Example], list[Prompt]]:
    """Every question about the same media."""
    examples = [
        Example(id=f"q{i}", messages=(Message(role="user", content=(*content, text)),), answer=None, kind="open")
        for i, text in enumerate(QUESTIONS)
    ]
    media = tuple(embed(clip, family, None) for clip in examples[0].clips)
    return examples, [family.prompt(example, media) for example in examples]


def written(family: Family, content: tuple[str | Clip, ...]) -> Case:
    """Two responses to each question: sampled ones might hold media tokens, which stock transformers would look for."""
    _, prompts = ask(family, content)
    given = [tuple(response_ids(family, text)) for text in ("it is red", "no")]
    rows = [(prompt, response) for prompt in prompts for response in given]
    return Case(prompts=tuple(p for p, _ in rows), responses=tuple(r for _, r in rows), logprobs=())


def sampled(family: Family, content: tuple[str | Clip, ...], **changes: Any) -> Case:
    """What the engine answers."""
    config = RolloutConfig.model_validate({"group_size": 2, "max_new_tokens": 6, **changes})
    return make_case(NativeEngine(Policy(family), config), *ask(family, content))


def is_stock(family: Family) -> bool:
    """Whether transformers has a class of the whole model."""
    return type(family.model).__module__.startswith("transformers.")


def stock_logprobs(family: Any, case: Case) -> Tensor:
    """[tokens], of the responses one after the other, by stock transformers from token ids, pixels and sound: its own
    towers, merging and attention.

    Positions are ours: transformers 5.17 to 5.24 places text after a video wrongly in Qwen2.5-VL.
    """
    model, inputs, found = family.model, _raw(family, case.prompts[0]), []
    model.set_attn_implementation("sdpa")
    for prompt, response in zip(case.prompts, case.responses, strict=True):
        whole = prompt.followed_by(response)
        axes = whole.position_ids
        positions = axes[:, None] if len(axes) > 1 else axes
        with torch.no_grad():
            logits = model(input_ids=whole.token_ids[None], position_ids=positions, **inputs).logits
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    family.set_attention(model)
    return torch.cat(found)


def _raw(family: Any, prompt: Prompt) -> dict[str, Tensor]:
    """Patches come from our processor, which is tested by itself (tests/parity/test_patches.py)."""
    inputs: dict[str, list[Tensor]] = {}

    def add(**tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            inputs.setdefault(name, []).append(tensor)

    for media in prompt.media:
        clip = media.clip
        assert clip
        if clip.kind == "audio":
            extract = WhisperFeatureExtractor(feature_size=128, chunk_length=300)
            samples = read_audio(clip.path, clip.start_s, clip.end_s)
            made = extract(samples, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
            add(
                input_features=made["input_features"].to(family.model.dtype),
                feature_attention_mask=made["attention_mask"],
            )
            continue
        chunks = [read_image(clip.path)] if clip.kind == "image" else list(read_frames(clip))
        frames = np.concatenate([chunk.pixels for chunk in chunks])
        even = np.concatenate([frames, frames[-1:].repeat(len(frames) % 2, 0)])
        rows, grid = family.vision.patches(even, Resize(clip.kind, len(frames), None))
        ending = "" if clip.kind == "image" else "_videos"
        add(**{f"pixel_values{ending}": rows, f"{clip.kind}_grid_thw": torch.tensor([grid])})
    return {name: torch.cat(tensors) for name, tensors in inputs.items()}
