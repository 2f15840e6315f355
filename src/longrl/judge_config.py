"""The `judge` section of a configuration: which models judge, what they may cost, and how hard they are asked."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from longrl.model_config import Section


def url_without_secrets(url: str, example: str) -> str:
    """
    Raises:
        ValueError: it is none, or holds what may be a secret.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        # not shown: it may be a key, and this configuration is written to disk
        raise ValueError("a URL holds no user, key or query; keys come from the variable that key_env names")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not a URL, expected one such as {example}")
    return url


def variable_name(name: str | None) -> str | None:
    """
    Raises:
        ValueError: it is not the name of an environment variable.
    """
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise ValueError("expected the name of an environment variable, such as OPENAI_API_KEY, and not a key")
    return name


def key_problem(variable: str | None) -> str | None:
    """Why there is no API key in an environment variable; None: there is, or none is wanted."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        return (
            f"the environment variable {variable} is not set, expected an API key; export it, name another with "
            "key_env, or set key_env to null for a server that wants none"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        return f"the environment variable {variable} does not hold an API key, expected one word; export it again"
    return None


class LimitsConfig(Section):
    """How hard a remote service is asked; each service by itself. The processes of a run divide the first three."""

    concurrency: Annotated[int, Field(ge=1)] = 64
    """Calls under way at once."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """In any 60 seconds, retries included."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Likewise, of prompts and replies. A call is counted with the most it may take until its reply tells."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Of one call, to the last byte of its reply."""
    attempts: Annotated[int, Field(ge=1)] = 6
    """Calls for one question: after 429, 5xx, a timeout, a lost connection or a malformed reply it is asked again."""
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    """Longest wait before the first retry, twice as long before each next, 30 s at most; a Retry-After that is longer
    is kept to."""
    give_up_s: Annotated[float, Field(gt=0)] = 900.0
    """A question is unscorable so long after it was put, waiting for the limits included."""
    breaker_failures: Annotated[int, Field(ge=1)] = 20
    """After so many failed calls in a row nothing more is sent ..."""
    breaker_s: Annotated[float, Field(gt=0)] = 30.0
    """... for so long; then one call at a time finds out whether the service is back."""

    def divided(self, processes: int, key: str) -> LimitsConfig:
        """Each process's part.

        Args:
            key: where the section stands, for messages.

        Raises:
            ValueError: there is not one call for each.
        """
        names = ("concurrency", "requests_per_minute", "tokens_per_minute")
        whole = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name, value in whole.items():
            if value < processes:
                raise ValueError(f"{key}.{name} is {value}, but {processes} processes divide it; set it to more")
        return self.model_copy(update={name: value // processes for name, value in whole.items()})


class JudgeModelConfig(Section):
    """A model behind an OpenAI-compatible API."""

    base_url: str = "https://api.openai.com/v1"
    model: str
    """As the server calls it."""
    key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the API key, which is kept nowhere else; null: the server wants none."""
    reply: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How the server is told to reply in JSON (`response_format`); text: by the prompt alone. All are parsed alike."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """null: not sent, for models that refuse it."""
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Of a reply, reasoning included; a reply that is cut off is malformed."""
    input_usd_per_mtok: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million prompt tokens."""
    output_usd_per_mtok: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("base_url")
    @classmethod
    def _a_url_without_secrets(cls, url: str) -> str:
        return url_without_secrets(url, "http://127.0.0.1:8000/v1")

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return variable_name(name)


class JudgeConfig(Section):
    """The reward `judge`: language models that compare answers with references. See judge.md."""

    models: Annotated[dict[str, JudgeModelConfig], Field(min_length=1)]
    """By names of your own. Of several, the median counts; more than half must have delivered."""
    limits: LimitsConfig = LimitsConfig()
    dir: str = "runs/judge"
    """Where verdicts, and what they cost, are kept, on a disk of this machine; runs share it, and no question that was
    answered is asked again."""
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    """Nothing is asked that could bring what `dir` has noted as spent above this."""

    @model_validator(mode="after")
    def _budget_has_prices(self) -> JudgeConfig:
        for name, model in self.models.items():
            if self.budget_usd is not None and not (model.input_usd_per_mtok or model.output_usd_per_mtok):
                raise ValueError(
                    f"budget_usd is {self.budget_usd:g}, but models.{name} has no prices; set its input_usd_per_mtok "
                    "and output_usd_per_mtok, or leave budget_usd out"
                )
        return self
