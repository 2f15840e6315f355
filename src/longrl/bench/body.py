"""The model that is measured: a text body and a vision tower of real classes, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from longrl.bench.work import (
    FRAME_TOKENS,
    HEADS,
    KV_HEADS,
    LAYERS,
    MERGED,
    MLP,
    PATCH_VALUES,
    TOWER_HEADS,
    TOWER_LAYERS,
    TOWER_MLP,
    TOWER_WIDTH,
    VOCABULARY,
    WIDTH,
)
from longrl.models.trunk import TrunkParts
from longrl.parallel.sequence import SequenceGroup


class Body:
    """A decoder in the place of a family. Token VOCABULARY + i is the i-th token of the video."""

    stop_ids = frozenset({-1})  # every response has its full length

    def __init__(self, attention: str) -> None:
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=1 << 20,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Qwen2ForCausalLM(config)
        self.tokenizer = self
        self.model.set_attn_implementation(attention)
        self.embed = _Embed(self.model.model.embed_tokens)

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def parts(self) -> TrunkParts:
        body = self.model.model
        return TrunkParts(
            embed=self.embed, layers=body.layers, norm=body.norm, rotary=body.rotary_emb, head=self.model.lm_head
        )


class _Embed(nn.Module):
    """Embeds text by the table and video by what the tower made of it."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.video: Tensor | None = None
        """[V, D], set by the path before its passes."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.video is None:
            return self.table(ids)
        text = self.table(ids.clamp_max(VOCABULARY - 1))
        return torch.where((ids >= VOCABULARY)[..., None], self.video[(ids - VOCABULARY).clamp_min(0)], text)


class Tower:
    """A frozen vision tower and the frames that it looks at."""

    def __init__(self, video_tokens: int) -> None:
        config = Qwen2_5_VLVisionConfig(
            depth=TOWER_LAYERS,
            hidden_size=TOWER_WIDTH,
            intermediate_size=TOWER_MLP,
            num_heads=TOWER_HEADS,
            out_hidden_size=WIDTH,
            fullatt_block_indexes=[TOWER_LAYERS - 1],
        )
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config).requires_grad_(False)
            self.frames = torch.randn(video_tokens // FRAME_TOKENS, FRAME_TOKENS * MERGED, PATCH_VALUES)

    def encode(self, copies: int) -> Tensor:
        """[V, D] of the video, encoded as often as there are sequences that hold it."""
        return self._encode(self.frames.repeat(copies, 1, 1))[: len(self.frames) * FRAME_TOKENS]

    def encode_together(self, sp: SequenceGroup) -> Tensor:
        """[V, D] on every rank, of which each has encoded a share of the frames."""
        part = self._encode(self.frames[sp.span(len(self.frames))]).view(-1, FRAME_TOKENS * WIDTH)
        return sp.gather(part.T, len(self.frames)).T.reshape(-1, WIDTH)

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        side = int((FRAME_TOKENS * MERGED) ** 0.5)
        return self.model(frames.flatten(0, 1), grid_thw=torch.tensor([[len(frames), side, side]])).pooler_output
