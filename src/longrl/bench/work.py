"""What is to be measured: the numbers of one step, those that cannot work refused, and what each path computes.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrl.parallel.layout import require_heads

VOCABULARY, WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 1024, 256, 1024, 4, 8, 2
"""The text body."""
TOWER_WIDTH, TOWER_MLP, TOWER_LAYERS, TOWER_HEADS = 128, 344, 2, 4
"""The vision tower: for a token a third of the body's operations, as in the real 3B and 7B models."""
PATCH_VALUES = 3 * 2 * 14 * 14
MERGED = 4
"""Patches of one video token."""
FRAME_TOKENS = 16
"""Video tokens of one pair of frames, 112 x 112 pixels; patches attend within it."""

PATHS = {
    "plain": "separate sequences, media encoded in every pass",
    "reuse": "as plain, media encoded once",
    "mrsp": "as reuse, each sequence split over the ranks",
    "shared": "the prompt once for the old log-probs and once in the update",
    "fused": "the prompt once",
    "stock": "as plain, its passes by stock transformers (SDPA)",
}
SEPARATE = ("plain", "reuse", "mrsp", "stock")
"""Every response is a sequence of its own; several may be in one micro-batch."""
DEALT = ("plain", "reuse", "stock")
"""Each rank decodes and trains its share of the responses."""
ENCODED_EACH_TIME = ("plain", "stock")
"""Every pass of every sequence encodes the video again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step: a prompt and its responses, on `sp` processes."""

    prompt_tokens: int
    group_size: int
    response_tokens: int
    video_tokens: int = 0
    """Of the prompt."""
    sp: int = 1

    def __post_init__(self) -> None:
        require_heads(KV_HEADS, self.sp)
        if self.group_size < self.sp:
            raise ValueError(
                f"--group-size {self.group_size} responses cannot be dealt to --sp {self.sp} ranks, at least one each, "
                f"as path plain does: {self.sp - self.group_size} too few"
            )
        if self.prompt_tokens - 1 < self.sp:
            raise ValueError(
                f"--prompt-tokens {self.prompt_tokens} is too few for --sp {self.sp} ranks: all but the last are "
                f"split, at least one each, so at least {self.sp + 1}"
            )
        if self.video_tokens >= self.prompt_tokens:
            raise ValueError(
                f"--video-tokens {self.video_tokens} must be fewer than --prompt-tokens {self.prompt_tokens}: the last "
                "token is text"
            )
        frames, rest = divmod(self.video_tokens, FRAME_TOKENS)
        if rest:
            raise ValueError(
                f"--video-tokens {self.video_tokens} = {frames} x {FRAME_TOKENS} + {rest} is not a whole number of "
                f"pairs of frames; choose a multiple of {FRAME_TOKENS}"
            )
        if 0 < frames < self.sp:
            raise ValueError(
                f"--video-tokens {self.video_tokens} are {frames} pairs of frames, which --sp {self.sp} ranks cannot "
                f"share, at least one each; choose at least {self.sp * FRAME_TOKENS}"
            )

    def same_as(self, path: str) -> str | None:
        """The path that this one does not differ from here, so that it need not be timed."""
        if path == "mrsp" and self.sp == 1:
            return self.same_as("reuse") or "reuse"
        return "plain" if path == "reuse" and not self.video_tokens else None

    def distinct(self) -> list[str]:
        return [path for path in PATHS if self.same_as(path) is None]

    def share(self, path: str) -> int:
        """The most responses that a rank has to do with."""
        return -(-self.group_size // self.sp) if path in DEALT else self.group_size

    def prefills(self, path: str) -> int:
        """Of the rollout."""
        return self.sp if path in DEALT else 1

    def prefix_passes(self, path: str) -> int:
        """Forward passes over the prompt; a backward pass counts two."""
        return {"fused": 3, "shared": 5}.get(path, self.prefills(path) + 4 * self.group_size)

    def encodings(self, path: str) -> int:
        """Passes of the vision tower over the video."""
        each_time = self.prefills(path) + 2 * self.group_size if path in ENCODED_EACH_TIME else 1
        return each_time if self.video_tokens else 0

    def flops(self, path: str) -> float:
        """Of the whole step on all ranks: products with weights and attention, of which the causal half. A backward
        pass counts two forward passes; nothing is recomputed."""
        prompt, new, count = self.prompt_tokens - 1, self.response_tokens, self.group_size
        head = 2 * WIDTH * VOCABULARY * new
        suffix = count * (_forward(new, prompt) + head)
        if path in SEPARATE:
            rest = 4 * count * (_forward(prompt + new, 0) - _forward(prompt, 0) + head)
        else:
            rest = {"fused": 3, "shared": 4}[path] * suffix
        return self.prompt_flops(path) + suffix + rest

    def prompt_flops(self, path: str) -> float:
        """Those of them that do not depend on the length of the responses. The ratio of two paths bounds their
        speed-up."""
        prompt = self.prompt_tokens - 1
        tower = self.encodings(path) * _encode(self.video_tokens)
        if path in SEPARATE:
            return self.prefills(path) * _prefix(prompt) + 4 * self.group_size * _forward(prompt, 0) + tower
        return {"fused": 1, "shared": 3}[path] * _prefix(prompt) + _prefix_backward(prompt) + tower

    def speedup_by_whole_passes(self) -> float:
        """Plain / fused by FLOPs if a pass over a prefix ran all of its last layer, as the first plan counted."""
        prompt = self.prompt_tokens - 1
        left = _forward(prompt, 0) - _prefix(prompt)
        left_backward = 2 * _forward(prompt, 0) - _prefix_backward(prompt)
        plain = self.flops("plain") + self.prefills("plain") * left
        return plain / (self.flops("fused") + left + left_backward)


_QUERIES, _KEYS = WIDTH * WIDTH, 2 * WIDTH * KV_HEADS * (WIDTH // HEADS)
"""Weights of a layer that make queries, and keys and values."""
_WEIGHTS = LAYERS * (2 * _QUERIES + _KEYS + 3 * WIDTH * MLP)


def _forward(tokens: int, before: int) -> float:
    """All layers over tokens in a row, each of which sees `before` others, itself and those of the row before it."""
    return tokens * (2 * _WEIGHTS + 4 * LAYERS * WIDTH * (before + tokens / 2))


def _prefix(tokens: int) -> float:
    """The trunk's pass over a prefix: it leaves the last layer with the keys and values, before attention."""
    return _forward(tokens, 0) - tokens * (2 * (_WEIGHTS / LAYERS - _QUERIES - _KEYS) + 4 * WIDTH * tokens / 2)


def _prefix_backward(tokens: int) -> float:
    """As two of those, but for the last layer's queries, which have no gradient."""
    return 2 * (_prefix(tokens) - tokens * 2 * _QUERIES)


def _encode(tokens: int) -> float:
    """The vision tower over so many video tokens."""
    weights = TOWER_LAYERS * (4 * TOWER_WIDTH**2 + 3 * TOWER_WIDTH * TOWER_MLP) + PATCH_VALUES * TOWER_WIDTH
    attention = 4 * TOWER_LAYERS * TOWER_WIDTH * FRAME_TOKENS * MERGED
    merger = (MERGED * TOWER_WIDTH) ** 2 + MERGED * TOWER_WIDTH * WIDTH
    return tokens * (MERGED * (2 * weights + attention) + 2 * merger)
