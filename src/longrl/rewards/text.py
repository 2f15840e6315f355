"""Answers that are texts: how near they come to the true one, word by word."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from longrl.rewards.answer import final_answer
from longrl.types import Example, Rollout


def ocr_reward(example: Example, rollout: Rollout) -> float | None:
    """1 - word error rate, at least 0; None without a truth. Words are what spaces divide; case and marks count.

    Word error rate: words to insert, delete or replace, over words of the truth.

    Reference: Video-R1, arXiv 2503.21776 (OCR questions).
    """
    if example.answer is None:
        return None
    truth, said = read_words(example), _read(final_answer(rollout) or "")
    if len(said) >= 2 * len(truth):  # at least as many errors as the truth has words
        return 0.0
    return max(0.0, 1 - edits(said, truth) / len(truth))


def rouge_reward(example: Example, rollout: Rollout) -> float | None:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1; None without a truth. Case and punctuation do not count.

    Reference: Lin, ROUGE (2004); Video-R1, arXiv 2503.21776 (free-form questions). Differs: words are not stemmed; a
    truth of one word, which has no pairs, is scored by ROUGE-1 and ROUGE-L.
    """
    if example.answer is None:
        return None
    truth, said = plain_words(example), _words(final_answer(rollout) or "")
    scores = [rouge_n(said, truth, n) for n in (1, 2) if len(truth) >= n]
    scores.append(_f1(common(said, truth), len(said), len(truth)))
    return sum(scores) / len(scores)


def read_words(example: Example) -> list[str]:
    """The truth's words, as `ocr` compares them.

    Raises:
        ValueError: there are none.
    """
    return _some(_read(example.answer or ""), example)


def plain_words(example: Example) -> list[str]:
    """As `read_words`, for `rouge`."""
    return _some(_words(example.answer or ""), example)


def edits(said: Sequence[str], truth: Sequence[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that make one of the other."""
    row = list(range(len(truth) + 1))
    for i, word in enumerate(said, start=1):
        corner, row[0] = row[0], i
        for j, wanted in enumerate(truth, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != wanted))
    return row[-1]


def common(said: Sequence[str], truth: Sequence[str]) -> int:
    """Length of the longest common subsequence, a word of `said` at a time for all of `truth` at once.

    Reference: Hyyrö, Bit-parallel LCS-length computation revisited (2004). A zero bit of `row` is a step of the
    classical table's row.
    """
    where: dict[str, int] = {}
    for j, word in enumerate(truth):
        where[word] = where.get(word, 0) | 1 << j
    full = (1 << len(truth)) - 1
    row = full
    for word in said:
        hits = row & where.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(truth) - row.bit_count()


def rouge_n(said: Sequence[str], truth: Sequence[str], n: int) -> float:
    """F1 of the runs of n words that both have, each as often as in both."""
    ours, theirs = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (said, truth))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _f1(both: int, ours: int, theirs: int) -> float:
    return 2 * both / (ours + theirs) if both else 0.0


def _some(words: list[str], example: Example) -> list[str]:
    if not words:
        raise ValueError(f"example {example.id}: the truth holds no words, got {example.answer!r}")
    return words


def _read(text: str) -> list[str]:
    return unicodedata.normalize("NFKC", text).split()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
