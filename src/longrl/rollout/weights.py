"""The weights that a step changes, on their way from a run to its rollout servers: files on storage that they share.

    DIR/000012-5f0c9a31/           of version 12: a folder appears when it is complete, and is never changed
        weights.json               version, names and sizes
        00000.safetensors ...

Tensors are gathered from the ranks that share them, and written, some at a time: no more than PART_BYTES and one tensor
are in host memory. Of adapters it is they alone. What made the embeddings is left out: those come through the cache.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longrl.config import ModelConfig
from longrl.parallel.ranks import Ranks
from longrl.parallel.shard import each_whole, local
from longrl.policy import Policy
from longrl.rollout.wire import Weights

ABOUT = "weights.json"
PART_BYTES = 2**28
SAMPLES = 4096
"""Numbers of each frozen tensor that a fingerprint looks at."""


class Outbox:
    """Writes weights for the servers, and removes them when there are newer ones. All ranks make the same calls."""

    def __init__(self, dir: Path, policy: Policy, ranks: Ranks) -> None:
        self.dir, self.policy, self.ranks = dir.absolute(), policy, ranks
        self._current: Weights | None = None

    def current(self) -> Weights:
        """The policy's as they are, written if they are not there yet.

        Raises:
            OSError: they cannot be written.
        """
        version = self.policy.version
        if self._current is None or self._current.version != version:
            self.policy.reshard()
            folder = self._write(version) if self.ranks.dp_rank == 0 else None
            self._current = Weights(version=version, folder=self.ranks.from_main(lambda: str(folder)))
        return self._current

    def of(self, version: int) -> Weights | None:
        """Those of an earlier version, if they are still there."""
        found = self.ranks.from_main(lambda: [str(path) for path in self.dir.glob(f"{version:06d}-*")])
        return Weights(version=version, folder=found[0]) if found else None

    def clear(self) -> None:
        if self.ranks.is_main:
            shutil.rmtree(self.dir, ignore_errors=True)

    def _write(self, version: int) -> Path | None:
        """On the ranks of the first group, which may share the weights; the main one writes."""
        tensors = learned(self.policy)
        if not self.ranks.is_main:
            for _ in each_whole(tensors):
                pass
            return None
        self.dir.mkdir(parents=True, exist_ok=True)
        older = list(self.dir.iterdir())
        with tempfile.TemporaryDirectory(dir=self.dir, ignore_cleanup_errors=True) as temp:
            written = Path(temp, "written")
            written.mkdir()
            for number, part in enumerate(_parts(each_whole(tensors))):
                save_file(part, written / f"{number:05d}.safetensors")
            about = {"version": version, "tensors": _sizes(tensors)}
            (written / ABOUT).write_text(json.dumps(about))
            final = self.dir / f"{version:06d}-{secrets.token_hex(4)}"
            written.rename(final)
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)
        return final


def read_weights(policy: Policy, weights: Weights) -> None:
    """Puts written weights, and their version, into a policy.

    Raises:
        ValueError: they are not there, of another version, another model's, or damaged; the policy may then hold some.
    """
    folder, expected = Path(weights.folder), learned(policy)
    try:
        about = json.loads((folder / ABOUT).read_text())
    except OSError as error:
        raise ValueError(
            f"weights {folder} of version {weights.version} cannot be read ({error.strerror}); run_dir must be on "
            "storage that the run and its rollout server share, at the same path"
        ) from None
    if about["version"] != weights.version:
        raise ValueError(f"weights {folder} are of version {about['version']}, expected {weights.version}")
    sizes = _sizes(expected)
    if differing := [name for name in sizes | about["tensors"] if sizes.get(name) != about["tensors"].get(name)]:
        name, more = differing[0], len(differing) - 1
        raise ValueError(
            f"weights {folder} are not of the server's model: {name} is {about['tensors'].get(name)} there, "
            f"{sizes.get(name)} here" + (f" (and {more} more)" if more else "")
        )
    policy.reshard()
    missing = set(sizes)
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file, torch.no_grad():
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    local(expected[name]).copy_(file.get_tensor(name))
                    missing.discard(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {folder} cannot be read: {error}") from error
    if missing:
        raise ValueError(f"weights {folder} lack {sorted(missing)[0]} (and {len(missing) - 1} more)")
    policy.version = weights.version


def learned(policy: Policy) -> dict[str, nn.Parameter]:
    """What steps change and rollouts depend on, by name: not the encoder, whose embeddings come through the cache."""
    return {name: parameter for name, parameter in _decoder(policy).items() if parameter.requires_grad}


def fingerprint(policy: Policy, model: ModelConfig) -> str:
    """Of what rollouts depend on and steps do not change: shapes, frozen weights (a sample of them, in the precision of
    bfloat16), adapters' scale, positions, tokens. All ranks that share the weights call it."""
    family = policy.family
    about: list[Any] = [model.lora and model.lora.model_dump(), model.rope and model.rope.model_dump()]
    about += [sorted(family.stop_ids), len(family.tokenizer), _sizes(_decoder(policy))]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, x in each_whole({name: x for name, x in _decoder(policy).items() if not x.requires_grad}):
        some = x.flatten()[:: max(1, x.numel() // SAMPLES)].to(torch.bfloat16).cpu()
        digest.update(name.encode() + some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _decoder(policy: Policy) -> dict[str, nn.Parameter]:
    ours = {id(parameter) for parameter in policy.trunk.parameters()}
    return {name: x for name, x in policy.family.model.named_parameters() if id(x) in ours}


def _sizes(tensors: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tensors.items()}


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, x in tensors:
        part[name] = x.cpu().contiguous()
        if sum(x.nbytes for x in part.values()) >= PART_BYTES:
            yield part
            part = {}
    if part:
        yield part
