"""What a model family must tell the rest of the program. One file each; see qwen_vl.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrl.models.trunk import TrunkParts
from longrl.types import Clip, Example, Frames, MediaEmbeds, MediaSize, Prompt


class Family(Protocol):
    """A loaded model of one family: its classes, preprocessing, positions and checkpoint layout."""

    model_type: str
    """As in the checkpoint's config.json: what dispatch looks at."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    placeholders: Mapping[str, str]
    """Kind of clip -> the token that stands for its embeddings: the kinds that the family takes."""

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Self:
        """Reads a Hugging Face folder. Raises ValueError when the folder is not one of this family, or weights are
        missing, of another size or unreadable."""
        ...

    @classmethod
    def tiny(cls, seed: int, dtype: torch.dtype) -> Self:
        """The random-weight twin: the real classes, made from config, with a tokenizer of its own."""
        ...

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a complete Hugging Face folder, which `load` and `from_pretrained` read back with equal logits.

        weights: by their names in the model, where it holds only a share of them itself.
        """
        ...

    decoder_prefix: str
    """In front of the decoder's names, where it is a part that Hugging Face has a class for."""

    def describe(self, path: Path) -> None:
        """Writes the folder that an engine starts from: all of the model that reads embeddings, but for its weights."""
        ...

    @property
    def encoder_id(self) -> str:
        """Identifies preprocessing, encoder weights and dtype: part of every cache key. Computed once."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        ...

    def require_known(self, token_ids: Iterable[int], whose: str) -> None:
        """Raises ValueError where the model has no embedding of one of these tokens of a text."""
        ...

    def parts(self) -> TrunkParts: ...

    def decoder_inputs(self, prompt: Prompt) -> dict[str, Any]:
        """What transformers' own decoder takes besides embeddings and positions: for the slow way of `verify`."""
        ...

    def measure(self, clip: Clip) -> MediaSize:
        """Exactly what `encode` will give of a clip, from the packets of its file. Raises as `encode`, but for damage
        that only decoding shows."""
        ...

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        """Decodes and encodes a clip, a chunk of `measure` at a time, in order; keys are left empty.

        chunks: which of them; None: all.
        """
        ...

    def encode_frames(self, chunks: Iterable[Frames], max_pixels: int | None = None) -> MediaEmbeds:
        """Embeddings (with gradients if enabled) of the frames of a video already decoded, without key."""
        ...

    def prompt_tokens(self, media: MediaEmbeds) -> int:
        """What an embedded clip takes up in a prompt: its rows and the text between them."""
        ...

    def count_tokens(self, example: Example, media_tokens: Sequence[int]) -> int:
        """Length of the prompt that `prompt` would give.

        media_tokens: `prompt_tokens` of each clip of the example.
        """
        ...

    def encoder_parameters(self, part: str) -> list[nn.Parameter]:
        """Of the vision `tower`, or of the `projector` behind it, in an order that does not change."""
        ...

    def encode_backward(
        self, media: MediaEmbeds, span: slice, grads: Tensor, deepstack_grads: Tensor | None = None
    ) -> None:
        """Adds to the encoder's gradients what follows from those of some embeddings [span, D], and of what is added
        behind the first layers [K, span, D]: encodes their frames again, with gradients, a bounded number at a time.

        media: with its clip, as the same weights made it.
        """
        ...

    def prompt(self, example: Example, media: tuple[MediaEmbeds, ...]) -> Prompt:
        """Renders the chat template, expands placeholders and computes positions."""
        ...
