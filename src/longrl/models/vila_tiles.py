"""Images cut into square tiles of the vision tower's size, and tiles' features put together again (dynamic-S2).

Reference: NVILA (arXiv 2412.04468), section 2.1; the choice of rows and columns is InternVL's (arXiv 2404.16821).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def choose_grid(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles, least to most of them, whose aspect is nearest to the image's.

    Of several as near, more tiles are taken while the image has more than half of their pixels.

    Args:
        side: of a tile, in pixels.
    """
    sizes = range(1, most + 1)
    grids = [(rows, columns) for columns in sizes for rows in sizes if least <= rows * columns <= most]
    best, off = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < off or (difference == off and height * width > 0.5 * side**2 * rows * columns):
            best, off = (rows, columns), difference
    return best


def cut(image: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """Tiles of an image resized (bicubic) to fill them, row by row.

    PIL's resize, because NVlabs' models are trained on it; torch's differs by up to two of 255 levels.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [rows * columns, side, side, 3]
    """
    fitted = Image.fromarray(image).resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    tiles = np.array(fitted).reshape(rows, side, columns, side, 3)
    return tiles.swapaxes(1, 2).reshape(-1, side, side, 3)


def join(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, n, c], of which each is the rows of a square -> [rows * s, columns * s, c]."""
    side = side_of(tiles.shape[1])
    grid = tiles.unflatten(1, (side, side)).unflatten(0, (rows, columns))
    return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def side_of(patches: int) -> int:
    """Of the square whose rows they are."""
    side = math.isqrt(patches)
    assert side * side == patches, f"{patches} patches are no square"
    return side


def split(whole: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `join`."""
    grid = whole.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
    return grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def stack_scales(maps: Sequence[Tensor], output: int) -> Tensor:
    """Maps [h, w, c] of one image at several scales -> [H, W, sum of c], the size that of maps[output].

    Averaged where there is more, repeated where there is less, in fp32 or wider.
    """
    size = maps[output].shape[:2]

    def fitted(one: Tensor) -> Tensor:
        wide = one.permute(2, 0, 1)[None].to(torch.promote_types(one.dtype, torch.float32))
        return nn.functional.interpolate(wide, size, mode="area")[0].permute(1, 2, 0).to(one.dtype)

    return torch.cat([fitted(one) for one in maps], -1)
