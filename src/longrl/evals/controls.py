"""Controls: the same questions with something taken away. A number beside its control shows where it comes from.

Importing this module does not import torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from longrl.runtime import seed_for
from longrl.types import Clip, Example, MediaEmbeds

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_MARK = "shuffled"
"""In the keys of media that are."""


def without_video(example: Example, media: tuple[MediaEmbeds, ...]) -> tuple[Example, tuple[MediaEmbeds, ...]]:
    """The question alone."""
    messages = tuple(
        replace(message, content=tuple(part for part in message.content if not isinstance(part, Clip)))
        for message in example.messages
    )
    return replace(example, messages=messages), ()


def shuffled_in_time(example: Example, media: tuple[MediaEmbeds, ...]) -> tuple[Example, tuple[MediaEmbeds, ...]]:
    """Each video's temporal patches (pairs of frames) in an order drawn from its key; positions and sound stay."""
    return example, tuple(shuffled(item) for item in media)


CONTROLS = {"without_media": without_video, "shuffled": shuffled_in_time}
"""The names of EvalRunConfig.control."""


def require_control(name: str, examples: Sequence[Example]) -> None:
    """
    Raises:
        ValueError: the control would change none of them.
    """
    kinds = ("video",) if name == "shuffled" else ("video", "image", "audio")
    changed = sum(any(clip.kind in kinds for clip in example.clips) for example in examples)
    if not changed:
        raise ValueError(
            f"control is {name}, but none of {len(examples)} questions has a clip of kind {', '.join(kinds)}, so it "
            "would say what the evaluation says; leave it out"
        )
    logger.info("control %s: of %d of %d questions", name, changed, len(examples))


def shuffled(media: MediaEmbeds, *names: int | str) -> MediaEmbeds:
    """A video's temporal patches in an order drawn from its key and these names, which its new key tells too.

    Sound, and what has one patch, as it is.
    """
    import torch

    if media.grid_thw[0] == 1 or (media.clip and media.clip.kind == "audio"):
        return media
    grids = media.grid_thw[0]
    order = torch.randperm(grids, generator=torch.Generator().manual_seed(seed_for("shuffle", media.key, *names)))

    def permuted(x: Tensor, dim: int) -> Tensor:
        return x.unflatten(dim, (grids, -1)).index_select(dim, order).flatten(dim, dim + 1)

    deepstack = None if media.deepstack is None else permuted(media.deepstack, 1)
    key = ":".join(map(str, (media.key, _MARK, *names)))
    return replace(media, embeds=permuted(media.embeds, 0), deepstack=deepstack, key=key)


def shuffled_by_key(key: str, read: Callable[[str], MediaEmbeds | None]) -> MediaEmbeds | None:
    """What has such a key: as `read` gives it, or shuffled, by numbers alone; None: `read` gives nothing."""
    plain, *names = key.split(":")
    media = read(plain)
    return media if media is None or not names else shuffled(media, *map(int, names[1:]))
