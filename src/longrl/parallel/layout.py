"""Which numbers of processes fit together, and who takes what. Imports no torch: `longrl check` asks too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

JOIN_S = 600.0
"""What starts the processes starts them all within so long, or some will never come."""


def require_heads(kv_heads: int, sp: int, ring: int = 1) -> None:
    """Called at start-up, before anything is computed. Any number of query heads will do.

    Args:
        ring: a divisor of sp; the ranks of a ring have the same heads.

    Raises:
        ValueError: the KV heads cannot be dealt to sp / ring ranks.
    """
    size = sp // ring
    more, fewer = max(kv_heads, size), min(kv_heads, size)
    if more % fewer:
        of = f" ({sp} in rings of {ring})" if ring > 1 else ""
        raise ValueError(
            f"{kv_heads} KV heads cannot be dealt to {size} sequence-parallel ranks{of}: one must be a multiple of the "
            f"other, but {more} = {more // fewer} x {fewer} + {more % fewer}; choose another number of ranks"
        )


def require_world(size: int, sp: int) -> None:
    """
    Raises:
        ValueError: `size` processes cannot be put in groups of `sp`.
    """
    if size % sp:
        processes = "1 process" if size == 1 else f"{size} processes"
        raise ValueError(
            f"parallel.sp is {sp}, but there {'is' if size == 1 else 'are'} {processes}, expected a multiple "
            f"of {sp}; start so many (torchrun --nproc-per-node {sp}) or choose another parallel.sp"
        )


def split(total: int, parts: int) -> list[int]:
    """Tokens of each part: equal but for one."""
    borders = [total * i // parts for i in range(parts + 1)]
    return [end - start for start, end in pairwise(borders)]


def zigzag(lengths: Sequence[int]) -> list[tuple[slice, slice]]:
    """Deals a causal sequence to the ranks of a ring: each takes a piece from the front and one from the back, so that
    all attend to about as much.

    Args:
        lengths: tokens of each rank.

    Returns:
        Each rank's two spans, the first of lengths // 2 tokens; one may be empty.
    """
    spans, front, back = [], 0, sum(lengths)
    for length in lengths:
        half = length // 2
        spans.append((slice(front, front + half), slice(back - length + half, back)))
        front, back = front + half, back - length + half
    return spans


def balanced(weights: Sequence[int], parts: int) -> list[list[int]]:
    """Deals items to parts whose weights come out about equal: the heaviest first, each to the lightest part so far.

    Returns:
        The indices of each part's items, ascending; a part is empty where there are fewer items than parts.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = totals.index(min(totals))
        dealt[lightest].append(index)
        totals[lightest] += weights[index]
    return [sorted(part) for part in dealt]
