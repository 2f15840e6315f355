"""What all tests of several processes use."""

from tests.e2e.conftest import dataset
from tests.forked import start_ranks as start

__all__ = ["dataset", "start"]
