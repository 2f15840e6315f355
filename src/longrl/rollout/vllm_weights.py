"""The policy's weights on their way to vLLM, under their Hugging Face names: whole, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from longrl.models import adapters
from longrl.parallel.shard import each_whole, whole
from longrl.policy import Policy

_BASE = ".base_layer"
"""What peft puts into the names of weights that have an adapter."""


def decoder_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Without the encoder, whose embeddings the engine gets, and without adapters. Every rank of a group that shares
    the weights goes through all of them."""
    model, prefix = policy.family.model, policy.family.decoder_prefix
    apart = {id(parameter) for part in ("tower", "projector") for parameter in policy.family.encoder_parameters(part)}
    apart |= {id(parameter) for parameter in adapters.parameters(model).values()}
    named = {name: x for name, x in model.named_parameters() if id(x) not in apart and name.startswith(prefix)}
    for name, x in each_whole(named):
        yield name.removeprefix(prefix).replace(_BASE, ""), x
    parts = policy.family.parts()
    if parts.head.weight is parts.embed.weight:  # vLLM has the head apart, see `untie`
        yield from each_whole({"lm_head.weight": parts.head.weight})  # pyright: ignore


def untie(config: Path) -> None:
    """Says in a config.json that the head is not the embedding: on a CPU vLLM packs the weights of a layer as it gets
    them, and a head that is only tied to what it gets keeps its old ones."""
    content = json.loads(config.read_text())
    for section in (content, content.get("text_config", {})):
        section["tie_word_embeddings"] = False
    config.write_text(json.dumps(content, indent=2) + "\n")


def save_adapters(policy: Policy, folder: Path) -> None:
    """Writes the adapters as peft does, under the names that the decoder has alone. Every rank of a group that shares
    the weights calls it."""
    adapters.save(policy.family, folder, whole(adapters.parameters(policy.family.model), keep=True))
    if prefix := policy.family.decoder_prefix:
        path, first = folder / adapters.WEIGHTS, adapters.SAVED_PREFIX
        tensors = {first + name.removeprefix(first + prefix): x for name, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
