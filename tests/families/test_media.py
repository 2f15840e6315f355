"""Prompts of every kind, in every family: the prompt computed once against stock transformers, and the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longrl.models import qwen_vision, vila_vision
from longrl.policy import Policy
from longrl.types import Clip, Example, MediaError, Message
from longrl.verify import differences, separate, shared
from longrl.video.cache import EmbedCache
from longrl.video.encode import embed
from tests.families.matrix import HEARD, SEEN, TAKES, ask, contents, is_stock, stock_logprobs, taking, twin, written
from tests.unit.media import render

LOGPROBS = 1e-5
"""fp32; seen up to 3e-6."""
GRADIENTS, NORMED = 1e-7, 3e-7
"""Relative, fp64. transformers' norms and rotary angles are fp32 whatever the dtype: 7e-8 is seen; and 1.1e-7 where
queries and keys have norms of their own."""


def check(name: str, kind: str, files: Path) -> None:
    """Two questions, two responses each. What is no class of transformers is put together in its own tests."""
    content = contents(files)[kind]
    family = twin(name, torch.float64)
    case = written(family, content)
    gradients, _ = differences(shared(Policy(family), case), separate(family, case))
    assert gradients < (NORMED if name.startswith("qwen3") else GRADIENTS)
    family = twin(name, torch.float32)
    case = written(family, content)
    ours = shared(Policy(family), case).logprobs
    theirs = stock_logprobs(family, case) if is_stock(family) else separate(family, case).logprobs
    assert (ours - theirs).abs().max() < LOGPROBS


@taking("text")
def test_text(name, files):
    check(name, "text", files)


@taking("image")
def test_image(name, files):
    check(name, "image", files)


@taking("several images")
def test_several_images(name, files):
    check(name, "several images", files)


@taking("interleaved")
def test_interleaved(name, files):
    check(name, "interleaved", files)


@taking("video")
def test_video(name, files):
    check(name, "video", files)


@taking("audio")
def test_audio(name, files):
    check(name, "audio", files)


@taking("video with its sound")
def test_video_with_its_sound(name, files):
    check(name, "video with its sound", files)


@pytest.mark.parametrize("name", TAKES)
def test_what_is_not_taken_is_refused(name, files):
    """So that a cell of the table that is empty is known to be so."""
    family = twin(name, torch.float32)
    for kind in (*SEEN, *HEARD):
        example = Example(
            id="q", messages=(Message(role="user", content=(*contents(files)[kind], "?")),), answer=None, kind="open"
        )
        if kind in TAKES[name]:
            family.count_tokens(example, [1] * len(example.clips))
        else:
            with pytest.raises(ValueError, match=f"{family.model_type} takes text"):
                family.count_tokens(example, [1] * len(example.clips))


@taking("image")
def test_cached_embeddings_are_the_live_ones(name, files, tmp_path):
    """Bit for bit, with their times and what DeepStack adds; and of the sizes that were told before."""
    family, cache = twin(name, torch.float32), EmbedCache(tmp_path)
    clips = {part for kind in TAKES[name] for part in contents(files)[kind] if isinstance(part, Clip)}
    for clip in clips:
        live = embed(clip, family, None)
        embed(clip, family, cache)
        cached, size = embed(clip, family, cache), family.measure(clip)
        assert cached.key == live.key
        for field in ("embeds", "timestamps_s", "deepstack"):
            one, other = getattr(live, field), getattr(cached, field)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert (size.num_tokens, size.prompt_tokens) == (len(live.embeds), family.prompt_tokens(live))
        assert (cached.grid_thw, cached.seconds_per_grid) == (live.grid_thw, live.seconds_per_grid)
    assert cache.hits == len(clips)
    for kind in TAKES[name]:
        examples, prompts = ask(family, contents(files)[kind])
        for example, prompt in zip(examples, prompts, strict=True):
            assert len(prompt) == family.count_tokens(example, [family.prompt_tokens(one) for one in prompt.media])


@taking("video")
def test_a_part_is_not_decoded_from_the_start(monkeypatch, name, tmp_path):
    """Key frames of this file cannot be relied on. Each of many ranks would decode all of it; one does the whole."""
    for module, chunk in ((qwen_vision, "CHUNK_GRIDS"), (vila_vision, "CHUNK_FRAMES")):
        monkeypatch.setattr(module, chunk, 2)
    path = render(tmp_path / "refreshed.mp4", gop=25, options={"x264-params": "intra-refresh=1"})
    family, clip = twin(name, torch.float32), Clip(path=str(path), num_frames=30)
    chunk = 4 // family.measure(clip).chunk_frames
    with pytest.raises(MediaError, match="cannot be decoded"):  # the fourth frame, from its key frame on
        list(family.encode(clip, range(chunk, chunk + 1)))
    assert sum(len(chunk.embeds) for chunk in family.encode(clip)) == family.measure(clip).num_tokens
