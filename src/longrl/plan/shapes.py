"""The sizes of a model: from its config.json, or, before it is downloaded, from a table. Counts of its parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrl.models import base_path
from longrl.models.qwen_processor import DEFAULT_LIMITS, IMAGE_LIMITS, PROCESSOR_FILES, pixel_limits
from longrl.models.vila_config import PARTS, projector_widths, read_vila_config
from longrl.plan.towers import AudioShape, Qwen3VisionShape, SiglipShape, VisionShape
from longrl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of Qwen's kind, and its vision tower."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    """The head is the embedding."""
    qkv_bias: bool = True
    qk_norm: bool = False
    vision: VisionShape | None = None
    audio: AudioShape | None = None
    source: str | None = None
    """Where to download it from; None: it is here."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's products, by the names of their modules."""
        d, f = self.width, self.intermediate
        a, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (d, a),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (a, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer that are multiplied with every token."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.layer_matrices + biases + 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def root_parameters(self) -> int:
        """Of embedding, last norm and head."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def trunk_parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters

    @property
    def tower_parameters(self) -> int:
        """Of all that makes embeddings, projectors included."""
        return sum(tower.parameters(self.width) for tower in (self.vision, self.audio) if tower)

    @property
    def projector_parameters(self) -> int:
        seen = self.vision.merger_parameters(self.width) if self.vision else 0
        return seen + (self.audio.projector_parameters(self.width) if self.audio else 0)

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of adapters of this rank beside the named products of every layer."""
        return self.layers * rank * sum(sum(self.linears[name]) for name in targets)


def _qwen2_5_vl(
    size: str, vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, inside: int
) -> ModelShape:
    tower = VisionShape(
        depth=32,
        width=1280,
        intermediate=3456 if width > 4096 else 3420,
        min_pixels=3136,
        max_pixels=12845056,
        image_limits=(3136, 12845056),
    )
    return ModelShape(
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate=inside,
        tied=size == "3B",
        vision=tower,
        source=f"https://huggingface.co/Qwen/Qwen2.5-VL-{size}-Instruct",
    )


STAMP_TOKENS = len("<9999.9>") + 1 + 2
"""Of the time before a pair of frames, in which " seconds" is one token, and the marks around it, at most."""
_TINY = ModelShape(
    vocabulary=512,
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=384,
    tied=True,
)
_TINY_TOWER = VisionShape(
    depth=2, width=64, intermediate=128, min_pixels=784, max_pixels=784, image_limits=(784, 16 * 784)
)
_TINY_SHAPES = {
    "tiny:qwen2": _TINY,
    "tiny:qwen3": replace(_TINY, qkv_bias=False, qk_norm=True),
    "tiny:qwen2_5_vl": replace(_TINY, vision=_TINY_TOWER),
    "tiny:qwen3_vl": replace(
        _TINY,
        qkv_bias=False,
        qk_norm=True,
        vision=Qwen3VisionShape(
            depth=3,
            width=64,
            intermediate=128,
            patch=16,
            min_pixels=1024,
            max_pixels=1024,
            image_limits=(1024, 16 * 1024),
            shared_budget=True,
            levels=2,
            stamp_tokens=STAMP_TOKENS,
            places=64,
        ),
    ),
    "tiny:qwen2_5_omni": replace(
        _TINY,
        vocabulary=519,
        vision=_TINY_TOWER,
        audio=AudioShape(layers=2, width=64, intermediate=128, mel=128),
    ),
    "tiny:vila": replace(
        _TINY,
        vocabulary=515,
        vision=SiglipShape(
            depth=3,
            width=64,
            intermediate=128,
            temporal=1,
            min_pixels=784,
            max_pixels=784,
            side=2,
            frame_tokens=2,
            image_tokens=2,
            head=False,
            projector=(256, 128, 128),
        ),
    ),
}
SHAPES = _TINY_SHAPES | {
    f"Qwen/Qwen2.5-VL-{size}-Instruct": _qwen2_5_vl(size, *sizes)
    for size, sizes in {
        # vocabulary, width, layers, heads, KV heads, inside the MLP
        "3B": (151936, 2048, 36, 16, 2, 11008),
        "7B": (152064, 3584, 28, 28, 4, 18944),
        "32B": (152064, 5120, 64, 40, 8, 27648),
        "72B": (152064, 8192, 80, 64, 8, 29568),
    }.items()
}
"""Models whose folder need not be there to be planned, as their public config.json says; tested: the tiny ones against
their twins, the others by their published numbers of parameters."""


def known_source(path: str) -> str | None:
    """Where to download the model that `model.path` means, if it is not there and the table has it."""
    shape = None if (Path(path) / "config.json").exists() else shape_of(path)
    return shape and shape.source


def shape_of(path: str) -> ModelShape | None:
    """The sizes of the model at `model.path`: of the folder, or of one in the table whose name the path ends with.

    Returns:
        None where there is neither.

    Raises:
        ValueError: config.json is not one of a decoder of this kind, or the folder's adapters name no model.
    """
    path = base_path(path)
    folder = Path(path)
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except OSError:
        names = {path.partition("@")[0] if path.startswith("tiny:") else path, folder.name}
        known = (shape for name, shape in SHAPES.items() if names & {name, name.rpartition("/")[2]})
        return next(known, None)
    try:
        config = json.loads(text)
        if "llm_cfg" in config:
            return vila_shape(config, *(json.loads((folder / part / "config.json").read_text()) for part in PARTS))
        files = {name: (folder / name).read_text() for name in PROCESSOR_FILES if (folder / name).is_file()}
        return read_shape(config, pixel_limits(files), pixel_limits(files, "image"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"model.path {path}: config.json does not say the sizes of a decoder ({type(error).__name__}: {error})"
        ) from error


def require_clips(shape: ModelShape, path: str, examples: Sequence[Example]) -> None:
    """Looks whether the model of this path can see what rows hold.

    Raises:
        ValueError: it reads text alone, does not hear, or sees no pictures that are as small as a row asks for.
    """
    if shape.vision is None:
        if seen := next((one for one in examples if one.clips), None):
            kind = seen.clips[0].kind
            raise ValueError(f"example {seen.id} has a clip of kind {kind}, but {path} reads text alone")
        return
    heard = (one for one in examples if any(clip.kind == "audio" for clip in one.clips))
    if shape.audio is None and (hears := next(heard, None)):
        raise ValueError(
            f"example {hears.id} has a clip of kind audio, but {path} does not hear; leave out sound (video.with_audio)"
        )
    asked = {clip.max_pixels: one.id for one in examples for clip in one.clips if clip.kind != "audio"}
    for max_pixels, example_id in asked.items():
        try:
            shape.vision.require_pixels(max_pixels)
        except ValueError as error:
            raise ValueError(f"example {example_id}: {error}") from error


def read_shape(
    config: dict[str, Any],
    limits: tuple[int, int] = DEFAULT_LIMITS,
    image_limits: tuple[int, int] = IMAGE_LIMITS,
) -> ModelShape:
    """From the content of a config.json; limits: least and most pixels of a frame, and of an image."""
    config = config.get("thinker_config", config)
    text, vision, audio = (config.get(f"{part}_config") for part in ("text", "vision", "audio"))
    text = config if text is None else text
    heads, kind = text["num_attention_heads"], config["model_type"]
    tower = None
    if vision is not None:
        sizes: dict[str, Any] = {
            # what is not there is transformers' default
            "depth": vision.get("depth", 27 if kind == "qwen3_vl" else 32),
            "width": vision["hidden_size"],
            "intermediate": vision.get("intermediate_size", 4304 if kind == "qwen3_vl" else 3420),
            "patch": vision.get("patch_size", 16 if kind == "qwen3_vl" else 14),
            "merge": vision.get("spatial_merge_size", 2),
            "temporal": vision.get("temporal_patch_size", 2),
            "min_pixels": limits[0],
            "max_pixels": limits[1],
            "image_limits": image_limits,
        }
        tower = _qwen3_tower(vision, sizes) if kind == "qwen3_vl" else VisionShape(**sizes)
    return ModelShape(
        vocabulary=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        qkv_bias=not kind.startswith("qwen3"),
        qk_norm=kind.startswith("qwen3"),
        vision=tower,
        audio=None
        if audio is None
        else AudioShape(
            layers=audio.get("encoder_layers", 32),
            width=audio.get("d_model", 1280),
            intermediate=audio.get("encoder_ffn_dim", 5120),
            mel=audio.get("num_mel_bins", 128),
        ),
    )


def _qwen3_tower(vision: dict[str, Any], sizes: dict[str, Any]) -> Qwen3VisionShape:
    return Qwen3VisionShape(
        **sizes,
        shared_budget=True,
        levels=len(vision.get("deepstack_visual_indexes", (8, 16, 24))),
        stamp_tokens=STAMP_TOKENS,
        places=vision.get("num_position_embeddings", 2304),
    )


_SIGLIP = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
    "vision_use_head": True,
}
"""transformers' defaults: what is not there is one of them."""


def vila_shape(
    content: dict[str, Any], llm: dict[str, Any], vision_tower: dict[str, Any], mm_projector: dict[str, Any]
) -> ModelShape:
    """From the content of config.json and those of the parts."""
    config, text = read_vila_config(content | {"mm_projector_cfg": mm_projector}), read_shape(llm)
    said = _SIGLIP | vision_tower
    width, patch, size = said["hidden_size"], said["patch_size"], said["image_size"]
    frames, rows, columns = config.pool
    side = size // patch
    each = -(-side // config.fold)
    around = {kind: sum(bool(text) for text in texts) for kind, texts in config.around.items()}
    tiles = {"resize": 1, "dynamic": config.max_tiles + 1, "dynamic_s2": config.max_tiles}[config.tiling]
    vision = SiglipShape(
        depth=said["num_hidden_layers"],
        width=width,
        intermediate=said["intermediate_size"],
        patch=patch,
        merge=config.fold,
        temporal=frames,
        min_pixels=size**2,
        max_pixels=size**2,
        side=side,
        frame_tokens=(each // rows) * (each // columns) + around["video"],
        image_tokens=tiles * (each**2 + around["image"] + (config.tiling == "dynamic")),
        head=said["vision_use_head"],
        projector=projector_widths(config.projector, config.copies * width, text.width),
    )
    return replace(text, vision=vision)
