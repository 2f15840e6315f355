"""VILA's projectors: from the vision tower's patches to embeddings of the language model, by the names NVlabs gave.

Reference: NVILA (arXiv 2412.04468), section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longrl.models.vila_config import fold_of, projector_widths
from longrl.models.vila_tiles import side_of


class ProjectorConfig(PreTrainedConfig):
    model_type = "v2l_projector"

    def __init__(self, mm_projector_type: str = "linear", wide: int = 1, out: int = 1, **kwargs: Any) -> None:
        """
        Args:
            wide: of the tower's features.
            out: of the language model's embeddings.
        """
        super().__init__(**kwargs)
        self.mm_projector_type, self.wide, self.out = mm_projector_type, wide, out


class Projector(PreTrainedModel):
    """Features [N, patches, wide] -> embeddings [N, tokens, out]; patches and tokens are the rows of a square."""

    config_class = ProjectorConfig

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        self.layers = _layers(config.mm_projector_type, config.wide, config.out)
        self.post_init()

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class Fold(nn.Module):
    """Squares of patches become channels: [N, side^2, c] -> [N, ceil(side / fold)^2, fold^2 c], missing ones zero."""

    def __init__(self, fold: int) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, x: Tensor) -> Tensor:
        side = side_of(x.shape[1])
        rest = -side % self.fold
        x = nn.functional.pad(x.unflatten(1, (side, side)), (0, 0, 0, rest, 0, rest))
        x = x.unflatten(2, (-1, self.fold)).unflatten(1, (-1, self.fold))  # row, in it, column, in it
        return x.transpose(2, 3).flatten(3).flatten(1, 2)


def _layers(kind: str, wide: int, out: int) -> nn.Module:
    """Parameters have the names that NVlabs' checkpoints give them: those of a Sequential's places.

    Raises:
        ValueError: an identity between different widths.
    """
    fold, widths = fold_of(kind), projector_widths(kind, wide, out)
    if kind == "identity":
        if wide != out:
            raise ValueError(f"identity makes no {out} numbers of {wide}; name the mm_projector_type that was trained")
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(wide, out)
    if fold == 1:
        return nn.Sequential(*_joined([nn.Linear(*both)] for both in pairwise(widths)))
    # a norm before each product but the last
    *normed, last = pairwise(widths)
    steps = [*([nn.LayerNorm(before), nn.Linear(before, after)] for before, after in normed), [nn.Linear(*last)]]
    return nn.Sequential(Fold(fold), *_joined(steps))


def _joined(steps: Iterable[list[nn.Module]]) -> list[nn.Module]:
    """The modules of all steps, a GELU between one step and the next."""
    modules: list[nn.Module] = []
    for step in steps:
        modules += [nn.GELU(), *step] if modules else step
    return modules
