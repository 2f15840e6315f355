"""Which examples a step gets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from longrl.data.order import by_media, step_examples
from longrl.types import Clip, Example, Message


def example(number: int, video: str) -> Example:
    message = Message(role="user", content=(Clip(path=video, fps=1.0), "what?"))
    return Example(id=str(number), messages=(message,), answer="A", kind="choice")


EXAMPLES = [example(number, "ab"[number % 2]) for number in range(10)]


def taken(share: int, per_step: int = 4, steps: int = 10, seed: int = 0) -> list[tuple[int, str]]:
    drawn = [step_examples(EXAMPLES, step, per_step, share, seed) for step in range(1, steps + 1)]
    assert [len(batch) for batch in drawn] == [per_step] * steps
    return [(epoch, one.id) for batch in drawn for epoch, one in batch]


def test_an_epoch_has_every_example_once():
    for share in (1, 2, 5):
        assert Counter(taken(share)) == Counter((epoch, one.id) for epoch in range(4) for one in EXAMPLES)


def test_an_example_that_comes_twice_in_a_step_is_of_two_epochs():
    drawn = step_examples(EXAMPLES, 1, 25, 1, 0)
    assert len({(epoch, one.id) for epoch, one in drawn}) == 25
    assert len({one.id for _, one in drawn}) == 10


def test_blocks_share_their_media():
    videos = [EXAMPLES[int(one)].clips for _, one in taken(5, per_step=5)]
    assert all(len(set(videos[start : start + 5])) == 1 for start in range(0, len(videos), 5))


def test_epochs_and_seeds_differ_and_repeat():
    orders = [[one for _, one in taken(1)[start : start + 10]] for start in (0, 10, 20)]
    assert all(one != other for one, other in pairwise(orders))
    assert taken(1) == taken(1) != taken(1, seed=1)


def test_by_media():
    assert by_media(EXAMPLES) == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
