"""The records that flow between modules.

Modules hand each other these and nothing else. All are frozen, slotted and keyword-only; lengths are checked on
construction, so a record that exists is consistent. Shapes use: F frames, V media tokens, D width, P prompt tokens,
R response tokens, G rollouts of a group, L layers.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


KINDS = ("choice", "open", "math", "number", "ocr", "free_text", "regression", "grounding")
"""What an example's answer is, and so how it is scored: an option letter, a word or phrase, an expression, a number,
text that was read, sentences, an estimate, seconds from and to."""


class MediaError(ValueError):
    """A media file cannot be used: missing, empty, truncated, without such a stream, span outside it, absurd size; or
    it makes a prompt longer than the run allows.

    The one error that `data.on_error: skip` may turn into a counted skip.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A reference to a span of a video and how to sample it, to an image, or to a span of sound. Never pixels."""

    path: str
    kind: Literal["video", "image", "audio"] = "video"
    with_video: bool = False
    """Sound that belongs to the video just before it in the message: the model hears it while it sees."""
    start_s: float = 0.0
    end_s: float | None = None
    """None: to the end of the file."""
    fps: float | None = None
    """Frames a second to sample. Of a video exactly one of fps and num_frames is set, of others none."""
    num_frames: int | None = None
    """Frames to sample, spread evenly over the span."""
    max_pixels: int | None = None
    """Largest height x width of a frame handed to the encoder; None: the family's own limit."""

    def __post_init__(self) -> None:
        for name in ("start_s", "end_s", "fps", "num_frames", "max_pixels"):
            if not isinstance(value := getattr(self, name), Real | None) or isinstance(value, bool):
                of = " of seconds" if name.endswith("_s") else ""
                raise ValueError(f"clip {self.path}: {name} must be a number{of}, got {value!r:.80}")
        if self.kind == "video" and (self.fps is None) == (self.num_frames is None):
            raise ValueError(
                f"clip {self.path}: set exactly one of fps (got {self.fps}) and num_frames (got {self.num_frames})"
            )
        if self.kind != "video" and (self.fps, self.num_frames) != (None, None):
            raise ValueError(
                f"clip {self.path}: fps and num_frames are for videos, not for {self.kind}; leave them out"
            )
        if self.kind == "image" and (self.start_s, self.end_s) != (0.0, None):
            raise ValueError(f"clip {self.path}: an image has no span; leave start_s and end_s out")
        if self.with_video and self.kind != "audio":
            raise ValueError(f"clip {self.path}: only sound can come with a video, this is {self.kind}")
        if self.kind == "audio" and self.max_pixels is not None:
            raise ValueError(f"clip {self.path}: sound has no pixels; leave max_pixels out")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"clip {self.path}: fps must be positive and finite, got {self.fps}")
        for name in ("num_frames", "max_pixels"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, Integral) and int(value) >= 1):
                raise ValueError(f"clip {self.path}: {name} must be a whole number, 1 or more, got {value}")
        if not 0 <= self.start_s < float("inf"):
            raise ValueError(f"clip {self.path}: start_s must be 0 or more, got {self.start_s}")
        if self.end_s is not None and not self.start_s < self.end_s < float("inf"):
            raise ValueError(
                f"clip {self.path}: the span {self.start_s} s to {self.end_s} s is empty; end_s must be the larger"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Decoded frames and the presentation times they really have."""

    pixels: np.ndarray
    """uint8 [F, H, W, 3], RGB, rotation applied."""
    timestamps_s: np.ndarray
    """float64 [F], true presentation times, in the file's own time."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or len(self.pixels) != len(self.timestamps_s):
            raise AssertionError(f"frames {self.pixels.shape} with {len(self.timestamps_s)} timestamps")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSize:
    """How large the embeddings of a clip will be, told by the packets of its file: nothing has been decoded."""

    num_frames: int
    """1 of an image; of sound, what its encoder counts."""
    num_tokens: int
    """Rows of the embeddings."""
    prompt_tokens: int
    """What the clip takes up in a prompt: its rows, and the text that the family puts between them."""
    num_bytes: int
    """Of all tensors, times included."""
    chunk_frames: int
    """Frames that the encoder sees at a time, counted from the clip's start: the same, whoever encodes them."""
    chunk_tokens: int

    @property
    def num_chunks(self) -> int:
        return -(-self.num_frames // self.chunk_frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaEmbeds:
    """What an encoder made of one clip; what the cache stores."""

    embeds: Tensor
    """[V, D]; may be a memory-mapped slice."""
    grid_thw: tuple[int, int, int]
    """Temporal patches, patch rows, patch columns (before merging)."""
    seconds_per_grid: float
    """Seconds between temporal patches: the unit of the temporal rotary axis."""
    timestamps_s: Tensor
    """float64 [F], true times of the sampled frames."""
    key: str
    """Cache key: identifies the content, span, sampling, preprocessing, encoder weights, dtype and schema."""
    deepstack: Tensor | None = None
    """[K, V, D] or None."""
    clip: Clip | None = None
    """What was embedded; None where the maker does not know."""

    def __post_init__(self) -> None:
        shape, (t, h, w) = tuple(self.embeds.shape), self.grid_thw
        # a slice of the embeddings (of a shard) is fine, more of them than patches are not
        if len(shape) != 2 or shape[0] > t * h * w:
            raise AssertionError(f"media {self.key}: embeddings {shape} of a grid of {t} x {h} x {w} patches")
        if self.timestamps_s.ndim != 1 or len(self.timestamps_s) < t:
            raise AssertionError(
                f"media {self.key}: timestamps {tuple(self.timestamps_s.shape)} for {t} temporal patches"
            )
        if self.deepstack is not None and tuple(self.deepstack.shape[1:]) != shape:
            raise AssertionError(f"media {self.key}: deepstack {tuple(self.deepstack.shape)} beside embeddings {shape}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. content holds text and clips in reading order."""

    role: str
    content: tuple[str | Clip, ...]

    def __post_init__(self) -> None:
        before: str | Clip | None = None
        for part in self.content:
            if isinstance(part, Clip) and part.with_video and not _is_sound_of(part, before):
                found = "nothing" if before is None else f"{before!r:.60}"
                if isinstance(before, Clip):
                    found = f"the {before.kind} {before.path} ({before.start_s} to {before.end_s} s)"
                raise ValueError(
                    f"sound {part.path} ({part.start_s} to {part.end_s} s) is marked with_video, but what is before it "
                    f"is {found}, expected the video of that file and span; put it there, or leave with_video out"
                )
            before = part


def _is_sound_of(sound: Clip, video: str | Clip | None) -> bool:
    span = (sound.path, sound.start_s, sound.end_s)
    return isinstance(video, Clip) and video.kind == "video" and (video.path, video.start_s, video.end_s) == span


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question about some media, with its truth."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None
    """The truth: an option letter for kind `choice`, text, a number or a span of seconds otherwise."""
    kind: str
    """One of KINDS: which reward scores it."""
    category: str = "other"
    """What evaluation groups by: order, spatial, counting, plot, ..."""
    response: str | None = None
    """A demonstrated response, for supervised fine-tuning."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> tuple[Clip, ...]:
        return tuple(part for message in self.messages for part in message.content if isinstance(part, Clip))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An example as the model reads it: token ids with media placeholders, positions, and the media that fill them."""

    token_ids: Tensor
    """int64 [P]; placeholders stand where media embeddings go."""
    position_ids: Tensor
    """int64 [axes, P]; 1 axis for plain rotary, 3 for M-RoPE."""
    media: tuple[MediaEmbeds, ...]
    """In the order of their placeholders."""
    media_slots: tuple[tuple[tuple[int, int], ...], ...]
    """Of each media the half-open token ranges that its rows fill, in order: one, or one a frame where text stands
    between frames."""

    def __post_init__(self) -> None:
        if self.position_ids.shape[-1] != len(self.token_ids):
            raise AssertionError(f"{len(self.token_ids)} tokens with {self.position_ids.shape[-1]} positions")
        for media, ranges in zip(self.media, self.media_slots, strict=True):
            if (count := sum(end - start for start, end in ranges)) != len(media.embeds):
                raise AssertionError(f"media {media.key}: {len(media.embeds)} embeddings for {count} placeholders")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def media_end(self) -> int:
        """Where the last media ends; 0 without any."""
        return max((ranges[-1][1] for ranges in self.media_slots), default=0)

    def slot(self, index: int) -> Tensor:
        """int64 [V]: which tokens the rows of a media fill, ascending."""
        import torch

        return torch.cat([torch.arange(start, end) for start, end in self.media_slots[index]])

    @property
    def next_position(self) -> int:
        """Where the response continues, on every axis: the largest position of the prompt plus one."""
        return int(self.position_ids.max()) + 1

    def followed_by(self, token_ids: Sequence[int]) -> Prompt:
        """The prompt with the beginning of its response already written."""
        import torch

        count = len(token_ids)
        tail = (self.next_position + torch.arange(count)).expand(len(self.position_ids), count)
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, torch.tensor(token_ids, dtype=torch.int64)]),
            position_ids=torch.cat([self.position_ids, tail], 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLeaf:
    """Some embeddings as they entered a prefix: its backward leaves their gradient here, for the encoder."""

    media: MediaEmbeds
    span: slice
    """Which of its embeddings."""
    rows: Tensor
    """[span, D], collects the gradient."""
    deepstack: Tensor | None = None
    """[K, span, D], likewise."""


class Prefix:
    """Keys and values of the tokens that several sequences share, by layer.

    Owned by whoever computed it; `release()` frees it. A plain class, not a dataclass: FSDP2 looks inside dataclasses.
    """

    __slots__ = ("keys", "length", "media", "policy_version", "values")

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        length: int,
        policy_version: int,
        media: Sequence[MediaLeaf] = (),
    ) -> None:
        self.keys = keys
        """[L] of [kv_heads, length, head_dim], after rotary embedding; perhaps attached to the graph.

        On a rank of a sequence group: all positions, but kv_heads / ranks heads (one, where there are fewer heads than
        ranks); with a ring the row's positions, and its ranks count."""
        self.values = values
        self.media = media
        """Of this rank's tokens, where the encoder learns."""
        self.length = length
        self.policy_version = policy_version

    def leaves(self) -> Prefix:
        """A detached copy that collects gradients, for the suffix backward."""
        keys, values = ([x.detach().requires_grad_(x.requires_grad) for x in xs] for xs in (self.keys, self.values))
        return Prefix(keys, values, self.length, self.policy_version)

    def kv(self) -> list[Tensor]:
        """The keys of every layer, then the values."""
        return self.keys + self.values

    def release(self) -> None:
        self.keys, self.values, self.media = [], [], ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response."""

    token_ids: tuple[int, ...]
    """[R], the stop token included when there was one."""
    logprobs: tuple[float, ...]
    """[R], of the distribution sampled from (logits / temperature), as the engine computed them."""
    text: str
    finish_reason: str
    """stop | length"""
    policy_version: int

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise AssertionError(f"{len(self.token_ids)} tokens with {len(self.logprobs)} log-probs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The unit of data: one prompt and all its rollouts. Never split, never mixed."""

    id: str
    example: Example
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    greedy: Rollout | None = None
    """The response whose every token is the likeliest, where rewards are compared with its; not trained."""

    def __post_init__(self) -> None:
        if not self.rollouts:
            raise AssertionError(f"group {self.id} without rollouts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout with what it earned."""

    rollout: Rollout
    rewards: dict[str, float | None]
    """By name; None: could not be scored (never 0 for a failure)."""
    reward: float | None
    """The weighted sum, or None if any part with a weight is None."""
    advantage: float = 0.0
    failed: tuple[str, ...] = ()
    """Names of the rewards that raised, hung or gave no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Everything a policy loss may look at. All [N, R]; rows are rollouts, whole ones."""

    logprobs: Tensor
    """With gradients."""
    old_logprobs: Tensor
    """The trainer's, under the weights that sampled."""
    advantages: Tensor
    """The same for all tokens of a row, until a correction (algo/correction.py) has weighed each."""
    mask: Tensor
    """bool; True = a trained response token."""
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    """The engine's, under the weights that sampled."""
    entropy: Tensor | None = None
    """With gradients, where there is a bonus for it."""

    def __post_init__(self) -> None:
        shape = tuple(self.logprobs.shape)
        named = ("old_logprobs", "advantages", "mask", "ref_logprobs", "rollout_logprobs", "entropy")
        found = {name: x for name in named if (x := getattr(self, name)) is not None}
        wrong = {name: tuple(x.shape) for name, x in found.items() if tuple(x.shape) != shape}
        if len(shape) != 2 or wrong:
            raise AssertionError(f"log-probs {shape} with {wrong or 'all others alike'}, expected [N, R]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """An un-normalised loss: the caller divides once, by the global count."""

    loss_sum: Tensor
    metrics: dict[str, float]
    """Sums over tokens, to be divided by the same token count."""
