"""Which numbers of processes fit together, and who takes what. Imports no torch: `longrl check` asks too."""

from __future__ import annotations

from collections.abc import Sequence


def require_heads(kv_heads: int, size: int) -> None:
    """Called at start-up, before anything is computed. Any number of query heads will do.

    Raises:
        ValueError: the KV heads cannot be dealt to a group of `size` ranks.
    """
    more, fewer = max(kv_heads, size), min(kv_heads, size)
    if more % fewer:
        raise ValueError(
            f"{kv_heads} KV heads cannot be dealt to {size} sequence-parallel ranks: one must be a multiple of the "
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
            f"parallel.sp is {sp}, but there {'is' if size == 1 else 'are'} {processes}: {size} = {size // sp} x {sp} "
            f"+ {size % sp}; start a multiple of {sp} (torchrun --nproc-per-node {sp}) or choose another parallel.sp"
        )


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
