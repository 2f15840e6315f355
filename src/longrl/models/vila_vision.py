"""VILA's eyes: clips and images -> embeddings, through SigLIP and the projector, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longrl.models import vila_tiles
from longrl.models.clip_walk import See, clip_backward, encode_clip
from longrl.models.encoder_id import EncoderId, config_of
from longrl.models.vila_config import VilaConfig
from longrl.plan.work import BACKWARD_PATCHES
from longrl.types import Clip, Frames, MediaEmbeds, MediaError, MediaSize

if TYPE_CHECKING:
    from longrl.video.decode import Selection

PREPROCESSING = 1
"""Raise it when what the tower is shown, or encoded together, changes: cached embeddings are then made again."""
CHUNK_PATCHES, CHUNK_FRAMES, CHUNK_BYTES = 2**14, 64, 64 * 2**20
"""The tower sees at most so many patches at a time, frames, and bytes of decoded pixels; what is pooled into one at
least. The first two bound what it keeps, the last what is decoded."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How an image is cut."""

    rows: int
    columns: int
    thumbnail: bool = False
    """A small picture of the whole comes after the tiles."""

    @property
    def pictures(self) -> int:
        return self.rows * self.columns + self.thumbnail


class VilaVision:
    """Each picture by itself, so that any division of a video into what is pooled gives the same embeddings."""

    def __init__(
        self, tower: Any, projector: Any, config: VilaConfig, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """
        Raises:
            ValueError: tower and config.json do not go together.
        """
        self.tower, self.projector, self.config, self.mean, self.std = tower, projector, config, mean, std
        self.body = getattr(tower, "vision_model", tower)  # transformers before 5.20 has one module more
        self.image_size: int = tower.config.image_size
        self.side: int = self.image_size // tower.config.patch_size
        layers, layer = tower.config.num_hidden_layers, config.select_layer
        if not -layers - 1 <= layer <= layers:
            raise ValueError(
                f"mm_vision_select_layer is {layer}, but its vision_tower has {layers} layers; expected "
                f"{-layers - 1} to {layers}"
            )
        self.layers = self.body.encoder.layers[: layer if layer >= 0 else layers + 1 + layer]
        if config.scales and config.scales[0] != self.image_size:
            raise ValueError(
                f"s2_scales begin with {config.scales[0]}, its vision_tower takes {self.image_size} pixels"
            )
        _, rows, columns = config.pool
        if self.rows % rows or self.rows % columns:
            raise ValueError(
                f"video_encoder pools {rows} x {columns} of {self.rows} x {self.rows} embeddings; expected divisors"
            )
        self._encoder_id = EncoderId(self._about, self._weights)

    @property
    def rows(self) -> int:
        """Of the embeddings of a picture, a square."""
        return -(-self.side // self.config.fold)

    def tokens(self, kind: str) -> int:
        """Embeddings of a picture; of a video, of what is pooled into one."""
        _, rows, columns = self.config.pool if kind == "video" else (1, 1, 1)
        return (self.rows // rows) * (self.rows // columns)

    @property
    def encoder_id(self) -> str:
        return self._encoder_id()

    def _about(self) -> dict[str, Any]:
        return {
            "family": "vila",
            "preprocessing": [PREPROCESSING, self.mean, self.std],
            "dtype": str(self.tower.dtype),
            "vila_config": dataclasses.asdict(self.config),
            "vision_config": config_of(self.tower.config),
        }

    def _weights(self) -> dict[str, Tensor]:
        parts = {"vision_tower": self.tower, "mm_projector": self.projector}
        return {f"{part}.{name}": x for part in parts for name, x in parts[part].state_dict(keep_vars=True).items()}

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """See models/family.py. Of the tower those that the features depend on."""
        if part == "projector":
            return list(self.projector.parameters())
        return [*self.body.embeddings.parameters(), *self.layers.parameters()]

    # ---- sizes

    def measure(self, clip: Clip) -> MediaSize:
        """Of the rows alone; `prompt_tokens` is the family's to add to."""
        self._require_pixels(clip)
        if clip.kind == "image":
            from longrl.video.image import image_size

            tokens = self._image_tokens(self.grid(*image_size(clip.path)))
            return self._size("image", 1, tokens, 1, tokens)
        from longrl.video.decode import select_frames

        return self._measure_video(select_frames(clip))

    def _measure_video(self, selected: Selection) -> MediaSize:
        frames, pooled = len(selected.chosen), self.config.pool[0]
        chunk = min(
            CHUNK_PATCHES // self.side**2,
            CHUNK_FRAMES,
            CHUNK_BYTES // (3 * selected.index.height * selected.index.width),
        )
        chunk, tokens = max(1, chunk // pooled), self.tokens("video")
        return self._size("video", frames, -(-frames // pooled) * tokens, chunk * pooled, chunk * tokens)

    def _size(self, kind: str, frames: int, tokens: int, chunk_frames: int, chunk_tokens: int) -> MediaSize:
        return MediaSize(
            num_frames=frames,
            num_tokens=tokens,
            prompt_tokens=tokens,
            num_bytes=tokens * self.projector.config.out * self.tower.dtype.itemsize + 8 * frames,
            chunk_frames=chunk_frames,
            chunk_tokens=chunk_tokens,
        )

    def _require_pixels(self, clip: Clip) -> None:
        if clip.max_pixels is not None and clip.max_pixels < self.image_size**2:
            raise MediaError(
                f"{clip.path}: max_pixels is {clip.max_pixels}, but the model's pictures all have {self.image_size} x "
                f"{self.image_size} pixels; leave max_pixels out"
            )

    def grid(self, height: int, width: int) -> Grid:
        """Of an image of so many pixels; with dynamic-S2, at the largest scale."""
        config = self.config
        if config.tiling == "resize":
            return Grid(1, 1)
        least = config.min_tiles if config.tiling == "dynamic" else (config.scales[-1] // config.scales[0]) ** 2
        rows, columns = vila_tiles.choose_grid(height, width, self.image_size, least, config.max_tiles)
        return Grid(rows, columns, thumbnail=config.tiling == "dynamic" and rows * columns > 1)

    def _image_tokens(self, grid: Grid) -> int:
        if self.config.tiling != "dynamic_s2":
            return grid.pictures * self.tokens("image")
        rows, columns = self._output_tiles(grid)
        return rows * columns * self.tokens("image")

    def _output_tiles(self, grid: Grid) -> tuple[int, int]:
        """Of dynamic-S2: rows and columns of tiles of the features' common size."""
        scales, output = self.config.scales, self.config.output_scale
        if output in (-1, len(scales) - 1):
            return grid.rows, grid.columns
        tiles = scales[output] // scales[0]
        return tiles, tiles

    # ---- encoding

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        """See models/family.py."""
        self._require_pixels(clip)
        return encode_clip(clip, chunks, self._measure_video, self.config.pool[0], self._see(clip))

    def _see(self, clip: Clip) -> See:
        is_image = clip.kind == "image"
        return lambda frames, _: self.encode_image(frames) if is_image else self.encode_frames([frames])

    def encode_frames(self, chunks: Iterable[Frames]) -> MediaEmbeds:
        """Embeddings of frames of a video already decoded, without key; with gradients if enabled.

        The last frames are pooled over as many as there are. Differs: NVlabs' code takes multiples only.
        """
        given = list(chunks)
        times = torch.cat([torch.from_numpy(frames.timestamps_s) for frames in given])
        pixels = [frame for frames in given for frame in frames.pixels]
        pooled, at_once = self.config.pool[0], max(1, min(CHUNK_PATCHES // self.side**2, CHUNK_FRAMES))
        at_once = max(1, at_once // pooled) * pooled
        embeds = []
        for first in range(0, len(pixels), at_once):
            shown = [vila_tiles.cut(frame, 1, 1, self.image_size) for frame in pixels[first : first + at_once]]
            embeds.append(self._pool(self.projector(self._copied(self.features(np.concatenate(shown))))))
        return MediaEmbeds(
            embeds=torch.cat(embeds).flatten(0, 1),
            grid_thw=(-(-len(pixels) // pooled), self.side, self.side),
            seconds_per_grid=float(pooled),
            timestamps_s=times,
            key="",
        )

    def encode_image(self, frames: Frames) -> MediaEmbeds:
        """The same of an image: its tiles one after the other, or with dynamic-S2 rows over all of it."""
        (image,), size = frames.pixels, self.image_size
        grid = self.grid(*image.shape[:2])
        if self.config.tiling == "dynamic_s2":
            embeds, (rows, columns) = self._see_scales(image, grid), self._output_tiles(grid)
        else:
            tiles = [vila_tiles.cut(image, grid.rows, grid.columns, size)]
            tiles += [vila_tiles.cut(image, 1, 1, size)] * grid.thumbnail
            seen = self.projector(self._copied(self.features(np.concatenate(tiles))))
            embeds, (rows, columns) = seen.flatten(0, 1), (grid.pictures, 1)
        return MediaEmbeds(
            embeds=embeds,
            grid_thw=(1, rows * self.side, columns * self.side),
            seconds_per_grid=1.0,
            timestamps_s=torch.from_numpy(frames.timestamps_s),
            key="",
        )

    def _see_scales(self, image: np.ndarray, grid: Grid) -> Tensor:
        """[tokens, D] of dynamic-S2: the image at every scale but the last fills a square, at the last the grid."""
        config, maps = self.config, []
        squares = [scale // config.scales[0] for scale in config.scales[:-1]]
        for rows, columns in [*((n, n) for n in squares), (grid.rows, grid.columns)]:
            tiles = vila_tiles.cut(image, rows, columns, self.image_size)
            maps.append(vila_tiles.join(self.features(tiles), rows, columns))
        stacked, output = vila_tiles.stack_scales(maps, config.output_scale), self._output_tiles(grid)
        projected = self.projector(vila_tiles.split(stacked, *output))
        return vila_tiles.join(projected, *output).flatten(0, 1)

    def features(self, pictures: np.ndarray) -> Tensor:
        """uint8 [N, size, size, 3] -> the tower's features [N, patches, width]."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        hidden = self.body.embeddings(pixels.to(self.tower.device, self.tower.dtype))
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden

    def _copied(self, features: Tensor) -> Tensor:
        """What has one scale stands for all of them."""
        return features.repeat(1, 1, self.config.copies)

    def _pool(self, embeds: Tensor) -> Tensor:
        """[frames, n, D] -> fewer frames, fewer embeddings each: means."""
        frames, rows, columns = self.config.pool
        if self.config.pool == (1, 1, 1):
            return embeds
        grid = embeds.unflatten(1, (self.rows // rows, rows, self.rows // columns, columns)).mean((2, 4)).flatten(1, 2)
        return torch.stack([some.mean(0) for some in grid.split(frames)])

    # ---- and back

    def backward(self, media: MediaEmbeds, span: slice, grads: Tensor) -> None:
        """See `encode_backward` of models/family.py."""
        assert media.clip, f"media {media.key} comes from no clip"
        pooled = self.config.pool[0]
        most = BACKWARD_PATCHES // self.side**2 // pooled
        clip_backward(media, span, grads, None, pooled, most, self._see(media.clip))
