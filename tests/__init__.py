"""Tests. Those of each change take a sample of what `make test-long` goes through."""

import os
from collections.abc import Iterable

LONG = "LONGRL_LONG" in os.environ


def in_process(rewards: Iterable[str]) -> dict[str, list[str]]:
    """A `scoring` section that keeps rewards of the tests here: some are late or count, and workers take seconds."""
    return {"in_process": [name for name in rewards if ":" in name]}
