"""What a run and a rollout server tell each other: JSON, of which these are the schemas. Imports no torch.

    GET  /about      -> About
    POST /rollouts   Asked -> Answer; or a status of 400 and above, and one line of text

A request holds all that its answer depends on: token ids, positions and seeds, media by their keys in the shared cache,
and where the weights are. So it can be sent again, to this server or another, and a server keeps nothing for a run.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longrl.types import Clip, Rollout

TOKEN_ENV = "LONGRL_SERVER_TOKEN"
"""The environment variable that holds what requests must know, if anything: the same for server and run."""

Index = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AskedMedia(Part):
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}(:shuffled(:-?\d+)*)?$")]
    """Of the cache; of shuffled frames what evals/controls.py makes of it."""
    clip: Clip | None
    slots: Annotated[tuple[tuple[Index, Index], ...], Field(min_length=1)]
    """As Prompt.media_slots."""


class AskedPrompt(Part):
    id: str
    """Of the example, for messages."""
    token_ids: Annotated[tuple[Index, ...], Field(min_length=2)]
    """The last predicts the response; the others are its prefix."""
    position_ids: Annotated[tuple[tuple[Index, ...], ...], Field(min_length=1)]
    """Of each axis as many as tokens."""
    media: tuple[AskedMedia, ...]
    seed: Index

    @model_validator(mode="after")
    def _fits_together(self) -> AskedPrompt:
        count = len(self.token_ids)
        for axis in self.position_ids:
            if len(axis) != count:
                raise ValueError(f"{len(axis)} positions for {count} tokens, expected as many")
        for media in self.media:
            for start, end in media.slots:
                if not start < end <= count:
                    raise ValueError(f"media {media.key}: tokens {start} to {end} are not a part of {count} tokens")
        return self


class Sampling(Part):
    """As the fields of config.RolloutConfig."""

    group_size: Annotated[int, Field(ge=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0)]
    greedy: bool
    """One more response to each prompt, the last, of the likeliest tokens."""


class Weights(Part):
    """What rollouts are drawn from."""

    version: Index
    """Updates that they have had."""
    folder: str
    """Absolute; see weights.py. No two weights ever have the same."""


class Asked(Part):
    model: str
    """The run's `fingerprint`."""
    weights: Weights
    sampling: Sampling
    prompts: Annotated[tuple[AskedPrompt, ...], Field(min_length=1)]


class Answer(Part):
    rollouts: tuple[tuple[Rollout, ...], ...]
    """Of each prompt."""
    began_s: float
    """When the engine began, in seconds since 1970 on the server's clock."""
    ended_s: float


class About(Part):
    model: str
    engine: str
    room: Index | None
    """Tokens of a prompt and its response; None: not bounded, or not known."""
    longest_clip: Index | None
    """Embeddings of one clip; None: as the prompt."""


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with a message, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return (f"{where}: " if where else "") + first["msg"].removeprefix("Value error, ")
