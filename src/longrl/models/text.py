"""Qwen2.5 and Qwen3, text only; and what all families of a chat template and one decoder have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longrl.models.folder import explained, quiet, read_model, read_tokenizer
from longrl.models.folder_files import read_texts
from longrl.models.tiny import make_tokenizer
from longrl.models.trunk import ATTENTION, TrunkParts
from longrl.types import Clip, Example, Frames, MediaEmbeds, MediaSize, Prompt

Ranges = tuple[tuple[int, int], ...]


class Text:
    """A decoder and its chat template; see models/family.py for the contract. Families with media build on it."""

    model_type: ClassVar[str]
    model_class: ClassVar[Any]
    config_class: ClassVar[Any]
    extra_files: ClassVar[tuple[str, ...]] = ()
    """Names of files that a checkpoint has besides model and tokenizer, kept as they are."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Patterns of weights that its published checkpoints have and it has no place for."""
    decoder_prefix: ClassVar[str] = ""
    placeholders: Mapping[str, str] = {}
    """Kind of clip -> the token that stands for its embeddings; the kinds that the family takes."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, files: dict[str, str]) -> None:
        """files: name -> text of the extra files of this checkpoint; `save` writes them again."""
        text: Any = model.config.get_text_config()
        if getattr(text, "use_sliding_window", False) or text.attention_dropout:
            raise ValueError(
                "sliding-window attention and attention dropout are not supported; set both off in config.json"
            )
        self.model, self.tokenizer, self.files = model, tokenizer, files
        if not self.stop_ids:
            raise ValueError(
                "no eos_token_id in generation_config.json, config.json or the tokenizer says which token ends a "
                "response; add it to generation_config.json"
            )
        self.set_attention(model)
        model.eval()

    def set_attention(self, model: Any) -> None:
        model.set_attn_implementation(ATTENTION)

    @cached_property
    def pads(self) -> dict[int, str]:
        """Placeholder token -> the kind of clip it stands for."""
        return {self.token_id(token): kind for kind, token in self.placeholders.items()}

    def token_id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

    @property
    def num_tokens(self) -> int:
        """That the model has embeddings of; its tokenizer may know more."""
        return self.model.get_input_embeddings().num_embeddings

    def require_known(self, token_ids: Iterable[int], whose: str) -> None:
        known = self.num_tokens
        unknown = next((token for token in token_ids if token >= known), None)
        if unknown is not None:
            raise ValueError(
                f"{whose} has the token {self.tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}), for which the "
                f"model has none of its {known} embeddings; leave it out"
            )

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Self:
        with explained(path):
            nested = {"text_config", "vision_config"} & json.loads((path / "config.json").read_text()).keys()
            if nested - set(cls.config_class.sub_configs):
                raise ValueError(
                    f"its config.json is one of a model of several parts ({', '.join(sorted(nested))}), which a "
                    f"{cls.model_type} has not; give it the model_type that it was published with"
                )
            model = read_model(cls.model_class, path, dtype, cls.unread)
            tokenizer = read_tokenizer(path)
            if not tokenizer.chat_template:
                raise ValueError("its tokenizer has no chat template; add chat_template.jinja")
            return cls(model, tokenizer, read_texts(path, cls.extra_files))

    @classmethod
    def tiny(cls, seed: int, dtype: torch.dtype) -> Self:
        tokenizer = cls.tiny_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # not .to(dtype): that would round the rotary frequencies too, which loading keeps in fp32
            model = cls.model_class._from_config(cls.tiny_config(tokenizer), dtype=dtype)
        return cls(model, tokenizer, cls.tiny_files(model.config))

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase:
        return make_tokenizer()

    @classmethod
    def tiny_config(cls, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        return cls.config_class(**tiny_text(tokenizer))

    @classmethod
    def tiny_files(cls, config: Any) -> dict[str, str]:
        return {}

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        with quiet():
            self.model.save_pretrained(path, state_dict=weights, max_shard_size="2GB")
        self.tokenizer.save_pretrained(path)
        for name, text in self.files.items():
            (path / name).write_text(text)

    def describe(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.model.config.to_json_string(use_diff=False))
        content["architectures"] = [type(self.model).__name__]
        (path / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        self.tokenizer.save_pretrained(path)
        for name, text in self.files.items():
            (path / name).write_text(text)

    @property
    def stop_ids(self) -> frozenset[int]:
        """As the first of the checkpoint's files says that says something."""
        config = self.model.config
        said = (self.model.generation_config, config, config.get_text_config(), self.tokenizer)
        eos = next((ids for one in said if (ids := getattr(one, "eos_token_id", None)) not in (None, [])), [])
        return frozenset([eos] if isinstance(eos, int) else eos)

    def parts(self) -> TrunkParts:
        body = self.model.get_decoder()
        return TrunkParts(
            embed=body.embed_tokens,
            layers=body.layers,
            norm=body.norm,
            rotary=body.rotary_emb,
            head=self.model.get_output_embeddings(),
        )

    def decoder_inputs(self, prompt: Prompt) -> dict[str, Any]:
        return {}

    # ---- media: none

    @property
    def encoder_id(self) -> str:
        return self.model_type

    def measure(self, clip: Clip) -> MediaSize:
        self._refuse(clip)

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        self._refuse(clip)

    def encode_frames(self, chunks: Iterable[Frames], max_pixels: int | None = None) -> MediaEmbeds:
        raise AssertionError(f"{self.model_type} sees nothing")

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        return len(media.embeds)

    def encoder_parameters(self, part: str) -> list[torch.nn.Parameter]:
        return []

    def encode_backward(
        self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None = None
    ) -> None:
        raise AssertionError(f"{self.model_type} has no encoder")

    def _taken(self, clip: Clip) -> Clip:
        if clip.kind not in self.placeholders:
            self._refuse(clip)
        return clip

    def _refuse(self, clip: Clip) -> NoReturn:
        takes = ", ".join(["text", *self.placeholders])
        raise ValueError(
            f"{clip.path}: {self.model_type} takes {takes}, not {clip.kind}; use another model.path, or leave it out"
        )

    # ---- prompts

    def count_tokens(self, example: Example, media_tokens: Sequence[int]) -> int:
        ids = self.template_ids(example, len(media_tokens))
        return sum(token not in self.pads for token in ids) + sum(media_tokens)

    def template_ids(self, example: Example, num_media: int) -> list[int]:
        """The tokens of an example, one placeholder for each of its clips, but for sound that comes with a video.

        Raises:
            ValueError: the model does not take such clips, its chat template not such messages, or the text holds
                placeholders of its own, or tokens that the model has no embeddings of.
        """
        for clip in example.clips:
            if clip.kind not in self.placeholders:
                self._refuse(clip)
        messages = self.template(example)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"example {example.id}: the chat template of {self.tokenizer.name_or_path} fails on its messages "
                f"({' '.join(str(error).split())}); mend chat_template.jinja, or the messages"
            ) from error
        ids = self.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportArgumentType]
        found = [self.pads[token] for token in ids if token in self.pads]
        expected = [clip.kind for clip in example.clips if not clip.with_video]
        if found != expected or num_media != len(example.clips):
            raise ValueError(
                f"example {example.id}: {len(found)} media placeholders ({', '.join(found) or 'none'}) in the text for "
                f"{num_media} clips ({', '.join(clip.kind for clip in example.clips) or 'none'}); leave such tokens "
                "out of the text, or use a chat template that writes one for each clip"
            )
        self.require_known((token for token in ids if token not in self.pads), f"example {example.id}: its text")
        return ids

    def template(self, example: Example) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        parts = lambda message: [  # noqa: E731
            {"type": part.kind} if isinstance(part, Clip) else {"type": "text", "text": part}
            for part in message.content
            if isinstance(part, str) or not part.with_video
        ]
        if not self.placeholders:  # templates of text models take strings alone
            return [{"role": message.role, "content": "".join(message.content)} for message in example.messages]  # pyright: ignore
        return [{"role": message.role, "content": parts(message)} for message in example.messages]

    def expand(self, media: MediaEmbeds, pad: int) -> tuple[list[int], Ranges]:
        """The tokens that stand for a clip, and which of them its rows fill."""
        count = len(media.embeds)
        return [pad] * count, ((0, count),)

    def expand_together(self, video: MediaEmbeds, sound: MediaEmbeds, pad: int) -> tuple[list[int], list[Ranges]]:
        """The same of a video and the sound that comes with it."""
        raise AssertionError(f"{self.model_type} does not hear")

    def prompt(self, example: Example, media: tuple[MediaEmbeds, ...]) -> Prompt:
        token_ids: list[int] = []
        slots: list[Ranges] = []
        clips = example.clips
        for token in self.template_ids(example, len(media)):
            if token in self.pads:
                here, first = len(token_ids), len(slots)
                if first + 1 < len(clips) and clips[first + 1].with_video:
                    tokens, each = self.expand_together(media[first], media[first + 1], token)
                else:
                    tokens, ranges = self.expand(media[first], token)
                    each = [ranges]
                slots += [tuple((here + start, here + end) for start, end in ranges) for ranges in each]
                token_ids += tokens
            else:
                token_ids.append(token)
        positions = self.positions(len(token_ids), media, slots)
        return Prompt(token_ids=torch.tensor(token_ids), position_ids=positions, media=media, media_slots=tuple(slots))

    def positions(self, length: int, media: Sequence[MediaEmbeds], slots: Sequence[Ranges]) -> Tensor:
        """int64 [axes, length]"""
        return torch.arange(length)[None]


class Qwen2(Text):
    """Qwen2 and Qwen2.5."""

    model_type, model_class, config_class = "qwen2", Qwen2ForCausalLM, Qwen2Config


class Qwen3(Text):
    model_type, model_class, config_class = "qwen3", Qwen3ForCausalLM, Qwen3Config


def tiny_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The decoder's part of a twin's configuration."""
    return {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.08,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1 << 18,
        "tie_word_embeddings": True,
        # fast enough to tell neighbours apart, slow enough to find the same thing an hour away
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }
