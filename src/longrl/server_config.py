"""The `rollout.server` section of a configuration: engines in processes of their own. Imports no torch."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from longrl.model_config import Section


class ServerConfig(Section):
    """Rollout servers, which draw the rollouts of training instead of this process: docs/engines.md."""

    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of all servers, `http://node1:8100`. Groups of processes, and what each draws, are dealt out to them."""
    timeout_s: Annotated[float, Field(gt=0)] = 1200.0
    """How long the rollouts of a step may take; then the run stops, saved."""
    retry_s: Annotated[float, Field(ge=0)] = 120.0
    """How long a server that cannot be reached, or fails, is asked again; then the run stops, saved."""

    @field_validator("urls")
    @classmethod
    def _absolute(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            try:
                parts = urlsplit(url)
                if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                    raise ValueError("it names no server")
            except ValueError as error:  # a port that is no number, say
                raise ValueError(f"got {url!r}, expected http://HOST:PORT ({error})") from None
        return urls
