"""Questions about a story, with the truth, a thought that looks at the video and a thought that does not.

The vocabulary is small and the sentences are plain, because tiny models read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from longrl.data.synthetic.world import COLOURS, NUM_EVENTS, PLACES, SHAPES, Event, Story

LETTERS = ("A", "B", "C", "D")
CATEGORIES = ("order", "spatial", "counting", "plot")
COUNTS = ("four", "five", "six", "seven")
"""Of NUM_EVENTS. Written out, because figures number the events in a thought."""
CLEARLY_LONGER = 1.4
"""`which object is shown longest?` is asked only if the longest outlasts the second by this factor."""
MAX_REDRAWS = 20
"""Draws of fresh options before a question about a small story may repeat."""


Card = TypeVar("Card")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its truth and two ways to respond."""

    text: str
    options: tuple[str, ...]
    """Four, or none for kind `open`."""
    answer: str
    """The letter of the right option, or the text for kind `open`."""
    kind: str
    """choice | open"""
    category: str
    """order | spatial | counting | plot"""
    careful: str
    """A thought that says what the video shows and ends at the answer."""
    hasty: str
    """A thought that does not look and guesses."""
    hasty_answer: str
    """What the hasty thought guessed: independent of the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    """Something true of a story, before options and letters."""

    category: str
    text: str
    truth: str
    thought: str
    asked: Event | None = None
    """The object the question names; never an option."""


def ask(story: Story, seed: int, num: int, *, open_fraction: float = 0.15) -> list[Question]:
    """Ask about a story: a pure function of its arguments.

    Categories take turns. A fact is asked again only when all of its category have been, and then with other options
    as long as there are any. The letters of right options are balanced.

    Args:
        story: What happens.
        seed: Seed of the choice of facts, options, letters and guesses.
        num: Questions to ask.
        open_fraction: Share of questions without options, 0 to 1.
    """
    rng = np.random.default_rng((seed, story.seed))
    facts = _facts(story)
    decks = {c: _deck(rng, [fact for fact in facts if fact.category == c]) for c in CATEGORIES}
    letters = _deck(rng, list(LETTERS))
    questions: list[Question] = []
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for index in range(num):
        fact = next(decks[CATEGORIES[index % len(CATEGORIES)]])
        if rng.random() < open_fraction and (fact.text, ()) not in seen:
            question = _open_question(fact, rng)
        else:
            letter = next(letters)
            question = _choice_question(fact, letter, story, rng)
            for _ in range(MAX_REDRAWS):
                if (question.text, question.options) not in seen:
                    break
                question = _choice_question(fact, letter, story, rng)
        seen.add((question.text, question.options))
        questions.append(question)
    return questions


def response(thought: str, answer: str) -> str:
    """A full response, as a model is taught to write it."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def places(events: Sequence[Event]) -> str:
    """What appears where, in order."""
    return ", ".join(f"{number} {event.colour} {event.place}" for number, event in enumerate(events, start=1))


def timeline(events: Sequence[Event]) -> str:
    """What a careful thought says of events: their numbers and colours, in order."""
    return ", ".join(f"{number} {event.colour}" for number, event in enumerate(events, start=1))


def _deck(rng: np.random.Generator, cards: list[Card]) -> Iterator[Card]:
    """Deal cards in random order, shuffling anew whenever all are dealt."""
    while True:
        for index in rng.permutation(len(cards)):
            yield cards[index]


def _facts(story: Story) -> list[_Fact]:
    """Everything that may be asked about a story."""
    events = story.events
    shown = [f"the video shows {timeline(events[:end])}." for end in range(len(events) + 1)]
    count = COUNTS[NUM_EVENTS.index(len(events))]
    facts = [
        _order("what comes first?", events[0], f"{shown[1]} it is {events[0].colour}."),
        _order("what comes last?", events[-1], f"{shown[-1]} it is {events[-1].colour}."),
        _count("how many objects appear?", count, f"{shown[-1]} that makes {count}."),
    ]
    facts += [
        _Fact(
            category="spatial", text=f"where is the {event.name}?", truth=event.place, thought=_at(event), asked=event
        )
        for event in events
    ]
    for n, (one, two) in enumerate(pairwise(events), start=2):
        then = f"{shown[n - 1]} then {n} {two.colour}."
        facts += [
            _order(f"what comes right after the {one.name}?", two, then, asked=one),
            _order(f"what comes right before the {two.name}?", one, f"{shown[n]} before it comes {one.colour}.", two),
            _Fact(
                category="plot",
                text=f"where is the object that comes right after the {one.name}?",
                truth=two.place,
                thought=f"{then} {_at(two)}",
                asked=one,
            ),
        ]
    for n, (one, two, three) in enumerate(zip(events, events[1:], events[2:], strict=False), start=3):
        text = f"what comes two places after the {one.name}?"
        thought = f"{shown[n - 2]} then {n - 1} {two.colour}, {n} {three.colour}."
        facts.append(_Fact(category="plot", text=text, truth=three.name, thought=thought, asked=one))
    second, longest = sorted(events, key=lambda event: event.length_s)[-2:]
    if longest.length_s >= CLEARLY_LONGER * second.length_s:
        facts.append(
            _count("which object is shown longest?", longest.name, f"{shown[-1]} the longest is {longest.colour}.")
        )
    return facts


def _at(event: Event) -> str:
    return f"the {event.colour} one is at the {event.place}."


def _order(text: str, truth: Event, thought: str, asked: Event | None = None) -> _Fact:
    return _Fact(category="order", text=text, truth=truth.name, thought=thought, asked=asked)


def _count(text: str, truth: str, thought: str) -> _Fact:
    return _Fact(category="counting", text=text, truth=truth, thought=thought)


def _open_question(fact: _Fact, rng: np.random.Generator) -> Question:
    pool = _pool(fact)
    guess = str(rng.choice(pool)) if pool else f"{rng.choice(COLOURS)} {rng.choice(SHAPES)}"
    return _question(fact, (), "open", fact.truth, fact.thought, guess)


def _choice_question(fact: _Fact, letter: str, story: Story, rng: np.random.Generator) -> Question:
    options = [str(option) for option in rng.permutation(_distractors(fact, story, rng))]
    options.insert(LETTERS.index(letter), fact.truth)
    careful = f"{fact.thought.removesuffix('.')} ({letter})."
    return _question(fact, tuple(options), "choice", letter, careful, str(rng.choice(LETTERS)))


def _question(fact: _Fact, options: tuple[str, ...], kind: str, answer: str, careful: str, guess: str) -> Question:
    return Question(
        text=fact.text,
        options=options,
        answer=answer,
        kind=kind,
        category=fact.category,
        careful=careful,
        hasty=f"no need to look. i guess {guess}.",
        hasty_answer=guess,
    )


def _pool(fact: _Fact) -> tuple[str, ...]:
    """The closed set that a truth comes from: places or counts; empty for an object."""
    return next((pool for pool in (PLACES, COUNTS) if fact.truth in pool), ())


def _distractors(fact: _Fact, story: Story, rng: np.random.Generator) -> list[str]:
    """Three wrong options: objects of the same video while they last, so that options do not give the answer away."""
    pool = _pool(fact)
    if pool:
        return [option for option in pool if option != fact.truth]
    others = [event.name for event in story.events if event is not fact.asked and event.name != fact.truth]
    present = [str(name) for name in rng.permutation(others)[:3]]
    absent = [colour for colour in COLOURS if colour not in {event.colour for event in story.events}]
    missing = rng.permutation(absent)[: 3 - len(present)]
    return present + [f"{colour} {rng.choice(SHAPES)}" for colour in missing]
