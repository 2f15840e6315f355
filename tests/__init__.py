"""Tests. Those of each change take a sample of what `make test-long` goes through."""

import os

LONG = "LONGRL_LONG" in os.environ
