"""Synthetic videos: what happens is what is seen and asked."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from longrl.data.synthetic.paint import RGB, look_at, paint
from longrl.data.synthetic.questions import CATEGORIES, COUNTS, LETTERS, ask, places, response
from longrl.data.synthetic.world import COLOURS, NUM_EVENTS, PLACES, SHAPES, make_story


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
        return COUNTS[len(names) - 4]
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
            # 60 of 255 is far above what h264 changes inside an object (4) and what backgrounds vary by (about 10).
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
            assert question.careful.endswith(f" ({question.answer}).")
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
        shown = re.match(r"the video shows ([^.(]+[^.( ])", question.careful)
        assert (shown is None) == (question.category == "spatial")
        if shown is not None:
            listed = shown[1].split(", ")
            assert listed == [f"{n} {event.colour}" for n, event in enumerate(story.events[: len(listed)], start=1)]
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


def test_places():
    story = make_story(2, 3600, 4)
    listed = [f"{n} {name.split()[0]} {place}" for n, (name, place, _) in enumerate(timeline(story), start=1)]
    assert places(story.events).split(", ") == listed
