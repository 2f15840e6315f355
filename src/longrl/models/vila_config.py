"""What a VILA checkpoint's config.json says about how images and videos are looked at, and about its projector.

Importing this module does not import torch: `longrl check` plans with it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

PARTS = ("llm", "vision_tower", "mm_projector")
"""Sub-folders of a checkpoint; config.json has the configuration of each as `<part>_cfg`."""
TILINGS = ("resize", "dynamic", "dynamic_s2")
FOLDS = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}
"""Kind of projector -> side of the square of patches that becomes one embedding; of all others it is 1."""
KINDS = ("identity", "linear", "mlp<N>x_gelu", *FOLDS)
_REFUSED = {
    "s2": "fixed S2 scales",
    "ps3": "PS3 vision towers",
    "mm_use_im_start_end": "start and end tokens around images",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VilaConfig:
    """Defaults are NVlabs'."""

    projector: str
    """Its kind."""
    tiling: Literal["resize", "dynamic", "dynamic_s2"]
    """Of images: one picture; tiles and a small picture of the whole, each like an image; or tiles at several scales,
    whose features lie one over the other. Frames of videos are one picture always."""
    select_layer: int
    """Which of the tower's hidden states are its features: 0 are its embeddings, -1 is what its last layer makes."""
    scales: tuple[int, ...]
    """Sides in pixels, ascending, the first the tower's own; () without S2."""
    output_scale: int
    """Index of the scale whose features' size all get."""
    min_tiles: int
    max_tiles: int
    around: dict[str, tuple[str, str]]
    """Kind of clip -> the text before and after the embeddings of each picture."""
    pool: tuple[int, int, int]
    """Frames, rows and columns of embeddings that become one, their mean (TSP)."""

    @property
    def fold(self) -> int:
        return fold_of(self.projector)

    @property
    def copies(self) -> int:
        """How many times as wide as the tower the projector's input is."""
        return max(1, len(self.scales))


def read_vila_config(content: dict[str, Any]) -> VilaConfig:
    """From the content of a config.json.

    Raises:
        ValueError: it asks for what is not known here.
    """
    for key, what in _REFUSED.items():
        if content.get(key):
            raise ValueError(f"{key} is {content[key]!r}: {what} are not supported")
    if _whole(content, "video_max_tiles", 1) > 1:
        raise ValueError(f"video_max_tiles is {content['video_max_tiles']}: frames in tiles are not supported")
    if (feature := content.get("mm_vision_select_feature") or "cls_patch") != "cls_patch":
        raise ValueError(
            f"mm_vision_select_feature is {feature!r}, which drops a patch of a tower without class token; "
            "expected cls_patch"
        )
    tiling = content.get("image_aspect_ratio") or "resize"
    if tiling not in TILINGS:
        raise ValueError(f"image_aspect_ratio is {tiling!r}; known: {', '.join(TILINGS)}")
    s2 = bool(content.get("dynamic_s2"))
    if s2 != (tiling == "dynamic_s2") and "dynamic" in tiling:
        raise ValueError(f"image_aspect_ratio is {tiling!r}, but dynamic_s2 is {s2}; they must agree")
    scales = _scales(content) if s2 else ()
    least, most = _tiles(content, scales)
    return VilaConfig(
        projector=_projector(content),
        tiling=cast(Any, tiling),
        select_layer=_whole(content, "mm_vision_select_layer", -2),
        scales=scales,
        output_scale=_output_scale(content, scales),
        min_tiles=least,
        max_tiles=most,
        around={kind: _around(content, f"{kind}_encoder") for kind in ("image", "video")},
        pool=_pool(content),
    )


def fold_of(kind: str) -> int:
    """
    Raises:
        ValueError: there is no such projector.
    """
    if kind not in FOLDS and kind not in ("identity", "linear") and not _depth(kind):
        raise ValueError(f"mm_projector_type {kind!r} is not known; known: {', '.join(KINDS)}")
    return FOLDS.get(kind, 1)


def projector_widths(kind: str, wide: int, out: int) -> tuple[int, ...]:
    """What its products take and give, one after the other.

    Args:
        wide: of a patch's features.
        out: of an embedding.
    """
    if kind not in FOLDS:
        return wide, *(out for _ in range(1 if kind == "linear" else _depth(kind)))
    between = {
        "mlp_downsample_3x3_fix": (3 * wide,),
        "mlp_downsample_3x3_s2": (3 * wide, wide, wide // 3),
        "mlp_downsample_3x3_s2_new": (4 * wide, 2 * wide, wide, wide // 3),
    }.get(kind, ())
    return FOLDS[kind] ** 2 * wide, *between, out, out


def _depth(kind: str) -> int:
    """N of mlpNx_gelu; 0 of another kind."""
    found = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    return int(found[1]) if found else 0


def _projector(content: dict[str, Any]) -> str:
    part = content.get("mm_projector_cfg")
    kind = part.get("mm_projector_type") if isinstance(part, dict) else part
    if not isinstance(kind, str):
        raise ValueError(f"mm_projector_cfg has no mm_projector_type: {json.dumps(part)}; copy config.json again")
    fold_of(kind)
    return kind


def _whole(content: dict[str, Any], key: str, usual: int, least: int | None = None) -> int:
    value = content.get(key)
    if value is None:
        return usual
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        more = "" if least is None else f", {least} or more"
        raise ValueError(f"{key} of config.json is {value!r}, expected a whole number{more}")
    return value


def _tiles(content: dict[str, Any], scales: tuple[int, ...]) -> tuple[int, int]:
    """The least and the most tiles of an image."""
    least, most = _whole(content, "min_tiles", 1, 1), _whole(content, "max_tiles", 12, 1)
    if least > most:
        raise ValueError(f"min_tiles of config.json is {least}, max_tiles {most}; expected no more than that")
    if scales and (needed := (scales[-1] // scales[0]) ** 2) > most:
        raise ValueError(f"max_tiles of config.json is {most}, but s2_scales ask for {needed} tiles; expected as many")
    return least, most


def _output_scale(content: dict[str, Any], scales: tuple[int, ...]) -> int:
    index, count = _whole(content, "s2_resize_output_to_scale_idx", 0), len(scales)
    if scales and not -count <= index < count:
        raise ValueError(f"s2_resize_output_to_scale_idx of config.json is {index}, but there are {count} s2_scales")
    return index


def _scales(content: dict[str, Any]) -> tuple[int, ...]:
    said = content.get("s2_scales")
    try:
        scales = tuple(sorted(int(part) for part in (said.split(",") if isinstance(said, str) else said or ())))
    except (TypeError, ValueError):
        scales = ()
    if not scales or scales[0] < 1 or any(scale % scales[0] for scale in scales):
        raise ValueError(f"s2_scales of config.json is {said!r}; expected multiples of the first, as in 448,896,1344")
    return scales


def _encoder(content: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of what puts the embeddings of pictures together."""
    said = content.get(key) or {}
    try:
        about = json.loads(said) if isinstance(said, str) else said
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{key} of config.json is {said!r:.80}; expected an object with _target_, or the text of one")
    about = dict(about)
    usual = "BasicImageEncoder" if key == "image_encoder" else "BasicVideoEncoder"
    name = str(about.pop("_target_", usual)).rpartition(".")[2]
    if name not in {usual, *(("TSPVideoEncoder",) * (key == "video_encoder"))}:
        raise ValueError(f"{key} is {name}; known: {usual}" + ", TSPVideoEncoder" * (key == "video_encoder"))
    return name, about


def _around(content: dict[str, Any], key: str) -> tuple[str, str]:
    _, about = _encoder(content, key)
    texts = about.get("start_tokens") or "", about.get("end_tokens", "\n") or ""
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} of config.json puts {texts!r:.80} around pictures; expected texts")
    return texts


def _pool(content: dict[str, Any]) -> tuple[int, int, int]:
    name, about = _encoder(content, "video_encoder")
    if name != "TSPVideoEncoder":
        return 1, 1, 1
    match sizes := about.get("pool_sizes"):
        case [[int(frames), int(rows), int(columns)]] if min(sizes[0]) >= 1 and not about.get("sep_tokens"):
            return frames, rows, columns
    raise ValueError(
        f"video_encoder pools by {json.dumps(sizes)}; expected one size of frames, rows and columns, each 1 or more, "
        "as in [[8, 1, 1]], and no sep_tokens"
    )
