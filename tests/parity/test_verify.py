"""`longrl verify` passes what is right and fails wrong attention, positions and encoders, broken at their seams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from longrl.errors import run_guarded
from longrl.models import FAMILIES, trunk
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.trunk import Trunk
from longrl.parallel import sequence
from longrl.parallel.sequence import SequenceGroup
from longrl.verify import _split_against_whole as split_against_whole
from longrl.verify import verify_command


def verify(capsys, model: str = "tiny:qwen2_5_vl", sp: int = 1, dtype: str = "fp32") -> tuple[int, list[str], str]:
    """The exit status, the lines printed, and what went to stderr."""
    status = run_guarded(lambda: verify_command(model, sp, dtype), show_traceback=False)
    out, err = capsys.readouterr()
    return status, out.splitlines()[1:], err


def failed(lines: list[str]) -> list[str]:
    return [line.split("  ")[1] for line in lines if line.startswith("FAIL")]


@pytest.mark.parametrize(
    ("model", "dtype"),
    [*(("tiny:qwen2_5_vl", dtype) for dtype in ("fp64", "fp32", "bf16")), ("tiny:vila", "fp64"), ("tiny:vila", "bf16")],
)
def test_the_twin_passes(capsys, model, dtype):
    status, lines, err = verify(capsys, model, dtype=dtype)
    assert (status, err) == (0, "")
    assert [line[:4] for line in lines] == ["ok  "] * 4


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["tiny:qwen2_5_vl", "tiny:vila"])
def test_two_ranks_pass(capsys, model):
    status, lines, _ = verify(capsys, model, sp=2)
    assert status == 0
    assert sum("2 ranks against one" in line for line in lines) == 2


@pytest.fixture
def broken_attention():
    """A little too sharp: as if the scale were that of another head size."""
    right = AttentionInterface()[trunk.ATTENTION]

    def sharper(module, query, key, value, attention_mask, scaling=1.0, **kwargs):
        return right(module, query, key, value, attention_mask, scaling=1.01 * scaling, **kwargs)

    AttentionInterface.register(trunk.ATTENTION, sharper)
    yield
    AttentionInterface.register(trunk.ATTENTION, right)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_wrong_attention_fails(capsys, broken_attention, dtype):
    status, lines, err = verify(capsys, dtype=dtype)
    assert status == 1
    assert "not all bounds hold" in err
    claims = [
        "gradients: shared prompt against separate sequences",
        "log-probs: shared prompt against separate sequences",
    ]
    assert failed(lines) == claims


def test_wrong_decoding_fails(capsys, monkeypatch):
    """Tokens that are a position late, but only when they are drawn."""
    right = Trunk.decode
    monkeypatch.setattr(
        Trunk, "decode", lambda self, prefixes, own, tokens, at: right(self, prefixes, own, tokens, at + 1)
    )
    status, lines, err = verify(capsys)
    assert status == 1
    assert "not all bounds hold" in err
    assert failed(lines) == ["log-probs: engine against trainer"]


def with_wrong_exchange(sp: SequenceGroup | None, *args: Any) -> tuple[float, float]:
    """On one rank: gradients come back to other tokens than those they are of."""
    right = sequence._AllToAll.backward
    sequence._AllToAll.backward = staticmethod(lambda ctx, *grads: (right(ctx, *grads)[0].flip(0), *[None] * 4))
    return split_against_whole(sp, *args)


@pytest.mark.distributed
def test_a_wrong_exchange_fails(capsys, monkeypatch):
    monkeypatch.setattr("longrl.verify._split_against_whole", with_wrong_exchange)
    status, lines, err = verify(capsys, sp=2)
    assert status == 1
    assert "not all bounds hold" in err
    assert failed(lines) == ["gradients: 2 ranks against one"]


class Stretched(torch.nn.Module):
    """A video's time and place and the order of text, twice as far apart as they are."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden, positions):
        return self.rotary(hidden, 2 * positions)


class WrongPositions(Qwen25VL):
    def parts(self):
        right = super().parts()
        return replace(right, rotary=Stretched(right.rotary))


class OneMore(torch.nn.Module):
    """For what does not begin at 0, as a prefix does: streams."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden, positions):
        return self.rotary(hidden, positions + int(positions.flatten()[0] > 0))


class Late(Qwen25VL):
    """What comes after a prefix is a position late, and nothing else is wrong."""

    def parts(self):
        right = super().parts()
        return replace(right, rotary=OneMore(right.rotary))


class Deep(Qwen25VL):
    """As deep as a model of 7B. Rounding adds up over the layers."""

    @classmethod
    def tiny(cls, seed, dtype):
        twin = super().tiny(seed, dtype)
        text = twin.model.config.text_config
        text.num_hidden_layers, text.layer_types = 28, 28 * text.layer_types[:1]
        torch.manual_seed(seed)
        model = type(twin.model)._from_config(twin.model.config, dtype=dtype)
        return cls(model, twin.tokenizer, twin.files)


class DeepLate(Late, Deep):
    pass


def test_a_deep_model_passes_in_bf16(capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, "deep", f"{__name__}:Deep")
    status, lines, err = verify(capsys, model="tiny:deep", dtype="bf16")
    assert (status, err) == (0, "")
    assert [line[:4] for line in lines] == ["ok  "] * 4


class Restless(Qwen25VL):
    """Encodes a clip differently every time."""

    def encode(self, clip, chunks=None):
        for right in super().encode(clip, chunks):
            yield replace(right, embeds=right.embeds + 1e-6 * torch.randn(right.embeds.shape))


@pytest.mark.parametrize(
    ("family", "dtype", "claim"),
    [
        (Late, "bf16", "gradients: shared prompt against separate sequences"),
        (DeepLate, "bf16", "gradients: shared prompt against separate sequences"),
        (WrongPositions, "fp32", "gradients: shared prompt against separate sequences"),
        (WrongPositions, "bf16", "gradients: shared prompt against separate sequences"),
        (Restless, "fp32", "embeddings: from the cache against live"),
    ],
)
def test_a_broken_family_fails(capsys, monkeypatch, family, dtype, claim):
    monkeypatch.setitem(FAMILIES, "broken", f"{__name__}:{family.__name__}")
    status, lines, _ = verify(capsys, model="tiny:broken", dtype=dtype)
    assert status == 1
    assert claim in failed(lines)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "tiny:qwen"}, "no model family 'qwen'"),
        ({"model": "nowhere"}, "not a Hugging Face folder"),
        ({"sp": 3}, "3 = 1 x 2 + 1"),
        ({"dtype": "fp8"}, "--dtype must be one of fp64, fp32, bf16"),
    ],
)
def test_bad_input_is_one_line(capsys, changed, why):
    status, lines, err = verify(capsys, **changed)
    assert (status, lines) == (2, [])
    assert why in err
    assert len(err.splitlines()) == 1
