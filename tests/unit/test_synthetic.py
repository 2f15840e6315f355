"""Synthetic videos: what happens is what is seen, written and asked."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import groupby
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longrl.config import SyntheticConfig
from longrl.data.synthetic.dataset import build_dataset
from longrl.data.synthetic.gallery import gallery
from longrl.data.synthetic.paint import RGB, look_at, paint
from longrl.data.synthetic.questions import CATEGORIES, COUNTS, LETTERS, ask, captions, response
from longrl.data.synthetic.render import KEY_FRAME_EVERY_S, SCALE_HZ, render
from longrl.data.synthetic.world import COLOURS, NUM_EVENTS, PLACES, SHAPES, make_story

# A colour's distance in RGB, after 4:2:0 and crf 20, from what was painted: measured at most 12 inside an object.
# The nearest two object colours are about 200 apart.
COLOUR_TOLERANCE = 30


def length_s(path):
    with av.open(str(path)) as container:
        assert container.duration is not None
        return container.duration / av.time_base


@cache
def timeline(story):
    """What an eye that looks once a second writes down: (name, place, seconds shown), in order."""
    seen = [story.event_at(second + 0.5) for second in range(int(story.duration_s))]
    runs = [(event, len(list(run))) for event, run in groupby(seen)]
    return [(event.name, event.place, shown_s) for event, shown_s in runs if event is not None]


def true_answer(text, seen):
    """The answer to a question, from a timeline alone."""
    names = [name for name, _, _ in seen]
    places = {name: place for name, place, _ in seen}
    if text == "what comes first?":
        return names[0]
    if text == "what comes last?":
        return names[-1]
    if text == "how many objects appear?":
        return str(len(names))
    if text == "which object is shown longest?":
        lengths = sorted((shown_s, name) for name, _, shown_s in seen)
        assert lengths[-1][0] >= 1.4 * lengths[-2][0]
        return lengths[-1][1]
    for pattern, find in (
        (r"what comes right after the (.+)\?", lambda i: names[i + 1]),
        (r"what comes right before the (.+)\?", lambda i: names[i - 1]),
        (r"what comes two places after the (.+)\?", lambda i: names[i + 2]),
        (r"where is the object that comes right after the (.+)\?", lambda i: places[names[i + 1]]),
        (r"where is the (\w+ \w+)\?", lambda i: places[names[i]]),
    ):
        if match := re.fullmatch(pattern, text):
            index = names.index(match[1])
            assert index > 0 or "before" not in text
            return find(index)
    raise AssertionError(text)


@pytest.fixture(scope="module")
def asked():
    """2,000 questions about 100 fresh stories: (story, question)."""
    stories = [make_story(seed, 3600.0) for seed in range(9000, 9100)]
    return [(story, question) for story in stories for question in ask(story, 5, 20)]


@pytest.mark.parametrize("duration_s", [10, 12.5, 59.9, 60, 61, 3600, 3777.5])
def test_story_keeps_its_rules(duration_s):
    for seed in range(40):
        story = make_story(seed, duration_s)
        events = story.events
        assert len(events) in NUM_EVENTS
        assert len({event.colour for event in events}) == len(events)
        assert min(event.length_s for event in events) >= 0.04 * duration_s - 0.1  # a tick of 0.1 s below a minute
        edges = [0.0, *(edge for event in events for edge in (event.start_s, event.end_s)), duration_s]
        gaps = np.diff(edges)[::2]
        assert gaps.min() > 0
        # A gap is rounded to a tick (0.1 s, or 1 s from a minute on); the last also takes what is left of the video.
        assert gaps.max() <= 0.03 * duration_s + (1.5 if duration_s >= 60 else 0.15)
        assert 3 <= len(story.scenes) <= 5
        assert story.scenes[0].start_s == 0
        assert all(one.start_s < two.start_s for one, two in zip(story.scenes, story.scenes[1:], strict=False))
        if duration_s >= 60:
            assert all(edge == int(edge) for edge in edges[:-1])


def test_story_is_a_function_of_its_seed():
    assert make_story(3, 3600) == make_story(3, 3600)
    assert make_story(3, 3600) != make_story(4, 3600)
    assert [len(make_story(3, 3600, num).events) for num in NUM_EVENTS] == list(NUM_EVENTS)
    drawn = Counter(len(make_story(seed, 3600).events) for seed in range(400))
    assert min(drawn[num] for num in NUM_EVENTS) > 70  # 100 each on average, standard deviation 9


@pytest.mark.parametrize(
    ("duration_s", "num", "match"), [(9, None, "duration_s"), (float("nan"), 4, "duration_s"), (60, 8, "num_events")]
)
def test_impossible_story_is_refused(duration_s, num, match):
    with pytest.raises(ValueError, match=match):
        make_story(0, duration_s, num)


def test_objects_are_seen_where_and_when_they_are():
    height, width = 120, 160
    for seed in range(6):
        story = make_story(seed, 600)
        for event in story.events:
            for time_s in (event.start_s, event.end_s - 0.01):
                frame = paint(story, time_s, height, width)
                row = height // 4 if event.place.startswith("top") else 3 * height // 4
                col = width // 4 if event.place.endswith("left") else 3 * width // 4
                assert tuple(frame[row, col]) == RGB[event.colour]
            gone = paint(story, event.end_s, height, width)
            assert tuple(gone[row, col]) != RGB[event.colour]
            assert gone[row - 20 : row + 20, col - 20 : col + 20].std(axis=(0, 1)).max() < 15  # bare, muted background


def test_shapes_and_colours_survive_28_by_28():
    """Any two objects at a place differ plainly in several pixels of the frame as a tiny model sees it."""
    story = make_story(0, 600)
    event = story.events[0]
    seen = []
    for colour in COLOURS:
        for shape in SHAPES:
            told = replace(story, events=(replace(event, colour=colour, shape=shape),))
            frame = Image.fromarray(paint(told, event.start_s, 120, 160))
            seen.append(np.asarray(frame.resize((28, 28), Image.Resampling.BICUBIC), int))
    for index, one in enumerate(seen):
        for two in seen[:index]:
            # 60 of 255 is five times what h264 changes inside an object; the background varies by about 10.
            assert (np.abs(one - two).max(axis=2) > 60).sum() >= 8


def test_hand_turns_once_a_minute_and_says_no_more():
    story = make_story(1, 3600, 4)
    event = max(story.events, key=lambda event: event.length_s)
    start = next(
        t for t in range(int(event.start_s), int(event.end_s) - 60) if story.scene_at(t) == story.scene_at(t + 60)
    )
    frames = [paint(story, start + second, 120, 160) for second in range(61)]
    assert len({frame.tobytes() for frame in frames}) == 60
    assert np.array_equal(frames[0], frames[60])
    assert np.array_equal(paint(story, start + 0.5, 120, 160), frames[0])
    assert look_at(story, start + 0.5) == look_at(story, start)


def test_truth_matches_a_brute_force_reading(asked):
    forms = Counter()
    for story, question in asked:
        truth = true_answer(question.text, timeline(story))
        if question.kind == "choice":
            assert len(question.options) == len(set(question.options)) == 4
            assert question.options[LETTERS.index(question.answer)] == truth
            assert question.careful.endswith(f" that is {question.answer}.")
        else:
            assert (question.kind, question.options, question.answer) == ("open", (), truth)
        named = re.search(r"(?:after|before) the (\w+ \w+)\?", question.text)
        assert not named or named[1] not in question.options
        forms[re.sub(r"the \w+ \w+\?", "the X?", question.text)] += 1
    assert len(forms) == 9
    assert Counter(question.category for _, question in asked) == dict.fromkeys(CATEGORIES, 500)


def test_options_come_from_the_same_video_while_there_are_enough(asked):
    for story, question in asked:
        if question.kind == "choice" and question.options[0] not in (*PLACES, *COUNTS):
            present = {event.name for event in story.events}
            named = "after the" in question.text or "before the" in question.text
            assert len(present & set(question.options)) == min(4, len(present) - named)


def test_thoughts(asked):
    for story, question in asked:
        colours = ", ".join(event.colour for event in story.events)
        listed = question.careful.startswith(f"the video shows {colours}. ")
        assert listed == (question.category != "spatial")
        assert question.hasty == f"no need to look. i guess {question.hasty_answer}."
        for text in (question.text, question.careful.lower(), question.hasty.lower()):
            assert text == " ".join(text.lower().split())
    right = [question.hasty_answer == question.answer for _, question in asked if question.kind == "choice"]
    assert abs(np.mean(right) - 0.25) < 0.04  # about 1,700 guesses: standard deviation 0.0105
    assert response("so.", "B") == "<think>so.</think><answer>B</answer>"


def test_text_alone_does_not_tell_the_answer(asked):
    """Majorities learnt on half of the stories, by form, whole text and option, stay near chance on the other half."""
    choice = [(story.seed, question) for story, question in asked if question.kind == "choice"]
    letters = Counter(question.answer for _, question in choice)
    assert max(letters.values()) - min(letters.values()) < 0.05 * len(choice)

    def form(text):
        return re.sub(r"the \w+ \w+\?", "the X?", text)

    chosen, offered = defaultdict(Counter), Counter()
    for seed, question in choice:
        if seed % 2:
            truth = question.options[LETTERS.index(question.answer)]
            chosen["letter", form(question.text)][question.answer] += 1
            chosen["letter", question.text][question.answer] += 1
            chosen["option", form(question.text)][truth] += 1
            chosen["option", question.text][truth] += 1
            offered.update((form(question.text), option) for option in question.options)
    right = defaultdict(list)
    for seed, question in choice:
        if seed % 2 == 0:
            for how, key in (("form", form(question.text)), ("text", question.text)):
                by_letter = chosen["letter", key].most_common(1)
                right["letter", how].append(bool(by_letter) and by_letter[0][0] == question.answer)
                best = max(question.options, key=chosen["option", key].__getitem__)
                right["option", how].append(best == question.options[LETTERS.index(question.answer)])
            rate = [
                chosen["option", form(question.text)][o] / (1 + offered[form(question.text), o])
                for o in question.options
            ]
            right["rate", "form"].append(LETTERS[int(np.argmax(rate))] == question.answer)
    assert all(len(hits) > 700 for hits in right.values())
    assert {how: round(float(np.mean(hits)), 3) for how, hits in right.items() if np.mean(hits) > 0.33} == {}


def test_asking_is_deterministic_and_hardly_repeats():
    story = make_story(2, 3600, 5)
    assert ask(story, 7, 30) == ask(story, 7, 30)
    assert ask(story, 7, 30) != ask(story, 8, 30)
    many = ask(story, 7, 80)
    assert len({(question.text, question.options) for question in many}) >= 78
    assert len({question.text for question in ask(story, 7, 24)}) >= 18  # counting has but two forms for six turns
    assert {question.kind for question in ask(story, 7, 20, open_fraction=0)} == {"choice"}
    opened = [question.kind == "open" for seed in range(100) for question in ask(make_story(seed, 60), 0, 20)]
    assert 0.12 < np.mean(opened) < 0.18  # 2,000 draws at 0.15: standard deviation 0.008


def test_captions():
    story = make_story(2, 3600, 4)
    assert captions(story).split(", ") == [f"{name} {place}" for name, place, _ in timeline(story)]


@pytest.mark.parametrize("fps", [2, 29.97])
def test_rendered_file_has_exact_times_and_the_painted_pictures(tmp_path, fps):
    story, path = make_story(5, 24.0), tmp_path / "a.mp4"
    render(story, path, fps=fps, width=160, height=120)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt, video.width, video.height) == (
            "h264",
            "yuv420p",
            160,
            120,
        )
        assert not container.streams.audio
        frames = list(container.decode(video))
    assert [(frame.pts or 0) * (frame.time_base or 0) for frame in frames] == [
        i / rate for i in range(math.ceil(24 * rate))
    ]
    keys = [i for i, frame in enumerate(frames) if frame.key_frame]
    assert keys == list(range(0, len(frames), round(KEY_FRAME_EVERY_S * rate)))
    for frame in frames[:: max(1, len(frames) // 40)]:
        seen = frame.to_ndarray(format="rgb24").astype(int)
        painted = paint(story, frame.time, 120, 160).astype(int)
        assert np.abs(seen - painted).mean() < 6  # chroma is halved, so edges differ more than surfaces
        event = story.event_at(frame.time)
        if event is not None:
            row = 30 if event.place.startswith("top") else 90
            col = 40 if event.place.endswith("left") else 120
            assert np.abs(seen[row, col] - RGB[event.colour]).max() < COLOUR_TOLERANCE
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_rendering_is_deterministic(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        render(make_story(5, 15.0), tmp_path / name, fps=5, width=96, height=64, audio=True)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_sound_tells_the_colour(tmp_path):
    story, path = make_story(6, 30.0), tmp_path / "a.mp4"
    render(story, path, fps=1, width=64, height=64, audio=True)
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert abs(len(sound) / rate - 30) < 0.3  # AAC works in blocks of 1,024 samples
    for event in story.events:
        part = sound[round((event.start_s + 0.15) * rate) : round((event.end_s - 0.15) * rate)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * rate))
        assert abs(spectrum.argmax() / 4 - SCALE_HZ[COLOURS.index(event.colour)]) < 3
    silent = sound[round((story.events[-1].end_s + 0.2) * rate) :]
    assert np.abs(silent).max(initial=0) < 0.02


def test_render_refuses_odd_sizes_and_missing_folders(tmp_path):
    story = make_story(0, 10)
    with pytest.raises(ValueError, match="even width and height, got 65 x 64"):
        render(story, tmp_path / "a.mp4", fps=1, width=65, height=64)
    with pytest.raises(OSError, match=r"a\.mp4: cannot write the video") as caught:
        render(story, tmp_path / "nowhere" / "a.mp4", fps=1, width=64, height=64)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # files may not grow further: as a full disk would be
    try:
        with pytest.raises(OSError, match=r"a\.mp4: cannot write the video"):
            render(make_story(0, 60), tmp_path / "a.mp4", fps=10, width=160, height=120)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def run_and_interrupt(script: str, folder: Path, after: str) -> str:
    """Run a script, send it Ctrl-C (as a terminal would, to its whole group) when a file matching `after` appears."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(after)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    return errors


def test_interrupted_rendering_leaves_nothing(tmp_path):
    script = """
import sys, pathlib
from longrl.data.synthetic import render, world
render.render(world.make_story(1, 36000), pathlib.Path(sys.argv[1]) / "a.mp4", fps=10, width=320, height=240)
"""
    assert "KeyboardInterrupt" in run_and_interrupt(script, tmp_path, ".*.part")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small():
    return {
        "train_videos": 2,
        "test_videos": 2,
        "seconds": 20,
        "fps": 2,
        "width": 96,
        "height": 64,
        "train_questions": 12,
        "test_questions": 8,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory, small):
    return build_dataset(SyntheticConfig(dir=str(tmp_path_factory.mktemp("data")), **small))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dataset_rows(built):
    sft, rl, test = read(built.train_sft), read(built.train_rl), read(built.test)
    assert (len(sft), len(rl), len(test)) == (24, 24, 16)
    assert len({row["id"] for row in sft + rl + test}) == 64
    keys = {"id", "video", "question", "options", "answer", "kind", "category"}
    assert all(row.keys() == keys | {"response"} for row in sft)
    assert all(row.keys() == keys for row in rl + test)
    for path, rows in ((built.train_sft, sft), (built.train_rl, rl), (built.test, test)):
        assert {(path.parent / row["video"]) in built.videos for row in rows} == {True}
    assert {row["video"] for row in sft} == {row["video"] for row in rl}
    assert {row["video"] for row in sft}.isdisjoint(row["video"] for row in test)
    hasty = ["no need to look" in row["response"] for row in sft]
    assert sum(hasty) == 12
    for row, guessed in zip(sft, hasty, strict=True):
        assert guessed or row["response"].endswith(f"</think><answer>{row['answer']}</answer>")
    told = {(row["video"], row["question"], *row["options"]) for row in sft}
    repeated = [row for row in rl if (row["video"], row["question"], *row["options"]) in told]
    assert not repeated


def test_dataset_videos(built):
    manifest = json.loads((built.videos[0].parent / "manifest.json").read_text())
    seeds = {name: entry["seed"] for name, entry in manifest.items()}
    assert len(set(seeds.values())) == 4
    assert all(seed % 2 == name.startswith("test") for name, seed in seeds.items())
    for path in built.videos:
        assert 20 <= length_s(path) <= 21
    assert [p.name for p in built.videos[0].parent.glob(".*")] == []


def test_dataset_is_not_rendered_twice_and_mended_where_it_differs(built, small, tmp_path):
    again = build_dataset(SyntheticConfig(dir=str(tmp_path), **small))
    for one, two in zip(built.videos, again.videos, strict=True):
        assert one.read_bytes() == two.read_bytes()
    for name in ("train_sft", "train_rl", "test"):
        assert getattr(built, name).read_text() == getattr(again, name).read_text()

    contents = [path.read_bytes() for path in again.videos]
    again.videos[1].write_bytes(contents[1][:1000])  # truncated behind our back
    stamps = [path.stat().st_mtime_ns for path in again.videos]
    build_dataset(SyntheticConfig(dir=str(tmp_path), **small))
    touched = [path.stat().st_mtime_ns != stamp for path, stamp in zip(again.videos, stamps, strict=True)]
    assert touched == [False, True, False, False]
    assert [path.read_bytes() for path in again.videos] == contents

    build_dataset(SyntheticConfig(dir=str(tmp_path), **{**small, "fps": 4}))
    assert all(path.read_bytes() != content for path, content in zip(again.videos, contents, strict=True))


@pytest.mark.parametrize("when", ["videos", "videos/.train-000.mp4.*.part", "videos/train-001.mp4"])
def test_interrupted_dataset_has_no_half_written_file(tmp_path, when):
    script = """
import sys
from longrl.config import SyntheticConfig
from longrl.data.synthetic.dataset import build_dataset
build_dataset(SyntheticConfig(dir=sys.argv[1], train_videos=30, test_videos=1, seconds=1000, width=64, height=64))
"""
    errors = run_and_interrupt(script, tmp_path, when)
    assert errors.count("Traceback") == 1  # the caller's own; workers say nothing
    written = list((tmp_path / "videos").iterdir())
    assert len(written) < 31
    assert not list(tmp_path.glob("*.jsonl"))
    for path in written:
        assert path.suffix in {".mp4", ".json"}
        if path.suffix == ".mp4":
            assert length_s(path) >= 1000


@pytest.mark.parametrize(("change", "match"), [({"seed": -1}, "videos.seed"), ({"width": 97}, "even width")])
def test_impossible_dataset_is_refused(tmp_path, small, change, match):
    with pytest.raises(ValueError, match=match):
        build_dataset(SyntheticConfig(dir=str(tmp_path), **{**small, **change}))


def test_gallery(built, tmp_path):
    gallery(list(built.videos[:2]), tmp_path / "g.png")
    page = np.asarray(Image.open(tmp_path / "g.png"))
    assert page.shape[1] > 1000
    assert page.shape[0] > 300
    # Frames show saturated objects on the pale page.
    assert (np.ptp(page.astype(int), axis=2) > 150).mean() > 0.01
    with pytest.raises(ValueError, match="at least one video"):
        gallery([], tmp_path / "none.png")
