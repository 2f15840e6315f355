"""The vision towers of Qwen's models: clips and images -> embeddings, a bounded number of patches at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longrl.models.clip_walk import See, clip_backward, encode_clip
from longrl.models.encoder_id import EncoderId, config_of
from longrl.models.qwen_processor import MEAN, STD, Sizing, even_chunks
from longrl.plan.work import BACKWARD_PATCHES
from longrl.types import Clip, Frames, MediaEmbeds, MediaError, MediaSize

if TYPE_CHECKING:
    from longrl.video.decode import Selection

PREPROCESSING = 3
"""Raise it when `patches` or what is encoded together changes: cached embeddings are then made again."""
CHUNK_PATCHES, CHUNK_GRIDS, CHUNK_BYTES = 2**14, 64, 64 * 2**20
"""The tower sees at most so many patches at a time, temporal patches, and bytes of pixels; one temporal patch at least.
The first two bound what it keeps, the last what is decoded."""


@dataclass(frozen=True, slots=True)
class Resize:
    """How the frames of one clip are resized."""

    kind: str
    frames: int
    """Of the whole clip."""
    max_pixels: int | None
    """Of a frame, a smaller limit than the model's own."""


class QwenVision:
    """A tower whose temporal patches (pairs of frames) attend to themselves alone, so that any division of a clip into
    whole ones gives the same embeddings."""

    def __init__(
        self,
        family: str,
        visual: Any,
        limits: dict[str, tuple[int, int]],
        *,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        shared_budget: bool = False,
    ) -> None:
        """
        Args:
            limits: kind of clip -> least and most pixels of a frame.
            shared_budget: of all frames of a video together, as in Qwen3-VL.
        """
        self.family, self.visual, self.limits = family, visual, limits
        self.mean, self.std, self.shared_budget = mean, std, shared_budget
        self._encoder_id = EncoderId(self._about, lambda: self.visual.state_dict(keep_vars=True))

    @property
    def config(self) -> Any:
        return self.visual.config

    @property
    def sizing(self) -> Sizing:
        config = self.config
        return Sizing(
            patch=config.patch_size,
            merge=config.spatial_merge_size,
            temporal=config.temporal_patch_size,
            limits=self.limits,
            shared_budget=self.shared_budget,
        )

    @property
    def encoder_id(self) -> str:
        return self._encoder_id()

    def _about(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "preprocessing": [PREPROCESSING, sorted(self.limits.items()), self.mean, self.std],
            "dtype": str(self.visual.dtype),
            "vision_config": config_of(self.config),
        }

    def measure(self, clip: Clip) -> MediaSize:
        """Of the rows alone; `prompt_tokens` is the family's to add to."""
        if clip.kind == "image":
            from longrl.video.image import image_size

            return self._measure(clip, 1, *image_size(clip.path))
        from longrl.video.decode import select_frames

        return self._measure_video(clip, select_frames(clip))

    def _measure_video(self, clip: Clip, selected: Selection) -> MediaSize:
        # shown upright, height and width may change places, which the number of patches does not depend on
        return self._measure(clip, len(selected.chosen), selected.index.height, selected.index.width)

    def _measure(self, clip: Clip, num_frames: int, shown_height: int, shown_width: int) -> MediaSize:
        config = self.config
        try:
            height, width = self.size(shown_height, shown_width, Resize(clip.kind, num_frames, clip.max_pixels))
        except ValueError as error:
            raise MediaError(f"{clip.path}: {error}") from error
        temporal = config.temporal_patch_size
        patches = height * width // config.patch_size**2
        grids = min(CHUNK_PATCHES // patches, CHUNK_GRIDS, CHUNK_BYTES // (temporal * 3 * shown_height * shown_width))
        tokens = self.sizing.grid_tokens(height, width)
        num_tokens = -(-num_frames // temporal) * tokens
        levels = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
        return MediaSize(
            num_frames=num_frames,
            num_tokens=num_tokens,
            prompt_tokens=num_tokens,
            num_bytes=num_tokens * levels * config.out_hidden_size * self.visual.dtype.itemsize + 8 * num_frames,
            chunk_frames=temporal * max(1, grids),
            chunk_tokens=tokens * max(1, grids),
        )

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        """See models/family.py."""
        measure = partial(self._measure_video, clip)
        return encode_clip(clip, chunks, measure, self.config.temporal_patch_size, self._see(clip))

    def _see(self, clip: Clip) -> See:
        return lambda frames, count: self.encode_frames([frames], Resize(clip.kind, count, clip.max_pixels))

    def encode_frames(self, chunks: Iterable[Frames], resize: Resize | None = None) -> MediaEmbeds:
        """Embeddings of frames already decoded, without key; with gradients if enabled.

        resize: None: as a video of these frames.
        """
        given = list(chunks)
        times = torch.cat([torch.from_numpy(frames.timestamps_s) for frames in given])
        resize = resize or Resize("video", len(times), None)
        embeds, levels, grid_t, grid_hw = [], [], 0, (0, 0)
        for pixels in even_chunks(given, self.config.temporal_patch_size):
            rows, grid = self.patches(pixels, resize)
            seen = self.visual(rows, grid_thw=torch.tensor([grid], device=rows.device))
            embeds.append(seen.pooler_output)
            if features := getattr(seen, "deepstack_features", None):
                levels.append(torch.stack(features))
            grid_t, grid_hw = grid_t + grid[0], grid[1:]
        return MediaEmbeds(
            embeds=torch.cat(embeds),
            grid_thw=(grid_t, *grid_hw),
            seconds_per_grid=1.0,
            timestamps_s=times,
            key="",
            deepstack=torch.cat(levels, 1) if levels else None,
        )

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        def is_projector(name: str) -> bool:
            return name.startswith(("merger.", "deepstack_merger_list."))

        return [p for name, p in self.visual.named_parameters() if is_projector(name) == (part == "projector")]

    def backward(self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None) -> None:
        """See Family.encode_backward."""
        assert media.clip, f"media {media.key} comes from no clip"
        _, h, w = media.grid_thw
        most, temporal = BACKWARD_PATCHES // (h * w), self.config.temporal_patch_size
        clip_backward(media, span, grads, deepstack_grads, temporal, most, self._see(media.clip))

    def patches(self, pixels: np.ndarray, resize: Resize | None = None) -> tuple[Tensor, tuple[int, int, int]]:
        """Frames as the vision tower reads them: resized, normalised, cut into patches in merge order.

        Args:
            pixels: uint8 [F, H, W, 3], F a multiple of the temporal patch.
            resize: None: as a video of these frames.

        Returns:
            [t * h * w, C * temporal_patch * patch * patch] and the grid (t, h, w).
        """
        config = self.config
        patch, merge, temporal = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        resize = resize or Resize("video", len(pixels), None)
        height, width = self.size(pixels.shape[1], pixels.shape[2], resize)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        x = (x.float() / 255 - mean) / std
        t, h, w = len(x) // temporal, height // patch, width // patch
        x = x.view(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return x.to(self.visual.device, self.visual.dtype), (t, h, w)

    def size(self, height: int, width: int, resize: Resize) -> tuple[int, int]:
        """Height and width that frames are resized to.

        Raises:
            ValueError: frames too narrow.
        """
        return self.sizing.frame(resize.kind, resize.frames, height, width, resize.max_pixels)
