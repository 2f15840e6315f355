"""VILA (NVILA, LongVILA): SigLIP, a projector and Qwen2 out of NVlabs' folder of three, without its remote code.

Reference: NVILA (arXiv 2412.04468), LongVILA (arXiv 2408.10188), LongVILA-R1 (arXiv 2507.07966).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from longrl.models.folder import explained, quiet, read_model, read_tokenizer
from longrl.models.folder_files import read_texts
from longrl.models.qwen_processor import HALF
from longrl.models.text import Ranges, Text, tiny_text
from longrl.models.tiny import make_tokenizer
from longrl.models.trunk import ATTENTION
from longrl.models.vila_config import PARTS, VilaConfig, read_vila_config
from longrl.models.vila_projector import Projector, ProjectorConfig
from longrl.models.vila_vision import VilaVision
from longrl.types import Clip, Example, Frames, MediaEmbeds, MediaSize

CONFIG, PROCESSOR = "config.json", "vision_tower/preprocessor_config.json"
_TYPES = {"llm": "qwen2", "vision_tower": "siglip_vision_model", "mm_projector": "v2l_projector"}
_TOWER_PREFIX = "vision_model."
"""In front of a tower's names in every file; newer transformers has it no more in the module."""


class VilaModel(PreTrainedModel):
    """The three parts, under the names of their folders."""

    _supports_sdpa = True

    def __init__(self, llm: Qwen2ForCausalLM, vision_tower: SiglipVisionModel, mm_projector: Projector) -> None:
        super().__init__(llm.config)
        self.llm, self.vision_tower, self.mm_projector = llm, vision_tower, mm_projector
        self.generation_config = llm.generation_config

    def get_decoder(self) -> nn.Module:
        return self.llm.model

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head


class Vila(Text):
    """See models/family.py for the contract."""

    model_type = "vila"
    unread = (r"^(vision_model\.)?head\.",)
    """Of the tower: what pools, where its config.json leaves that out."""
    decoder_prefix = "llm."
    placeholders = {"image": "<image>", "video": "<vila/video>"}  # noqa: RUF012

    def __init__(self, model: VilaModel, tokenizer: PreTrainedTokenizerBase, files: dict[str, str]) -> None:
        """files: config.json, and the tower's preprocessor_config.json."""
        new = [token for token in self.placeholders.values() if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens(new, special_tokens=True)
        super().__init__(model, tokenizer, files)
        self.config: VilaConfig = read_vila_config(json.loads(files[CONFIG]))
        seen: Any = model.vision_tower.config
        mean, std = _colours(json.loads(files[PROCESSOR]), seen.image_size)
        self.vision = VilaVision(model.vision_tower, model.mm_projector, self.config, mean, std)

    def set_attention(self, model: Any) -> None:
        model.llm.set_attn_implementation(ATTENTION)
        model.vision_tower.set_attn_implementation("sdpa")

    # ---- folders

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Self:
        with explained(path):
            files = read_texts(path, (CONFIG, PROCESSOR))
            # what the parts say of themselves counts, as for NVlabs' code
            content = json.loads(files[CONFIG]) | {f"{part}_cfg": _read_part(path / part) for part in PARTS}
            files[CONFIG], config = json.dumps(content), read_vila_config(content)
            if PROCESSOR not in files:
                raise ValueError(f"it has no {PROCESSOR}; copy it again")
            llm, tower = (
                read_model(model_class, path / part, dtype, unread)
                for part, model_class, unread in (
                    ("llm", Qwen2ForCausalLM, ()),
                    ("vision_tower", SiglipVisionModel, cls.unread),
                )
            )
            about = ProjectorConfig(config.projector, config.copies * tower.config.hidden_size, llm.config.hidden_size)
            try:
                projector = read_model(Projector, path / "mm_projector", dtype, config=about)
            except ValueError as error:
                raise ValueError(
                    f"mm_projector: {error} (a {about.mm_projector_type} from {about.wide}, of its vision_tower, to "
                    f"{about.out}, of its llm: all three must be of one checkpoint)"
                ) from error
            tokenizer = _read_tokenizer(path, content.get("chat_template"))
            return cls(VilaModel(llm, tower, projector), tokenizer, files)

    @classmethod
    def make(cls, content: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype) -> Self:
        """Random weights; content: of a config.json, with the configurations of all parts."""
        config = read_vila_config(content)
        text, seen = Qwen2Config(**content["llm_cfg"]), SiglipVisionConfig(**content["vision_tower_cfg"])
        about = ProjectorConfig(config.projector, config.copies * seen.hidden_size, text.hidden_size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts = ((Qwen2ForCausalLM, text), (SiglipVisionModel, seen), (Projector, about))
            # not .to(dtype): that would round the rotary frequencies too, which loading keeps in fp32
            model = VilaModel(*(model_class._from_config(part, dtype=dtype) for model_class, part in parts))  # pyright: ignore
        size = {"height": seen.image_size, "width": seen.image_size}
        shown = {"image_processor_type": "SiglipImageProcessor", "size": size, "image_mean": HALF, "image_std": HALF}
        return cls(model, tokenizer, {CONFIG: json.dumps(content), PROCESSOR: json.dumps(shown, indent=2) + "\n"})

    @classmethod
    def tiny(cls, seed: int, dtype: torch.dtype) -> Self:
        tokenizer = tiny_tokenizer()
        return cls.make(tiny_content(tokenizer), tokenizer, seed, dtype)

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        given = self.model.state_dict() if weights is None else weights
        parts = {part: _of(given, f"{part}.") for part in PARTS}
        with quiet():
            self.model.llm.save_pretrained(path / "llm", state_dict=parts["llm"])
        # the chat template in tokenizer_config.json: the transformers that NVlabs' code asks for knows no file of it
        self.tokenizer.save_pretrained(path / "llm", save_jinja_files=False)
        tower = json.loads(self.model.vision_tower.config.to_json_string())
        seen = {_TOWER_PREFIX + name.removeprefix(_TOWER_PREFIX): x for name, x in parts["vision_tower"].items()}
        _write_part(path / "vision_tower", "SiglipVisionModel", tower, seen)
        about = {"model_type": _TYPES["mm_projector"], "mm_projector_type": self.config.projector}
        _write_part(path / "mm_projector", "MultimodalProjector", about, parts["mm_projector"])
        (path / PROCESSOR).write_text(self.files[PROCESSOR])
        _tell_rope(path / "llm" / CONFIG)
        about = self.model.mm_projector.config
        content = json.loads(self.files[CONFIG]) | {"model_dtype": str(self.model.dtype)}
        content |= {"hidden_size": about.out, "mm_hidden_size": about.wide}  # NVlabs' code builds the projector by them
        content |= {f"{part}_cfg": json.loads((path / part / CONFIG).read_text()) for part in PARTS}
        (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    def describe(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.model.llm.config.to_json_string(use_diff=False))
        content["architectures"] = [type(self.model.llm).__name__]
        (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        self.tokenizer.save_pretrained(path)

    @property
    def stop_ids(self) -> frozenset[int]:
        own = self.tokenizer.eos_token_id
        return super().stop_ids | ({own} if isinstance(own, int) else set())

    # ---- media

    @property
    def encoder_id(self) -> str:
        return self.vision.encoder_id

    def measure(self, clip: Clip) -> MediaSize:
        size = self.vision.measure(self._taken(clip))
        return replace(size, prompt_tokens=self._prompt_tokens(clip.kind, size.num_tokens))

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        return self.vision.encode(self._taken(clip), chunks)

    def encode_frames(self, chunks: Iterable[Frames], max_pixels: int | None = None) -> MediaEmbeds:
        return self.vision.encode_frames(chunks)

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        return self._prompt_tokens("video" if media.clip is None else media.clip.kind, len(media.embeds))

    def encoder_parameters(self, part: str) -> list[nn.Parameter]:
        return self.vision.parameters(part)

    def encode_backward(
        self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None = None
    ) -> None:
        self.vision.backward(media, span, grads)

    # ---- prompts

    def template(self, example: Example) -> list[dict[str, Any]]:
        """Media tokens stand in the text; each message is stripped, as NVlabs' is."""
        token = dict(self.placeholders)
        if self.config.tiling == "dynamic":  # a line for each tile: the last one ends here, the others in `expand`
            token["image"] += "\n"
        return [
            {
                "role": message.role,
                "content": "".join(token[x.kind] if isinstance(x, Clip) else x for x in message.content).strip(),
            }
            for message in example.messages
        ]

    def expand(self, media: MediaEmbeds, pad: int) -> tuple[list[int], Ranges]:
        """Each picture's embeddings between the texts of the configuration, a newline after them as a rule."""
        kind = self.pads[pad]
        # NVlabs' tokenizers know the tokens of media, their bodies have no rows for them: any that is there stands in
        stand_in = pad if pad < self.num_tokens else 0
        before, after = self._around(kind)
        each, line = self._each(kind, len(media.embeds)), self._line(kind)
        tokens: list[int] = []
        ranges: list[tuple[int, int]] = []
        for _ in range(len(media.embeds) // each):
            tokens += [*(line if tokens else ()), *before]
            ranges.append((len(tokens), len(tokens) + each))
            tokens += [stand_in] * each + after
        return tokens, tuple(ranges)

    def _prompt_tokens(self, kind: str, rows: int) -> int:
        pictures, (before, after) = rows // self._each(kind, rows), self._around(kind)
        return rows + pictures * (len(before) + len(after)) + (pictures - 1) * len(self._line(kind))

    def _each(self, kind: str, rows: int) -> int:
        """Embeddings between which there is no text."""
        if kind == "image" and self.config.tiling == "dynamic_s2":
            return rows
        return self.vision.tokens(kind)

    def _around(self, kind: str) -> tuple[list[int], list[int]]:
        before, after = (self.tokenizer.encode(x, add_special_tokens=False) for x in self.config.around[kind])
        return before, after

    def _line(self, kind: str) -> list[int]:
        tiled = kind == "image" and self.config.tiling == "dynamic"
        return self.tokenizer.encode("\n", add_special_tokens=False) if tiled else []


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """With the tokens that NVlabs' code adds where they are missing, and then makes embeddings for."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<vila/sentinel>", *Vila.placeholders.values()], special_tokens=True)
    return tokenizer


def tiny_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The twin's config.json: a frame is one embedding and a newline."""
    return {
        "model_type": "vila",
        "architectures": ["VILAForCausalLM"],
        "llm_cfg": {key: value for key, value in tiny_text(tokenizer).items() if key != "head_dim"},
        "vision_tower_cfg": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "mm_projector_cfg": {"model_type": _TYPES["mm_projector"], "mm_projector_type": "mlp_downsample_2x2_fix"},
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "resize",
        "num_video_frames": 512,
        "fps": 0,
    }


def _read_part(folder: Path) -> dict[str, Any]:
    """The content of its config.json.

    Raises:
        ValueError: it is not there, or of another kind.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"it has no {folder.name}/{CONFIG}; a VILA checkpoint is config.json with {', '.join(PARTS)}: copy it whole"
        ) from None
    if content.get("model_type") != _TYPES[folder.name]:
        found = f"its {folder.name} is of model_type {content.get('model_type')!r}"
        raise ValueError(f"{found}, expected {_TYPES[folder.name]!r}")
    return content


def _colours(shown: dict[str, Any], side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that pictures of so many rows get, from the content of a processor's file.

    Raises:
        ValueError: it is of another tower.
    """
    size = shown.get("size")
    if size is not None and set(size.values() if isinstance(size, dict) else [size]) != {side}:
        raise ValueError(
            f"size of {PROCESSOR} is {json.dumps(size)}, but its vision_tower takes {side} x {side} pixels; copy both "
            "again"
        )
    mean, std = (shown.get(f"image_{name}") or HALF for name in ("mean", "std"))
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(f"image_mean or image_std of {PROCESSOR} is {values!r:.80}; expected three numbers")
    return tuple(mean), tuple(std)


def _tell_rope(config: Path) -> None:
    """Says the rotary settings a second time, where transformers before 5 looks for them, as NVlabs' code needs it."""
    content = json.loads(config.read_text())
    rope = dict(content["rope_parameters"])
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_tokenizer(path: Path, template: str | None) -> PreTrainedTokenizerBase:
    """
    template: name of a file that replaces the tokenizer's own chat template, as config.json says.
    """
    tokenizer = read_tokenizer(path / "llm")
    if template is not None:
        file = path / f"{template}.jinja"
        if not file.is_file():
            raise ValueError(f"config.json names the chat template {template!r}, but there is no {file.name}; add it")
        # written with line breaks that are not meant, which is how NVlabs' code reads it
        tokenizer.chat_template = file.read_text().replace("    ", "").replace("\n", "")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer in llm has no chat template; add llm/chat_template.jinja")
    return tokenizer


def _of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _write_part(folder: Path, architecture: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.") if tensors else None
    content = about | {"architectures": [architecture], "dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
