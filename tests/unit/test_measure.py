"""What is known of a clip before it is decoded: exactly what encoding then gives; and prompts that are too long."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from media import CONSTANT, VARIABLE, render

from longrl.config import CacheConfig, DataConfig
from longrl.data.examples import Skips
from longrl.data.prompts import PromptBuilder
from longrl.models import qwen_vision
from longrl.models.qwen3_vl import Qwen3VL
from longrl.models.qwen_vl import Qwen25VL
from longrl.types import Clip, Example, MediaError, Message
from longrl.video import decode
from longrl.video.encode import embed


@pytest.fixture(scope="module")
def family() -> Qwen25VL:
    family = Qwen25VL.tiny(0, torch.float32)
    family.vision.limits["video"] = (4 * 28 * 28, 12 * 28 * 28)
    return family


def odd_size(path: Path) -> Path:
    """Pictures of 101 x 67, which no block size divides."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 101, 67, "yuv444p"
        for level in range(30):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((67, 101, 3), 8 * level, np.uint8), "rgb24"))
            )
        container.mux(stream.encode())
    return path


FILES = {
    "constant.mp4": {},
    "variable.mkv": {"times_s": VARIABLE, "bframes": 2},
    "turned.mp4": {"rotation": 90},
    "mirrored.mov": {"rotation": 180, "hflip": True},
    "old.avi": {"codec": "mpeg4", "ticks": Fraction(1, 25)},
    "vp9.webm": {"codec": "libvpx-vp9", "ticks": Fraction(1, 1000), "options": {"cpu-used": "8"}},
    "offset.ts": {"times_s": [3 + time_s for time_s in CONSTANT], "ticks": Fraction(1, 25)},
    "odd.mp4": None,
}
CLIPS = [
    {"fps": 2.0},
    {"fps": 1.7, "start_s": 0.55, "end_s": 2.4},
    {"num_frames": 1},
    {"num_frames": 9, "max_pixels": 5 * 28 * 28},
    {"num_frames": 41, "start_s": 1.0, "end_s": 2.0},
]


def question(*clips: Clip) -> Example:
    message = Message(role="user", content=(*clips, "What comes first?"))
    return Example(id="q7", messages=(message,), answer="a", kind="open")


@pytest.mark.parametrize("name", FILES)
def test_what_is_measured_is_what_encoding_gives(family, tmp_path, name, monkeypatch):
    options = FILES[name]
    if options and options.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this build of ffmpeg has no {options['codec']}")
    path = odd_size(tmp_path / name) if options is None else render(tmp_path / name, **options)
    monkeypatch.setattr(qwen_vision, "CHUNK_GRIDS", 3)
    clips = [Clip(path=str(path), **some) for some in CLIPS]
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_run", refuse)
        sizes = [family.measure(clip) for clip in clips]
        length = family.count_tokens(question(*clips), [size.num_tokens for size in sizes])
    embedded = tuple(embed(clip, family, None) for clip in clips)
    for clip, size, media in zip(clips, sizes, embedded, strict=True):
        assert size.num_tokens == len(media.embeds)
        assert size.num_frames == len(media.timestamps_s)
        assert size.num_bytes == media.embeds.nbytes + media.timestamps_s.nbytes
        chunks = list(family.encode(clip))
        assert len(chunks) == size.num_chunks
        assert {(len(c.timestamps_s), len(c.embeds)) for c in chunks[:-1]} <= {(size.chunk_frames, size.chunk_tokens)}
    assert length == len(family.prompt(question(*clips), embedded))
    assert len({size.num_tokens for size in sizes}) == len(CLIPS), "the clips must differ, or this tests less"


def refuse(*_: object) -> None:
    """In place of decoding: every packet goes through there."""
    raise AssertionError("a packet was decoded")


def test_a_chunk_does_not_depend_on_what_else_is_encoded(family, tmp_path, monkeypatch):
    """Bits: the tower sees the same frames in the same call, whoever calls it."""
    clip = Clip(path=str(render(tmp_path / "a.mp4", VARIABLE, bframes=2)), num_frames=37)
    monkeypatch.setattr(qwen_vision, "CHUNK_GRIDS", 3)
    whole = list(family.encode(clip))
    assert len(whole) == 7
    for start, stop in [(0, 1), (1, 4), (4, 7), (6, 7), (3, 3)]:
        part = list(family.encode(clip, range(start, stop)))
        assert len(part) == stop - start
        for ours, theirs in zip(part, whole[start:stop], strict=True):
            assert torch.equal(ours.embeds, theirs.embeds)
            assert torch.equal(ours.timestamps_s, theirs.timestamps_s)
            assert (ours.grid_thw, ours.seconds_per_grid) == (theirs.grid_thw, theirs.seconds_per_grid)


def test_large_frames_make_small_chunks(family, monkeypatch):
    """By patches, by bytes of pixels, and one temporal patch at least."""
    sizes = {}
    for height, width in [(64, 96), (720, 1280), (2160, 3840), (8192, 8192)]:
        index = SimpleNamespace(height=height, width=width)
        selected = SimpleNamespace(index=index, chosen=np.arange(3601))
        with monkeypatch.context() as patch:
            patch.setitem(family.vision.limits, "video", (28 * 28, 768 * 28 * 28))
            sizes[height] = family.vision._measure_video(Clip(path="a.mp4", fps=1), selected)
    # 64 temporal patches; 3,000 patches each; 50 MB each; more than all bounds
    assert [size.chunk_frames for size in sizes.values()] == [128, 10, 2, 2]
    assert all(size.num_chunks == -(-3601 // size.chunk_frames) for size in sizes.values())


# Too long


@pytest.fixture
def clip(tmp_path) -> Clip:
    return Clip(path=str(render(tmp_path / "a.mp4")), num_frames=20)


def builder(family: Qwen25VL, tmp_path: Path, on_error: str, max_tokens: int) -> PromptBuilder:
    skips = Skips(DataConfig.model_validate({"on_error": on_error, "max_skips": 1}))
    return PromptBuilder(family, CacheConfig(dir=str(tmp_path / "cache")), skips, max_tokens=max_tokens)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_decoded(family, tmp_path, clip, monkeypatch):
    example = question(clip)
    length = family.count_tokens(example, [family.measure(clip).num_tokens])
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_run", refuse)
        with pytest.raises(MediaError) as caught:
            builder(family, tmp_path, "raise", length - 1)([example])
        skipping = builder(family, tmp_path, "skip", length - 1)
        assert skipping([example]) == skipping([example]) == ([], [])
    line = str(caught.value)
    for part in ("example q7", f"{length} tokens", f"data.max_prompt_tokens allows {length - 1}", "video.max_pixels"):
        assert part in line
    assert "\n" not in line
    assert skipping.skips.names == {"q7": line.removesuffix("; or set data.on_error to skip")}
    assert skipping.cache.info().num_entries == 0
    kept, [prompt] = builder(family, tmp_path, "raise", length)([example])
    assert (kept, len(prompt)) == ([0], length)


@pytest.mark.parametrize("twin", [Qwen25VL, Qwen3VL])
def test_a_clip_that_an_engine_has_no_room_for_is_refused_by_its_embeddings(tmp_path, clip, twin):
    """Not by what it takes up in a prompt, where Qwen3-VL has the times between them."""
    family = twin.tiny(0, torch.float32)
    size = family.measure(clip)
    assert (size.prompt_tokens > size.num_tokens) == (twin is Qwen3VL)
    refusing = builder(family, tmp_path, "raise", 10**6)
    for _ in ("measured", "in the cache"):
        refusing.limit_to(None, size.num_tokens - 1, "the engine")
        with pytest.raises(MediaError, match=f"a clip of {size.num_tokens} embeddings, but the engine has room for"):
            refusing([question(clip)])
        refusing.limit_to(None, size.num_tokens, "the engine")
        assert refusing([question(clip)])[0] == [0]


def test_what_the_cache_holds_is_counted_too(family, tmp_path, clip):
    [prompt] = builder(family, tmp_path, "raise", 10**6)([question(clip)])[1]
    with pytest.raises(MediaError, match=f"would have {len(prompt)} tokens"):
        builder(family, tmp_path, "raise", len(prompt) - 1)([question(clip)])


def test_media_that_turn_out_unreadable_are_told_with_the_example_and_how_to_go_on(family, tmp_path, clip):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(clip.path).read_bytes()[:2000])
    example = question(replace(clip, path=str(cut)))
    with pytest.raises(MediaError, match=rf"^example q7: .*{cut}.*; or set data.on_error to skip$"):
        builder(family, tmp_path, "raise", None)([example])
    skipping = builder(family, tmp_path, "skip", None)
    assert skipping([example]) == ([], [])
    assert str(cut) in skipping.skips.names["q7"]


def test_one_that_is_too_long_keeps_no_other_from_being_decoded_first(family, tmp_path, clip):
    """All of a batch are looked at before any is decoded, and the others about the same video go on."""
    short, long = question(clip), replace(question(clip, clip), id="q8")
    length = family.count_tokens(short, [family.measure(clip).num_tokens])
    refusing = builder(family, tmp_path, "raise", length)
    with pytest.raises(MediaError, match="q8"):
        refusing([short, long])
    assert refusing.cache.info().num_entries == 0
    kept, prompts = builder(family, tmp_path, "skip", length)([long, short])
    assert (kept, [len(prompt) for prompt in prompts]) == ([1], [length])
